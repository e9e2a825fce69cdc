"""A Lily adapter in other forms: PEFT's layout of it, and a plain LoRA for static router weights."""

import dataclasses
import os
from typing import TYPE_CHECKING, Optional, Union

from colora_ms.adapters import matching
from colora_ms.adapters.config import LoraConfig
from colora_ms.adapters.lily_config import LilyConfig
from colora_ms.adapters.lily_matching import match, why_not_merge
from colora_ms.adapters.matching import LoraTarget, Matched, Module
from colora_ms.adapters.peft_format import write_adapter
from colora_ms.errors import AdapterError

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters


def peft_config(config: LilyConfig, matched: Matched, modules: dict[str, Module]) -> LilyConfig:
    """The config with which PEFT shares, and computes, what this adapter does.

    PEFT always pools over the batch: an adapter trained with "token" or "sequence" gives other logits there than here,
    except for a single token or row.

    Args:
        config: LilyConfig; matched: its Matched on the model; modules: {name: Module}.

    Raises:
        AdapterError: PEFT's format has no words for it.
    """
    if config.router_pool == "static":
        raise AdapterError("a Lily adapter with router_pool=\"static\" cannot be written in PEFT's Lily layout, which "
                           "has no router without input; write it as LoRA with colora_ms.adapters.export_lora")
    if config.router_form == "paper" and config.router_pool != "token":
        raise AdapterError("router_form=\"paper\" cannot be written in PEFT's layout: PEFT averages after the softmax")
    if config.share == "entry":
        return config
    short = sorted({name.rsplit(".", 1)[-1] for name in matched.targets})
    for names in (short, list(matched.targets)):
        twin = dataclasses.replace(config, target_modules=names, share="entry")
        try:
            found = match(twin, modules).targets
        except AdapterError:
            continue
        if {name: (one.down_owner, one.up_owner) for name, one in found.items()} == \
                {name: (one.down_owner, one.up_owner) for name, one in matched.targets.items()}:
            return twin
    raise AdapterError("PEFT's layout cannot say which modules share here: its entries of target_modules would have to "
                       f"match exactly the {len(matched.targets)} adapted modules by the last part of their names "
                       f"({', '.join(short)}); "
                       "adapt all modules of a type, or choose among them with layers_to_transform")


def export_lora(handle: 'Adapters', folder: Union[str, os.PathLike], name: Optional[str] = None) -> None:
    """Write a Lily adapter with static router weights as a plain LoRA folder, which any reader of PEFT's format serves.

    The factors are A and the experts in the router's proportions; shared tensors are written out for each module.

    Args:
        handle: :class:`colora_ms.adapters.Adapters`; folder: created or replaced; name: by default the active adapter.

    Raises:
        AdapterError: the router depends on the input, the adapter is no Lily, or the folder cannot be written.
    """
    config, matched = handle.config(name), handle.matched(name)
    slot = handle.slot(name if name is not None else handle.active)
    if config.peft_type != "LILY":
        raise AdapterError(f"this adapter is of the method {config.peft_type}; export_lora is for Lily adapters")
    reason = why_not_merge(config)
    if reason:
        raise AdapterError(f"the adapter cannot be written as LoRA: {reason}")
    values = handle.values(name)
    targets = {}
    for path, target in matched.targets.items():
        cell = handle.sites[path, "lora"]
        module = handle.modules[path]
        down = cell.read(slot, {"down": (target.r, module.in_features)})["down"]
        values[path, "lora"] = {"down": down, "up": cell.mixed_up(slot)[:, :target.r]}
        # scaling = lora_alpha / r in LoRA, and the plain factor in Lily.
        targets[path] = LoraTarget(path, "linear", target.r, config.scaling * target.r, config.scaling)
    lora = LoraConfig(
        r=config.r, lora_alpha=config.scaling * config.r, target_modules=_names(config, matched),
        exclude_modules=config.exclude_modules, modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform, layers_pattern=config.layers_pattern,
        task_type=config.task_type, base_model_name_or_path=config.base_model_name_or_path, revision=config.revision)
    as_lora = Matched(targets, matched.saved, matched.biases)
    assert list(matching.match(lora, handle.modules).targets) == list(targets)
    write_adapter(folder, lora, as_lora, handle.modules, values, model=getattr(handle.net, "config", None))


def _names(config, matched):
    """target_modules as LoRA takes it; None has no meaning in a file."""
    return config.target_modules if config.target_modules is not None else sorted(
        {name.rsplit(".", 1)[-1] for name in matched.targets})
