"""Writing a decoder as a GGUF file that llama.cpp runs: metadata, tensors under its names, blocks of a type.

The container and the blocks are written by the ``gguf`` package; names, row order and settings are llama.cpp's, as its
converter of Hugging Face folders writes them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Optional, Union

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError, near
from colora_ms.files import PathLike, replacing
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import FAMILIES, family
from colora_ms.models.gguf_names import LLAMA3_KEYS, ROPE_FACTORS, gguf_name, interleave_rows, interleaved_heads
from colora_ms.models.gguf_tokenizer import FLOAT32, STRING, UINT32, tokenizer_entries
from colora_ms.models.rope import rope_frequencies
from colora_ms.models.tensors import check_shapes
from colora_ms.models.tokenizer import Tokenizer

#: Types that can be written, with the number that names a whole file of them.
GGUF_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}

#: The largest value of a block, in units of its float16 scale.
_REACH = {"F16": 1, "Q8_0": 127, "Q4_0": 8}


def write_gguf(path: PathLike, config: DecoderConfig, tensors: Mapping[str, np.ndarray],
               tokenizer_source: Union[Tokenizer, PathLike, None] = None, kind: str = "F32",
               name: Optional[str] = None) -> list[str]:
    """Write a model as one GGUF file; the file appears complete or not at all.

    Args:
        path: the file to make; it must not exist.
        config: ``DecoderConfig``.
        tensors: mapping of Hugging Face names to arrays, read one at a time.
        tokenizer_source: what ``load_tokenizer`` takes, or None for a file without a tokenizer.
        kind: type of the matrices, a key of ``GGUF_TYPES``; vectors (norms, biases) stay float32. A matrix whose rows
            are no whole blocks of the type is stored in F16.
        name: ``general.name``; by default the file's name.

    Returns:
        List of sentences about what is not as asked for (matrices in F16, texts that llama.cpp cuts otherwise), to be
        printed.

    Raises:
        CheckpointError: the file exists or cannot be written, tensors that do not fit the config, an unknown type, or
            values that the type cannot hold. Nothing is left behind.
        ConfigError: a setting that llama.cpp does not have; TokenizerError: a tokenizer that it does not have.
    """
    from gguf import GGUFValueType, GGUFWriter

    path = os.path.abspath(os.fspath(path))
    check_type(kind)
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists already; choose another name")
    given = getattr(tensors, "shapes", None) or {key: np.shape(tensors[key]) for key in tensors}
    check_shapes(given, config.parameter_shapes(), path)
    entries, factors, notes = _config_entries(config)
    entries["general.type"] = ("model", STRING, None)
    entries["general.name"] = (name or os.path.basename(path).removesuffix(".gguf"), STRING, None)
    entries["general.file_type"] = (GGUF_TYPES[kind], UINT32, None)
    entries["general.quantization_version"] = (2, UINT32, None)
    described, more = tokenizer_entries(tokenizer_source, config)
    entries.update(described)
    layout, few = _layout(config, kind)
    notes += more + few
    writer = GGUFWriter(None, family(config.model_type).gguf)
    for key, (value, number, inner) in entries.items():
        if not isinstance(value, (str, list)) or len(value):
            writer.add_key_value(key, value, GGUFValueType(number), None if inner is None else GGUFValueType(inner))

    def refused(reason):
        return CheckpointError(f"{path} cannot be written: {reason}")

    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path, refused, flush=True) as temporary:
            _write(writer, temporary, config, tensors, layout, factors)
    except OSError as error:
        raise refused(error.strerror or error) from None
    return notes


def check_type(kind: str) -> None:
    """CheckpointError unless ``kind`` can be written."""
    if kind not in GGUF_TYPES:
        raise CheckpointError(f"the GGUF type {kind!r} cannot be written; choose one of {', '.join(GGUF_TYPES)}."
                              + near(kind, GGUF_TYPES))


def encode(kind: str, array: np.ndarray, name: str) -> np.ndarray:
    """An array's bytes in a type: float32, float16 or uint8 array of the type's byte shape.

    Raises:
        CheckpointError: values that are not finite or too large for the type.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    array = np.ascontiguousarray(array, np.float32)
    if kind != "F32":
        most = float(np.abs(array).max(initial=0))
        if not math.isfinite(most) or most / _REACH.get(kind, 1) > 65504 and kind in _REACH:
            raise CheckpointError(f"tensor {name!r} has values up to {most:.6g}, which {kind} cannot hold; write it "
                                  "as F32")
    return quantize(array, GGMLQuantizationType[kind])


