"""Writing of models whose linears are integers, in the layout that :mod:`colora_ms.models.quantized_folder` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.formats import StoredWeight
from colora_ms.models.hf_folder import SINGLE, new_folder, write_description
from colora_ms.models.quantized_folder import METHOD


def write_quantized_folder(path: str | os.PathLike[str], config: DecoderConfig, tensors: Mapping[str, np.ndarray],
                           quantized: Mapping[str, StoredWeight], settings: dict, tokenizer_source: Any = None,
                           overwrite: bool = False, files: Optional[Mapping[str, str]] = None) -> str:
    """Write a model with integer linears; the folder appears complete or not at all.

    Args:
        path: the folder to make; an empty folder may exist there.
        config: ``DecoderConfig``.
        tensors: mapping of Hugging Face names to float32 arrays for all that is not quantised.
        quantized: ``{module: StoredWeight}``, int4 or int8 with a scale (out, groups).
        settings: what else ``quantization_config`` should say (bits, group, activations ...).
        tokenizer_source: what ``load_tokenizer`` takes, or ``None``.
        overwrite: replace a folder that is not empty.
        files: {name: path} of files to copy into the folder, in the place of those of the tokenizer.

    Returns:
        The path as ``str``.

    Raises:
        CheckpointError: nothing to quantise, a folder in the way, or a place that cannot be
            written. Nothing is left behind.
    """
    path = os.path.abspath(os.fspath(path))
    if not quantized:
        raise CheckpointError("no linear is quantised; write the model as a float folder instead")
    with new_folder(path, overwrite) as work:
        values = dict(config.to_hf(), torch_dtype="float32", quantization_config={"quant_method": METHOD, **settings})
        write_description(work, values, tokenizer_source, files)
        _write_tensors(work, config, tensors, quantized)
    return path


def _write_tensors(folder, config, tensors, quantized):
    from safetensors.numpy import save_file
    arrays = {}
    for name in config.parameter_shapes():
        module = name.removesuffix(".weight")
        if module in quantized:
            arrays[name] = np.ascontiguousarray(quantized[module].data)
            arrays[f"{name}_scale"] = np.ascontiguousarray(quantized[module].scale, np.float32)
        else:
            arrays[name] = np.ascontiguousarray(tensors[name], np.float32)
    file = os.path.join(folder, SINGLE)
    save_file(arrays, file, metadata={"format": "np"})
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
