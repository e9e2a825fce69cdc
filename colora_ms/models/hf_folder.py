"""Hugging Face model folders: ``config.json`` with one or several safetensors files.

Reading is lazy (memory-mapped, a tensor at a time); writing is atomic: everything is written
into a temporary folder beside the target, which is renamed only when it is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.files import read_json, replacing_folder
from colora_ms.models.config import DecoderConfig
from colora_ms.models.family_tensors import FolderTensors
from colora_ms.models.formats import BFLOAT16, FLOAT16, StoredWeight, stored_float
from colora_ms.models.safetensors_file import FLOAT_DTYPES, ITEM_BYTES, WRITE_DTYPES, SafetensorsFile, write_safetensors
from colora_ms.models.tensors import check_shapes
from colora_ms.models.tokenizer import load_tokenizer

#: ``quant_method`` of the folders that packed_folder reads.
PACKED_METHODS = ("gptq", "awq", "compressed-tensors")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """The ``DecoderConfig`` of a folder; end tokens of ``generation_config.json`` are added.

    Raises:
        CheckpointError: there is no readable ``config.json``.
        ConfigError: the config is not supported (the message starts with the file's path).
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder} has no config.json, so it is not a model folder; a model "
                              "folder holds config.json and model.safetensors")
    values = read_json(path)
    if _integer_settings(values) is not None or packed_settings(folder, values) is not None:
        values = dict(values, quantization_config=None)  # read by quantized_folder or packed_folder
    return parse_config(folder, path, values)


def parse_config(folder: str | os.PathLike[str], path: str, values: Any) -> DecoderConfig:
    """``read_config`` for the content of a config.json that has been read already."""
    generation = os.path.join(folder, "generation_config.json")
    if isinstance(values, dict) and os.path.isfile(generation):
        extra = read_json(generation)
        values = dict(values, eos_token_id=_merge_ids(
            values.get("eos_token_id"), extra.get("eos_token_id") if isinstance(extra, dict)
            else None))
    try:
        return DecoderConfig.from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def quantization_of(folder: str | os.PathLike[str]) -> dict | None:
    """The ``quantization_config`` of a folder with this package's integer linears, or ``None``."""
    path = os.path.join(folder, "config.json")
    return _integer_settings(read_json(path)) if os.path.isfile(path) else None


def packed_settings(folder: str | os.PathLike[str], values: Any) -> dict | None:
    """The settings of a folder whose linears another package packed (``PACKED_METHODS``), or ``None``.

    Args:
        values: content of its config.json; folders of older GPTQ writers have a file of their own.
    """
    found = values.get("quantization_config") if isinstance(values, dict) else None
    old = os.path.join(folder, "quantize_config.json")
    if found is None and os.path.isfile(old):
        found = {"quant_method": "gptq", **read_json(old)}
    return found if isinstance(found, dict) and found.get("quant_method") in PACKED_METHODS else None


def _integer_settings(values):
    found = values.get("quantization_config") if isinstance(values, dict) else None
    ours = isinstance(found, dict) and found.get("quant_method") == "colora_int"
    return found if ours else None


def _merge_ids(*sources):
    """End-token ids of several files, in order, without repeats."""
    merged = []
    for source in sources:
        for item in source if isinstance(source, list) else [source]:
            if item is not None and item not in merged:
                merged.append(item)
    return merged