def stored_type(kind: str, shape: tuple[int, ...]) -> str:
    """The type in which a tensor of this shape is written where ``kind`` is asked for."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return "F32"
    return "F16" if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] else kind


def _layout(config, kind):
    """({Hugging Face name: (llama.cpp's name, type)}, notes)."""
    layout, odd, record = {}, [], family(config.model_type)
    for name, shape in config.parameter_shapes().items():
        own = stored_type(kind, shape)
        layout[name] = (gguf_name(name, record), own)
        if own != kind and len(shape) > 1:
            odd.append((name, shape[-1]))
    if not odd:
        return layout, []
    return layout, [f"{len(odd)} matrices are stored in F16, because their rows are no whole blocks of {kind} (such as "
                  f"{odd[0][0]} with rows of {odd[0][1]})"]


def _write(writer, path, config, tensors, layout, factors):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    shapes = config.parameter_shapes()
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, (other, kind) in layout.items():
        number = GGMLQuantizationType[kind]
        block, size = GGML_QUANT_SIZES[number]
        shape = shapes[name]
        if block > 1 or kind == "BF16":
            shape = shape[:-1] + (shape[-1] // block * size,)
            dtype, size = np.dtype(np.uint8), math.prod(shape)
        else:
            dtype, size = np.dtype(np.float16 if kind == "F16" else np.float32), math.prod(shape) * size
        writer.add_tensor_info(other, shape, dtype, size, raw_dtype=number)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name, (_, kind) in layout.items():
            heads = interleaved_heads(config, name.rpartition(".")[0])
            writer.write_tensor_data(encode(kind, interleave_rows(np.asarray(tensors[name]), heads), name))
    finally:
        writer.close()


def _config_entries(config):
    """({key: (value, type, None)}, the factors of the rotary frequencies or None, notes) of a config."""
    record = family(config.model_type)
    if not record.gguf_writes:
        raise ConfigError(f"a {record.name} model cannot be written as GGUF; those of "
                          f"{', '.join(one.name for one in FAMILIES.values() if one.gguf_writes)} can")
    key = record.gguf + "."
    biases = [option for option, field in record.keys().items() if getattr(config, field)]
    if biases and not record.gguf_biases:
        raise ConfigError(f"a {record.name} model with {' and '.join(biases)} cannot be written as GGUF: llama.cpp has "
                          "no such biases")
    entries = {
        "context_length": (config.max_position_embeddings, UINT32), "embedding_length": (config.hidden_size, UINT32),
        "block_count": (config.num_hidden_layers, UINT32), "feed_forward_length": (config.intermediate_size, UINT32),
        "attention.head_count": (config.num_attention_heads, UINT32),
        "attention.head_count_kv": (config.num_key_value_heads, UINT32),
        "attention.layer_norm_rms_epsilon": (config.rms_norm_eps, FLOAT32),
        "attention.key_length": (config.head_dim, UINT32), "attention.value_length": (config.head_dim, UINT32),
        "rope.dimension_count": (config.head_dim, UINT32), "rope.freq_base": (config.rope_theta, FLOAT32),
        "vocab_size": (config.vocab_size, UINT32),
    }
    scaling = dict(config.rope_scaling or {"rope_type": "default"})
    kind, factors, notes, own = scaling.pop("rope_type"), None, [], {}
    if kind in ("linear", "yarn"):
        entries["rope.scaling.type"] = (kind, STRING)
        entries["rope.scaling.factor"] = (float(scaling.pop("factor")), FLOAT32)
    if kind == "yarn":
        original = scaling.pop("original_max_position_embeddings", None) or config.max_position_embeddings
        entries["rope.scaling.original_context_length"] = (_whole("original_max_position_embeddings", original), UINT32)
        for name in ("beta_fast", "beta_slow"):
            if scaling.get(name) is not None:
                entries[f"rope.scaling.yarn_{name}"] = (float(scaling.pop(name)), FLOAT32)
        scaling = _unusual(scaling)
    elif kind == "llama3":
        if not record.gguf_rope_factors:
            others = [one.gguf for one in FAMILIES.values() if one.gguf_rope_factors and one.gguf_writes]
            raise ConfigError(f"rope_scaling of type llama3 on {record.name} cannot be written as GGUF: "
                              f"llama.cpp has the factors for {', '.join(others)} only")
        plain, _ = rope_frequencies(_without_scaling(config))
        factors = (plain / rope_frequencies(config)[0]).astype(np.float32)
        own = {other: (float(scaling[name]), FLOAT32, None) for name, other in LLAMA3_KEYS.items()}
        scaling = {}
    elif kind == "dynamic":
        notes.append("llama.cpp has no dynamic rotary scaling: the file gives the same answers up to "
                     f"{config.max_position_embeddings} positions")
        scaling = {}
    if kind != "linear" and scaling:
        raise ConfigError(f"rope_scaling of type {kind} with "
                          f"{', '.join(f'{name}={value!r}' for name, value in scaling.items())} "
                          "cannot be written as GGUF: llama.cpp has no such setting")
    return {**{key + name: (*value, None) for name, value in entries.items()}, **own}, factors, notes


def _unusual(scaling):
    """The settings of yarn that llama.cpp has no word for, without those that have no effect."""
    if scaling.get("truncate", True):
        scaling.pop("truncate", None)
    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        scaling.pop("mscale", None)
        scaling.pop("mscale_all_dim", None)
    return scaling


def _whole(name, value):
    if int(value) != value:
        raise ConfigError(f"rope_scaling[{name!r}] is {value!r}, expected a whole number to be written as GGUF")
    return int(value)


def _without_scaling(config):
    return dataclasses.replace(config, rope_scaling=None)
