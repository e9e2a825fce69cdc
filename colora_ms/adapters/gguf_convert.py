"""Adapters between PEFT's folders and llama.cpp's LoRA files, without building a model: ``colora-ms convert``."""

import os
from pathlib import Path
from typing import Any, Union

from colora_ms.adapters import vocabulary
from colora_ms.adapters.config_modules import modules_of_config
from colora_ms.adapters.gguf_lora import merge_command, write_gguf_lora
from colora_ms.adapters.matching import DEFAULT_TARGETS, match
from colora_ms.adapters.peft_format import StoredAdapter, write_adapter
from colora_ms.adapters.principal import as_plain_lora, starts_on
from colora_ms.errors import AdapterError, CheckpointError
from colora_ms.models.checkpoint import open_checkpoint, resolve_model


def convert_adapter(folder: Union[str, os.PathLike], path: Union[str, os.PathLike], base: Any = None,
                    kind: str = "F32") -> list[str]:
    """Write an adapter folder as llama.cpp's LoRA file, or the reverse; no model is built.

    Args:
        folder: PEFT folder of a LoRA, or a LoRA GGUF.
        path: the file to make, ending in ``.gguf``, or else the PEFT folder; it must not exist.
        base: the base model as ``open_checkpoint`` takes it; by default the one that the adapter's config names.
        kind: as for :func:`write_gguf_lora`.

    Returns:
        List of sentences to be printed.

    Raises:
        AdapterError: the adapter does not fit the base, or llama.cpp's format has no words for it; CheckpointError:
            there is no such base.
    """
    stored = StoredAdapter(folder)
    if stored.config is None:
        stored.refuse(stored.problems)
    if stored.config.peft_type != "LORA":
        raise AdapterError(f"{folder} is a {stored.config.peft_type} adapter; llama.cpp knows LoRA only. With static "
                           "router weights a Lily adapter can be written as LoRA first, by "
                           "colora_ms.adapters.export_lora")
    base = base if base is not None else stored.config.base_model_name_or_path
    if base is None:
        raise AdapterError(f"{folder} does not name its base model, whose architecture and heads the file needs; "
                           "give --base")
    try:
        checkpoint = open_checkpoint(resolve_model(base))
    except CheckpointError as error:
        raise CheckpointError(f"the base model of {folder} is needed for its architecture and heads; give --base. "
                              f"{error}") from None
    modules = modules_of_config(checkpoint.config)
    problems = stored.fit(checkpoint)
    more = vocabulary.larger(stored, modules)
    if more is not None:
        raise AdapterError(f"the adapter in {folder} has {more.rows} rows for tokens, its base {more.tables.rows}, "
                           "which a LoRA of llama.cpp cannot add; merge it into the model instead: "
                           + merge_command(checkpoint.config))
    try:
        matched = match(stored.config, modules, list(DEFAULT_TARGETS))
    except AdapterError as error:
        stored.refuse(stored.problems + problems + [str(error)], base)

    def base_values(module):
        source = modules[module].tied_to or module
        return {key: checkpoint.tensors[f"{source}.{key}"] for key in modules[module].parameters}

    stored.problems += problems
    values = stored.read(matched, modules, base_values, base)
    config = stored.config
    if getattr(config, "changes_base", False):
        config, matched, values = as_plain_lora(config, matched, values,
                                             starts_on(config, matched, lambda module: base_values(module)["weight"]))
    if str(path).lower().endswith(".gguf"):
        return write_gguf_lora(path, checkpoint.config, matched, values, kind, Path(folder).resolve().name)
    if os.path.lexists(path):
        raise AdapterError(f"{path} exists already; choose another name")
    config.base_model_name_or_path = str(base)
    write_adapter(path, config, matched, modules, values, model=checkpoint.config)
    return []