class SafetensorsFolder:
    """The tensors of one or several safetensors files, by name.

    Attributes:
        shapes: ``{name: shape}`` over all files.
        files: the files' paths.
    """

    def __init__(self, files):
        """
        Args:
            files: ``{path: names or None}``; with names, exactly these must be in that file.

        Raises:
            CheckpointError: a file is damaged, a name is in two files, or a file and the index
                disagree (all disagreements in one message).
        """
        self._where, problems = {}, []
        for path, expected in files.items():
            file = SafetensorsFile(path)
            for name in file.entries:
                if name in self._where:
                    problems.append(f"{name!r} is in {self._where[name].path} and in {path}")
                self._where[name] = file
            if expected is not None:
                problems += [f"{name!r} is not in {path}, where the index has it"
                             for name in expected if name not in file.entries]
        if problems:
            raise CheckpointError(f"the index of the model's files is wrong: {problems[0]}"
                                  + (f" ({len(problems) - 1} more)" if problems[1:] else ""))
        self.files = list(files)
        self.shapes = {name: file.shape(name) for name, file in self._where.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, float32."""
        return self._where[name].read(name)

    def stored(self, name: str) -> StoredWeight:
        """The tensor as it is stored; float64, in which no weight is kept, as float32."""
        own = next((one for one in (BFLOAT16, FLOAT16) if one.code == self.dtype(name)), None)
        if own is None:
            return stored_float(self.read(name))
        shape = self.shapes[name]
        return StoredWeight(own, shape, np.frombuffer(self.raw(name), own.dtype).reshape(shape))

    def dtype(self, name: str) -> str:
        """The dtype's name in the file, such as "F32"."""
        return self._where[name].entries[name][0]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of the tensor, uint8 (n,)."""
        return self._where[name].raw(name)

    def check_dtypes(self, names: Iterable[str]) -> None:
        """CheckpointError if one of the tensors does not hold floating-point numbers."""
        for name in names:
            dtype = self._where[name].entries[name][0]
            if dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{self._where[name].path}: tensor {name!r} has dtype {dtype}; weights are "
                    f"read from {', '.join(FLOAT_DTYPES)} (quantized models: use a GGUF file)")

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are stored with identical shape, dtype and bytes."""
        one, two = self._where[first], self._where[second]
        if one.entries[first][:2] != two.entries[second][:2]:
            return np.array_equal(one.read(first), two.read(second))
        return np.array_equal(one.raw(first), two.raw(second))


def find_weights(folder: str | os.PathLike[str]) -> dict[str, list[str] | None] | None:
    """Which safetensors files make up the model in a folder.

    Returns:
        ``{path: names or None}`` for ``SafetensorsFolder``, or ``None`` when the folder holds no
        safetensors file.

    Raises:
        CheckpointError: an index that is damaged or points outside the folder, several files
            without an index, or only PyTorch pickles.
    """
    single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
    if os.path.isfile(single):
        return {single: None}
    if os.path.isfile(index):
        return _read_index(folder, index)
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if len(names) == 1:
        return {os.path.join(folder, names[0]): None}
    if names:
        raise CheckpointError(f"{folder} holds {len(names)} safetensors files ({names[0]}, ...) "
                              f"but no {INDEX}; fetch that file too")
    pickles = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}: PyTorch pickle files are not read, because loading one "
            "can run any code; convert it to safetensors first (transformers: "
            "model.save_pretrained(folder, safe_serialization=True))")
    return None


def _read_index(folder, path):
    values = read_json(path)
    table = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path} has no 'weight_map' of tensor names and files")
    files = {}
    for name, file in table.items():
        # symbolic links inside the folder are fine (Hugging Face's cache), other folders are not
        if not isinstance(file, str) or not file.endswith(".safetensors") \
                or os.path.basename(file) != file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path} puts the tensor {name!r:.80} into {file!r:.80}; expected "
                                  "the plain name of a .safetensors file in the same folder")
        files.setdefault(os.path.join(folder, file), []).append(name)
    for file in files:
        if not os.path.isfile(file):
            raise CheckpointError(f"{path} names {os.path.basename(file)}, which is not there "
                                  f"({len(files)} files are expected in all)")
    return files


#: Files of a model folder beside config and weights that say how text becomes ids and how it is generated.
TRAVELLING = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
              "generation_config.json")


def travelling_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """{name: path} of the tokenizer's files, chat template and generation config that a model folder holds."""
    return {name: os.path.join(folder, name) for name in TRAVELLING if os.path.isfile(os.path.join(folder, name))}


