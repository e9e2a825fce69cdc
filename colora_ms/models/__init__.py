"""Decoders, one record a family (``families``), their checkpoints and tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from colora_ms.files import PathLike
    from colora_ms.models.checkpoint import Checkpoint
    from colora_ms.models.decoder import Decoder
    from colora_ms.models.tokenizer import Tokenizer

_EXPORTS = {"Decoder": "decoder", "DecoderConfig": "config", "PagedCache": "paged_cache",
            "open_checkpoint": "checkpoint"}

__all__ = ["Decoder", "DecoderConfig", "PagedCache", "build_decoder", "load_model", "open_checkpoint"]


def load_model(name_or_path: PathLike = "smollm2-135m", weight_format: str = "auto",
               max_positions: Optional[int] = None) -> tuple[Decoder, Tokenizer]:
    """Load a decoder and its tokenizer.

    Args:
        name_or_path: a known name ("smollm2-135m"), a Hugging Face folder, a GGUF file, a MindSpore checkpoint's
            folder, or a folder that ``colora-ms decompose`` wrote.
        weight_format: "auto": every weight in the format in which the file has it, nothing is rounded. A name of
            :data:`colora_ms.models.formats.WEIGHT_FORMATS`, such as "float32", "bfloat16", "int8" or "int4": unpacked
            and packed anew while loading, rounded to nearest. Linears that the folder stores as integers (``colora-ms
            quantize``) stay what they are; the name then holds for the embedding and the head.
        max_positions: the longest sequence; by default the config's maximum.

    Returns:
        (:class:`Decoder`, :class:`colora_ms.models.tokenizer.Tokenizer`).

    Raises:
        CheckpointError, ConfigError, TokenizerError: with what is wrong and what to do.
    """
    from colora_ms import runtime
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    from colora_ms.models.tokenizer import load_tokenizer

    runtime.configure()
    checkpoint = open_checkpoint(resolve_model(name_or_path))
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    return build_decoder(checkpoint, weight_format, max_positions), tokenizer


def build_decoder(checkpoint: Checkpoint, weight_format: str = "auto",
                  max_positions: Optional[int] = None) -> Decoder:
    """The :class:`Decoder` of an opened checkpoint; arguments as in :func:`load_model`."""
    from colora_ms.models.decoder import Decoder

    return Decoder(checkpoint.config, checkpoint.stored, weight_format=weight_format, max_positions=max_positions)


def __getattr__(name: str) -> object:
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(f"colora_ms.models.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'colora_ms.models' has no attribute {name!r}")
