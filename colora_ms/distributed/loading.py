"""A decoder whose linears are split over the workers of a job; every worker computes the same logits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Optional

from colora_ms.adapters.handle import Adapters
from colora_ms.adapters.inject import load_adapters
from colora_ms.distributed.adapter_files import shard_adapter
from colora_ms.distributed.cells import join_parts
from colora_ms.distributed.shares import Shares, local_config
from colora_ms.distributed.workers import Workers
from colora_ms.errors import AdapterError, ConfigError
from colora_ms.files import PathLike
from colora_ms.models.builder import Weights
from colora_ms.models.checkpoint import open_checkpoint, resolve_model
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder
from colora_ms.models.formats import AUTO, FLOAT32, FORMATS, WEIGHT_FORMATS
from colora_ms.models.tokenizer import Tokenizer, load_tokenizer

_FORMATS = tuple(name for name in WEIGHT_FORMATS if FORMATS[name].is_float)


def shard_decoder(config: DecoderConfig, weights: Weights, team: Workers,
                  weight_format: str = "auto", max_positions: Optional[int] = None,
                  adapters: Optional[Mapping[str, PathLike]] = None, trainable: bool = False,
                  prepare: Optional[Callable[[Decoder], None]] = None) -> tuple[Decoder, Optional[Adapters]]:
    """This worker's share of a decoder, with its share of the adapters.

    Args:
        config: ``DecoderConfig`` of the whole model.
        weights: mapping of Hugging Face names to what is stored under them, or to whole arrays, read one at a time; of
            a mapped file this worker reads its own rows and columns.
        team: ``Workers``; all of them make this call.
        weight_format: "float32", "bfloat16" or "float16"; "auto" is float32 here: shares are cut from values.
        max_positions: see ``Decoder``.
        adapters: mapping of names to PEFT folders of plain LoRA, or None.
        trainable: whether the adapters' Parameters require gradients.
        prepare: what is to be done with the decoder before the sums are put into it, where its Cells are still those of
            a small whole model: slots for adapters are made here.

    Returns:
        ``(Decoder, Adapters or None)``. Its cache has this worker's heads alone; its inputs and logits are those of
        the whole model.

    Raises:
        ConfigError: heads or inner size cannot be divided by the number of workers; another weight format.
        AdapterError: an adapter has something beside LoRA's two factors, or (trainable) dropout.
    """
    weight_format = FLOAT32.name if weight_format == AUTO else weight_format
    if weight_format not in _FORMATS:
        raise ConfigError(f"weight_format {weight_format!r} cannot be split, expected one of {', '.join(_FORMATS)}: "
                          "the scales of integer weights would be other ones than those of the whole model")
    decoder = Decoder(local_config(config, team.world), Shares(weights, team), weight_format,
                      max_positions)
    handle = None
    if adapters:
        with tempfile.TemporaryDirectory(prefix="colora-shares-") as folder:
            mine = {name: shard_adapter(source, Path(folder) / str(number), team)
                    for number, (name, source) in enumerate(adapters.items())}
            handle = load_adapters(decoder, mine, trainable=trainable)
        if trainable and handle.dropout:
            raise AdapterError(f"lora_dropout is {handle.dropout}, but a split model is trained without dropout: its "
                               "workers would drop different inputs of one linear")
    if prepare is not None:
        prepare(decoder)
    if team.world > 1:
        join_parts(decoder, team)
    return decoder, handle


def load_sharded(name_or_path: PathLike, team: Workers, weight_format: str = "auto",
                 max_positions: Optional[int] = None, adapters: Optional[Mapping[str, PathLike]] = None,
                 prepare: Optional[Callable[[Decoder], None]] = None
                 ) -> tuple[Decoder, Tokenizer, Optional[Adapters]]:
    """This worker's share of a model from its files, with its tokenizer and its share of the adapters.

    Args:
        name_or_path: as for :func:`colora_ms.models.load_model`.
        team, weight_format, max_positions, adapters, prepare: as for :func:`shard_decoder`.

    Returns:
        ``(Decoder, Tokenizer, Adapters or None)``.

    Raises:
        ConfigError: the model's linears are integers or factors, or its sizes cannot be divided.
        AdapterError, CheckpointError, TokenizerError: with what is wrong and what to do.
    """
    checkpoint = open_checkpoint(resolve_model(name_or_path))
    if checkpoint.quantized is not None or checkpoint.low_rank:
        kind = "decomposed linears" if checkpoint.low_rank else "integer linears (colora-ms quantize, LR-QAT)"
        raise ConfigError(f"{checkpoint.path} has {kind}, which cannot be split over workers; run it in one process, "
                          "or split the float model that it was made from")
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    decoder, handle = shard_decoder(checkpoint.config, checkpoint.stored, team, weight_format, max_positions, adapters,
                                    prepare=prepare)
    return decoder, tokenizer, handle
