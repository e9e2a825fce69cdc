"""Adapters between mindformers' LoRA tensors and PEFT folders.

mindformers has three namings, all read here:

| naming | tensors of a module | from |
|---|---|---|
| ``mcore`` | ``.lora_A.weight`` (r, in), ``.lora_B.weight`` (out, r) | Column-, RowParallelLinearWithLoRA |
| ``mindpet`` | ``.mindpet_delta_lora_a`` (r, in), ``.mindpet_delta_lora_b`` (out, r) | pet_type lora of legacy models |
| ``slora`` | ``.lora_a`` (adapters, r, in), ``.lora_b`` (adapters, r, out), the scale multiplied in | pet_type slora |

A linear that mindformers fuses has one pair for its parts. To Hugging Face's names every part gets the same down and
its own rows of up; the other way the parts' pairs are put side by side (ranks add up), with the same product either
way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colora_ms.adapters import LoraConfig, matching, store
from colora_ms.adapters.key_names import PREFIX, plain_names
from colora_ms.adapters.matching import Module
from colora_ms.errors import AdapterError
from colora_ms.integrations.mindformers.names import Layout, Names, layout_of, part_sizes, parts
from colora_ms.models.safetensors_file import SafetensorsFile, write_safetensors

if TYPE_CHECKING:
    from colora_ms.models.config import DecoderConfig

_PATTERNS = {
    "mcore": re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight"),
    "mindpet": re.compile(r"(?P<module>.+)\.mindpet_delta_lora_(?P<side>[abAB])"),
    "slora": re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])"),
}

#: Prefixes of optimizer state, which checkpoints hold beside the weights.
_STATE = ("adam_m.", "adam_v.", "exp_avg.", "exp_avg_sq.", "accu_grads.")


def read_pairs(tensors: Mapping[str, np.ndarray], adapter: int = 0) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """The low-rank pairs of a mindformers checkpoint, whichever naming it uses.

    Args:
        tensors: {name: array}; base weights and optimizer state are passed over.
        adapter: which one of an ``slora`` checkpoint.

    Returns:
        (naming, {module in mindformers' names: {"down": (r, in), "up": (out, r)}}), float32. The up factors of
        ``slora`` contain the scale.

    Raises:
        AdapterError: no LoRA tensor, several namings, half of a pair, or shapes that do not fit; all in one message.
    """
    found, namings = {}, set()
    for name, value in tensors.items():
        if name.startswith(_STATE):
            continue
        for naming, pattern in _PATTERNS.items():
            match = pattern.fullmatch(name)
            if match:
                namings.add(naming)
                side = "down" if match["side"] in "aA" else "up"
                found.setdefault(match["module"], {})[side] = np.asarray(value, np.float32)
                break
    if not found:
        raise AdapterError("the checkpoint has no LoRA tensors (.lora_A.weight, .mindpet_delta_lora_a or .lora_a); it "
                           f"has {', '.join(list(tensors)[:3]) or 'nothing'}")
    problems = []
    if len(namings) > 1:
        problems.append(f"tensors are named in {len(namings)} ways: {', '.join(sorted(namings))}")
    for module, pair in found.items():
        if len(pair) < 2:
            problems.append(f"{module} has {next(iter(pair))} alone")
            continue
        if "slora" in namings:
            if pair["down"].ndim != 3 or pair["up"].ndim != 3 or not 0 <= adapter < len(pair["down"]):
                problems.append(f"{module} has shapes {pair['down'].shape}, {pair['up'].shape}; expected (adapters, r, "
                                f"in) and (adapters, r, out) with more than {adapter} adapters")
                continue
            pair["down"], pair["up"] = pair["down"][adapter], np.ascontiguousarray(pair["up"][adapter].T)
        if pair["down"].ndim != 2 or pair["up"].ndim != 2 or pair["down"].shape[0] != pair["up"].shape[1]:
            problems.append(f"{module} has shapes {pair['down'].shape} and {pair['up'].shape}; expected (r, in) and "
                            "(out, r)")
    if problems:
        raise AdapterError("the LoRA tensors cannot be read: " + "; ".join(problems[:8]))
    return namings.pop(), found


def to_peft(tensors: Mapping[str, np.ndarray], folder: str | Path, config: DecoderConfig, alpha: float | None = None,
            layout: Layout | str | None = None, adapter: int = 0) -> LoraConfig:
    """Write a PEFT folder from mindformers' LoRA tensors.

    Args:
        tensors: {name: array} of the checkpoint; folder: the new adapter's folder.
        config: DecoderConfig of the model.
        alpha: ``lora_alpha`` of the training (the file does not have it); not for ``slora``, which contains the scale.
        layout: Layout or its name; by default what the names show, with the row orders of training.
        adapter: which one of an ``slora`` checkpoint.

    Returns:
        The LoraConfig that was written.

    Raises:
        AdapterError: as :func:`read_pairs`; a module has no name in Hugging Face's; alpha is missing or not wanted.
    """
    naming, pairs = read_pairs(tensors, adapter)
    if (alpha is None) != (naming == "slora"):
        raise AdapterError("give alpha, the lora_alpha of the training" if alpha is None else
                           "an slora checkpoint has its scale in the factors; leave alpha out")
    names = Names(layout if layout is not None else layout_of(f"{module}.weight" for module in pairs))
    found, unknown = {}, []
    for module, pair in pairs.items():
        fused = names.fused_module(module)
        if fused:
            layer, kind = fused
            up = np.empty_like(pair["up"])
            up[names.order(config, kind)] = pair["up"]
            rows = np.split(up, np.cumsum(part_sizes(config, kind))[:-1])
            for part, own in zip(parts(kind), rows):
                found[f"model.layers.{layer}.{part}"] = {"down": pair["down"], "up": own}
            continue
        plain = names.to_huggingface(module)
        if plain:
            found[plain] = pair
        else:
            unknown.append(module)
    if unknown:
        raise AdapterError(f"{', '.join(unknown[:5])} have no name in Hugging Face's {config.model_type}")
    ranks = {module: len(pair["down"]) for module, pair in found.items()}
    r = max(ranks.values())
    settings = LoraConfig(r=r, lora_alpha=r if alpha is None else alpha, target_modules=sorted(found),
                          task_type="CAUSAL_LM",
                          rank_pattern={module: rank for module, rank in ranks.items() if rank != r},
                          alpha_pattern={} if alpha is not None else
                          {module: rank for module, rank in ranks.items() if rank != r})
    values = {}
    for module, pair in found.items():
        values[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(pair["down"])
        values[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(pair["up"])

    def write(place):
        write_safetensors(os.fspath(place / store.WEIGHTS_FILE), {key: one.shape for key, one in values.items()},
                          values.__getitem__)
        (place / store.CONFIG_FILE).write_text(store.config_text(settings.to_peft()), encoding="utf-8")

    store.write_folder(folder, write)
    return settings


def from_peft(folder: str | Path, config: DecoderConfig, layout: Layout | str,
              naming: str = "mindpet") -> tuple[dict[str, np.ndarray], dict]:
    """mindformers' LoRA tensors from a PEFT folder.

    Args:
        folder: a folder in PEFT's format; config: DecoderConfig; layout: Layout or its name.
        naming: "mindpet" (legacy models) or "mcore".

    Returns:
        (tensors {name: float32 array}, {"lora_rank", "lora_alpha"} for mindformers' pet_config). mindformers has one
        rank and one alpha for all modules: lower ranks are padded with zeros, and where the scales differ they are
        multiplied into the up factors.

    Raises:
        AdapterError: the folder is no LoRA adapter, or a module has no name in mindformers.
    """
    if naming not in ("mindpet", "mcore"):
        raise AdapterError(f"naming is {naming!r}, expected 'mindpet' or 'mcore'")
    settings = LoraConfig.from_peft(store.read_config(folder))
    file = SafetensorsFile(store.regular_file(os.path.join(folder, store.WEIGHTS_FILE)))
    plain = {name.removeprefix(PREFIX): file.read(own) for name, own in plain_names(list(file.entries))[0].items()}
    _, pairs = read_pairs(plain)
    extra = [name for name in plain if not _PATTERNS["mcore"].fullmatch(name)]
    if extra:
        raise AdapterError(f"{', '.join(extra[:5])} cannot be said in mindformers' LoRA, which has low-rank pairs only")
    modules = {module: Module("linear", pair["down"].shape[1], pair["up"].shape[0]) for module, pair in pairs.items()}
    targets = matching.plan(settings, modules).targets
    names, ready, waiting, unknown = Names(layout), {}, {}, []
    scales = {targets[module].scaling for module in pairs}
    for module, pair in pairs.items():
        up = pair["up"] if len(scales) == 1 else pair["up"] * np.float32(targets[module].scaling)
        fused = names.fused_part(module)
        if fused:
            waiting.setdefault(fused, {})[module.split(".", 3)[3]] = (pair["down"], up)
            continue
        theirs = names.to_mindformers(module)
        if theirs:
            ready[theirs] = (pair["down"], up)
        else:
            unknown.append(module)
    if unknown:
        raise AdapterError(f"{', '.join(unknown[:5])} have no name in mindformers")
    for (layer, kind), have in waiting.items():
        ready[names.fused_name(layer, kind)] = _side_by_side(have, config, kind, names.order(config, kind))
    rank = max(len(down) for down, _ in ready.values())
    tensors = {}
    for module, (down, up) in ready.items():
        down = np.pad(down, ((0, rank - len(down)), (0, 0)))
        up = np.pad(up, ((0, 0), (0, rank - up.shape[1])))
        first, second = (".lora_A.weight", ".lora_B.weight") if naming == "mcore" else \
            (".mindpet_delta_lora_a", ".mindpet_delta_lora_b")
        tensors[module + first], tensors[module + second] = down, up
    scale = scales.pop() if len(scales) == 1 else 1.0
    return tensors, {"lora_rank": rank, "lora_alpha": scale * rank}


def _side_by_side(have: Any, config: DecoderConfig, kind: str, order: Any) -> tuple[np.ndarray, np.ndarray]:
    """One pair (r, in), (out, r) for a fused linear from the pairs of its parts; parts without one stay zero."""
    total = sum(len(down) for down, _ in have.values())
    up = np.zeros((sum(part_sizes(config, kind)), total), np.float32)
    row = column = 0
    downs = []
    for part, size in zip(parts(kind), part_sizes(config, kind)):
        if part in have:
            down, own = have[part]
            up[row:row + size, column:column + len(down)] = own
            column += len(down)
            downs.append(down)
        row += size
    return np.concatenate(downs), up[order]
