"""Adapters of linears that a family's folders keep as one, written as PEFT has them there (``qkv_proj``,
``gate_up_proj``): the reverse of :mod:`colora_ms.adapters.fused_linears`.

Parts with one lora_A have their rows of lora_B below each other. Otherwise the file has the lora_A below each other
and lora_B block-diagonal, of the sum of the ranks, with zeros for parts without an adapter; ``rank_pattern`` and
``alpha_pattern`` then name the parts as well, which PEFT passes over and which tells a reader where the blocks are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

from colora_ms.adapters.key_names import PREFIX
from colora_ms.adapters.matching import Matched, Module, Target, shortest_names
from colora_ms.errors import AdapterError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import FAMILIES, family
from colora_ms.models.family_tensors import part_rows

_LAYER = re.compile(r"model\.layers\.\d+\.")


def whole_of(name: str, model: Any) -> str:
    """The fused linear, as folders of the model's family have it, of which a module is a part; "" for any other."""
    fused = family(model.model_type).fused if isinstance(model, DecoderConfig) else {}
    layer = _LAYER.match(name)
    rest = name[layer.end():] if layer else ""
    return next((name[:len(name) - len(rest)] + whole for whole, parts in fused.items() if rest in parts), "")


def fused_groups(matched: Matched, model: Any) -> dict[str, dict[str, Target]]:
    """{fused linear: {module: Target} of its parts that have a pair}, of an adapter on a model with this config."""
    groups: dict[str, dict[str, Target]] = {}
    for name, target in matched.targets.items():
        whole = whole_of(name, model)
        if whole:
            groups.setdefault(whole, {})[name] = target
    return groups


def names_fused(config: Any) -> bool:
    """Whether a config's ``target_modules`` lists linears that some family's folders keep as one."""
    wholes = {whole.rpartition(".")[2] for record in FAMILIES.values() for whole in record.fused}
    targets = config.target_modules
    return isinstance(targets, list) and any(name.rpartition(".")[2] in wholes for name in targets)


def check_fusible(matched: Matched, model: Any) -> None:
    """Refuse adapters for which PEFT has no form, since the model's folders keep some of their linears as one.

    Args:
        matched: what the adapter does; model: the model's config.

    Raises:
        AdapterError: a part is saved whole or its bias trained, or DoRA is on some parts only.
    """
    problems = []
    for names, what, setting in ((matched.saved, "saved whole", "modules_to_save"),
                                 (matched.biases, "trained", "bias")):
        part = next((name for name in names if whole_of(name, model)), None)
        if part is not None:
            problems.append(f"{setting} means {part}, which folders of this family keep in "
                            f"{whole_of(part, model)}, so that it cannot be {what} alone; leave it out of {setting}")
    for whole, present in fused_groups(matched, model).items():
        absent = [part for part in _parts(whole, model) if part not in present]
        if absent and any(getattr(target, "dora", False) for target in present.values()):
            problems.append(f"use_dora is on {', '.join(present)}, but not on {', '.join(absent)}, and folders of this "
                            f"family keep them as one, {whole}; put all of them into target_modules, or leave use_dora "
                            "out")
            break
    if problems:
        raise AdapterError("the adapter cannot be written as PEFT's: " + "; ".join(problems))


