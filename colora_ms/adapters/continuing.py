"""Training that starts from an adapter (a recipe's ``adapter.start_from``): its config and values come from the
folder."""

import os
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Optional, Union

from mindspore import nn

from colora_ms.adapters import tree
from colora_ms.adapters.fused_writing import names_fused
from colora_ms.adapters.inject import load_adapter, modules_of
from colora_ms.adapters.patterns import ORDERED
from colora_ms.adapters.peft_format import StoredAdapter
from colora_ms.adapters.registry import match
from colora_ms.errors import AdapterError, near

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters

#: Settings that choose modules; two notations of the same choice agree.
_CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def config_of(folder: Union[str, os.PathLike]) -> Any:
    """The config of an adapter folder, whose tensors are not read.

    Raises:
        AdapterError: it is no adapter folder, or its config cannot be used.
    """
    stored = StoredAdapter(folder)
    stored.refuse(stored.problems)
    return stored.config


def disagreements(given: dict[str, Any], config: Any, folder: Union[str, os.PathLike]) -> list[str]:
    """What settings beside ``start_from`` say otherwise than the adapter does; those that choose modules in another
    notation are left to :func:`continue_adapter`, which knows the model.

    Args:
        given: {name: value} of the recipe, without ``method`` and ``start_from``.
        config: the adapter's config; folder: for the messages.

    Returns:
        list of sentences.

    Raises:
        AdapterError: a value cannot be used at all.
    """
    known = [one.name for one in fields(config)]
    unknown = [name for name in given if name not in known]
    if unknown:
        return [f"section adapter has no setting {name!r}; beside start_from it may have method, {', '.join(known)}."
                f"{near(name, known)}" for name in unknown]
    asked = replace(config, **given)
    if names_fused(config):  # the recipe may name the parts, which only the model knows
        given = {name: value for name, value in given.items() if name not in (*_CHOOSING, *ORDERED)}
    return [f"{name} is {getattr(asked, name)!r:.80}, but the adapter in {folder} has {getattr(config, name)!r:.80}; "
            "leave it out, it comes from the adapter" for name in given
            if _plain(getattr(asked, name), name) != _plain(getattr(config, name), name)
            and not (name in _CHOOSING and _notation(getattr(asked, name)) != _notation(getattr(config, name)))]


def continue_adapter(net: nn.Cell, folder: Union[str, os.PathLike], given: Optional[dict[str, Any]] = None,
                     name: str = "default", seed: Optional[int] = None, base_model: Optional[str] = None) -> 'Adapters':
    """Load an adapter to go on training it; the model gets its Cells as :func:`colora_ms.adapters.inject` makes them.

    Args:
        net: a model without adapters; folder: the adapter's; given: see :func:`disagreements`.
        name, seed, base_model: as for :func:`colora_ms.adapters.inject`.

    Returns:
        The :class:`colora_ms.adapters.Adapters` handle.

    Raises:
        AdapterError: all that is wrong with the folder, or settings that disagree with it; the model is unchanged.
    """
    if given:
        stored = StoredAdapter(folder)
        if stored.config is None:
            stored.refuse(stored.problems, base_model)
        stored.refuse(stored.problems + stored.fit(net), base_model)
        problems = disagreements(given, stored.config, folder)
        if not problems and any(setting in given for setting in _CHOOSING):
            modules, defaults = modules_of(net), tree.default_targets(net)
            own, asked = (match(one, modules, defaults).targets
                          for one in (stored.config, replace(stored.config, **given)))
            if list(own) != list(asked):
                odd = sorted(set(own) ^ set(asked))
                choosing = ", ".join(f"{setting}={given[setting]!r:.60}" for setting in _CHOOSING if setting in given)
                problems.append(f"{choosing} means other modules than the adapter in {folder} has: {odd[0]} and "
                                f"{len(odd) - 1} more differ; leave it out, it comes from the adapter")
        if problems:
            raise AdapterError("; ".join(problems))
    return load_adapter(net, folder, name, trainable=True, base_model=base_model, seed=seed)


def _plain(value, name):
    """A value as it is compared: lists of names in any order, patterns in theirs."""
    if name in ORDERED:
        return list(value.items())
    return sorted(value, key=str) if isinstance(value, list) else value


def _notation(value):
    return type(value).__name__