def write_hf_folder(path: str | os.PathLike[str], config: DecoderConfig, tensors: Mapping[str, np.ndarray],
                    tokenizer_source: Any = None, dtype: str = "float32", max_shard_bytes: int = 4 << 30,
                    overwrite: bool = False, files: Mapping[str, str] | None = None) -> str:
    """Write a model in Hugging Face's layout; the folder appears complete or not at all.

    Args:
        path: the folder to make; an empty folder may exist there.
        config: ``DecoderConfig``.
        tensors: mapping of Hugging Face names to arrays (any float dtype), read one at a time.
        tokenizer_source: what ``load_tokenizer`` takes (a folder, a file, a ``Tokenizer``), or
            ``None`` to write no tokenizer.
        dtype: ``"float32"``, ``"bfloat16"`` (round to nearest even) or ``"float16"``.
        max_shard_bytes: a new file is begun when this size would be exceeded.
        overwrite: replace a folder that is not empty.
        files: {name: path} of files to put into the folder as they are, in the place of what would
            be written under these names.

    Returns:
        The path as ``str``.

    Raises:
        CheckpointError: tensors that do not fit the config, an unknown dtype, a folder in the
            way, or a place that cannot be written.  Nothing is left behind.
        TokenizerError: the tokenizer cannot be read.
    """
    given = getattr(tensors, "shapes", None) or {name: np.shape(tensors[name]) for name in tensors}
    check_shapes(given, config.parameter_shapes(), os.path.abspath(path))
    folder = FolderTensors(config, tensors)
    return write_model_folder(path, config.to_hf(), folder.shapes, folder, tokenizer_source, dtype, max_shard_bytes,
                              overwrite, files)


def write_model_folder(path: str | os.PathLike[str], values: dict, shapes: Mapping[str, tuple[int, ...]],
                       tensors: Mapping[str, np.ndarray], tokenizer_source: Any = None, dtype: str = "float32",
                       max_shard_bytes: int = 4 << 30, overwrite: bool = False,
                       files: Mapping[str, str] | None = None) -> str:
    """``write_hf_folder`` for any config.json: ``values`` is its content, ``shapes`` are the
    tensors that it calls for ({name: shape}); the other arguments, errors and result as there."""
    path = os.path.abspath(os.fspath(path))
    if dtype not in WRITE_DTYPES:
        raise CheckpointError(f"dtype {dtype!r} cannot be written; choose one of "
                              f"{', '.join(WRITE_DTYPES)}")
    given = getattr(tensors, "shapes", None) or {name: np.shape(tensors[name]) for name in tensors}
    check_shapes(given, shapes, path)
    with new_folder(path, overwrite) as work:
        write_description(work, dict(values, torch_dtype=dtype), tokenizer_source, files)
        _write_shards(work, shapes, tensors, dtype, max_shard_bytes)
    return path


def new_folder(path: str, overwrite: bool = False) -> AbstractContextManager:
    """A private folder to write into, which takes its name ``path`` when the block ends without an error.

    Args:
        path: absolute; overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: a folder in the way, or a place that cannot be written. Nothing is left behind.
    """
    if os.path.lexists(path) and not overwrite and (not os.path.isdir(path) or os.listdir(path)):
        raise CheckpointError(f"{path} exists already; choose another folder or pass "
                              "overwrite=True (in Python)")
    return replacing_folder(path, lambda reason: CheckpointError(f"{path} cannot be written: {reason}"))


def write_description(folder: str | os.PathLike[str], values: dict, tokenizer_source: Any,
                      files: Mapping[str, str] | None = None) -> None:
    """Write ``config.json`` with ``values``, the generation config that follows from it, and the tokenizer's files;
    ``files`` ({name: path}) are copied as they are, in the place of those."""
    _write_json(os.path.join(folder, "config.json"), values)
    generation = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
                  if values[key] is not None}
    _write_json(os.path.join(folder, "generation_config.json"), generation)
    if tokenizer_source is not None:
        load_tokenizer(tokenizer_source).save(folder)
    for name, source in (files or {}).items():
        shutil.copyfile(source, os.path.join(folder, name))


def _write_shards(folder, shapes, tensors, dtype, max_shard_bytes):
    item, shards = ITEM_BYTES[WRITE_DTYPES[dtype]], [{}]
    total = filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
        total += size
    table = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else \
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(os.path.join(folder, name), shard, tensors.__getitem__, dtype)
        table.update({tensor: name for tensor in shard})
    if len(shards) > 1:
        _write_json(os.path.join(folder, INDEX),
                    {"metadata": {"total_size": total}, "weight_map": table})


def _write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