def fuse(config: Any, matched: Matched, modules: dict[str, Module], tensors: dict[str, np.ndarray],
         model: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """(config, tensors) of a LoRA with its fused linears put together; the same where there are none.

    Args:
        config, matched, modules: as for :func:`colora_ms.adapters.peft_format.write_adapter`.
        tensors: {name on disk: float32 array}; model: the model's config.

    Raises:
        AdapterError: see :func:`check_fusible`.
    """
    groups = fused_groups(matched, model) if config.peft_type == "LORA" else {}
    if not groups:
        return config, tensors
    check_fusible(matched, model)
    tensors = dict(tensors)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    marks: tuple[dict[str, int], dict[str, float]] = ({}, {})
    blocks: dict[str, set] = {}
    for whole, present in groups.items():
        scale = next((one.scaling for one in present.values() if one.scaling), 0.0)
        downs = [tensors[f"{PREFIX}{name}.lora_A.weight"] for name in present]
        first = next(iter(present.values()))
        shared = len(present) == len(_parts(whole, model)) and all(
            (one.r, one.scaling) == (first.r, scale) and np.array_equal(down, downs[0])
            for one, down in zip(present.values(), downs))
        ranks[whole] = first.r if shared else sum(one.r for one in present.values())
        alphas[whole] = first.alpha if shared else _alpha(config, scale, ranks[whole])
        blocks.setdefault(_kind(whole), set()).add(None if shared else tuple(map(_kind, present)))
        if not shared:
            marks[0].update({name: one.r for name, one in present.items()})
            marks[1].update({name: one.alpha if one.scaling == scale else _alpha(config, scale, one.r)
                             for name, one in present.items()})
        tensors.update(_joined(whole, present, scale, shared, tensors, model))
    for name in (name for present in groups.values() for name in present):
        for key in [key for key in tensors if key.startswith(f"{PREFIX}{name}.")]:
            del tensors[key]
    short = {kind for kind, own in blocks.items() if len(own) == 1}

    def marked(values):
        brief = {name: value for name, value in values.items() if _kind(whole_of(name, model)) in short}
        return {**patterns(brief), **{name: value for name, value in values.items() if name not in brief}}

    others = {name: one for name, one in matched.targets.items() if not whole_of(name, model)}
    on_disk = {whole_of(name, model) or name: module for name, module in modules.items()}
    config = dataclasses.replace(
        config, target_modules=shortest_names([*groups, *others], on_disk), exclude_modules=None,
        layers_to_transform=None, layers_pattern=None,
        rank_pattern={**patterns(ranks, config.r), **marked(marks[0]),
                      **patterns({name: one.r for name, one in others.items()}, config.r)},
        alpha_pattern={**patterns(alphas, config.lora_alpha), **marked(marks[1]),
                       **patterns({name: one.alpha for name, one in others.items()}, config.lora_alpha)})
    return config, tensors


def patterns(values: dict, default: Any = None) -> dict:
    """{module: value} as a ``rank_pattern``: without the layer's name where all layers have the same value, and without
    those that have the default."""
    kinds: dict[str, dict] = {}
    for name, value in values.items():
        kinds.setdefault(_kind(name), {})[name] = value
    found = {}
    for kind, own in kinds.items():
        if len(set(own.values())) > 1:
            found.update(own)
        elif next(iter(own.values())) != default:
            found[kind] = next(iter(own.values()))
    return found


def _kind(name):
    """A module's name without its layer's."""
    return _LAYER.sub("", name, count=1)


def _parts(whole, model):
    """The names of a fused linear's parts, in the order of its rows."""
    layer = _LAYER.match(whole).group()
    return [layer + part for part in family(model.model_type).fused[whole.removeprefix(layer)]]


def _alpha(config, scale, r):
    """The lora_alpha with which rank r has this scale."""
    alpha = scale * (math.sqrt(r) if config.use_rslora else r)
    return int(alpha) if float(alpha).is_integer() else alpha


def _joined(whole, present, scale, shared, tensors, model):
    """{name on disk: array} of a fused linear's tensors."""
    rows = part_rows(model)
    downs, ups, biases, lengths, begin = [], [], [], [], 0
    width = sum(one.r for one in present.values())
    for name in _parts(whole, model):
        out = rows[name.rpartition(".")[2]]
        target, key = present.get(name), f"{PREFIX}{name}"
        if target is None:
            ups.append(np.zeros((out, width), np.float32))
            biases.append(np.zeros(out, np.float32))
            continue
        factor = np.float32(1 if target.scaling == scale else target.scaling / scale)
        up = tensors[f"{key}.lora_B.weight"] * factor
        if not shared:
            block = np.zeros((out, width), np.float32)
            block[:, begin:begin + target.r] = up
            up, begin = block, begin + target.r
        downs.append(tensors[f"{key}.lora_A.weight"])
        ups.append(up)
        if target.up_bias:
            biases.append(tensors[f"{key}.lora_B.bias"] * factor)
        if target.dora:
            lengths.append(tensors[f"{key}.lora_magnitude_vector"])
    own = f"{PREFIX}{whole}"
    found = {f"{own}.lora_A.weight": downs[0] if shared else np.concatenate(downs),
             f"{own}.lora_B.weight": np.concatenate(ups)}
    options = next(iter(present.values()))
    if options.up_bias:
        found[f"{own}.lora_B.bias"] = np.concatenate(biases)
    if options.dora:
        found[f"{own}.lora_magnitude_vector"] = np.concatenate(lengths)
    return found
