"""Putting adapters into a model: ``inject`` replaces Cells in place, ``load_adapter`` does it from a folder."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

import mindspore as ms
from mindspore import nn

from colora_ms.adapters import tree, vocabulary
from colora_ms.adapters.cells import AdapterCell
from colora_ms.adapters.config import LoraConfig
from colora_ms.adapters.dora import DoraDense, DoraLinear
from colora_ms.adapters.dropout import Dropout
from colora_ms.adapters.fitting import stage
from colora_ms.adapters.foreign import LoraDense, LoraLookup, SavedCell
from colora_ms.adapters.handle import HANDLE, Adapters
from colora_ms.adapters.lora import LoraEmbedding, LoraLinear
from colora_ms.adapters.matching import Matched, Module, widest
from colora_ms.adapters.outside import leaf, load_integrations
from colora_ms.adapters.peft_format import StoredAdapter
from colora_ms.adapters.registry import METHODS, Site, match, method
from colora_ms.adapters.saved import SavedModule
from colora_ms.adapters.starting import check_start
from colora_ms.adapters.store import check_name
from colora_ms.adapters.tokens import TokenEmbedding, TokenHead
from colora_ms.errors import AdapterError, near
from colora_ms.models.replacing import check_names, replace_cells


def inject(net: nn.Cell, config: Any = None, adapter_name: str = "default", slots: int = 1,
           max_rank: Optional[int] = None, reserve: Any = None, trainable: bool = True, seed: Optional[int] = None,
           base_model: Optional[str] = None, adapter_format: str = "float32") -> Adapters:
    """Put adapters into a model, in place. All parameters of the model are frozen and keep their names.

    New Parameters are called as on disk, without the prefix: ``<module>.lora_A`` (slots, r, in), ``<module>.lora_B``
    (slots, out, r), ``<module>.lora_embedding_A`` and ``_B``, ``<module>.lora_bias``, ``<module>.saved_<slot>.weight``.

    Args:
        net: a :class:`colora_ms.models.decoder.Decoder`, or any Cell tree with ``nn.Dense``, ``mint.nn.Linear``,
            embedding Cells, or those of mindformers.
        config: LoraConfig (or another method's) of the first adapter, which becomes active; None for an empty bank
            (then give ``reserve``).
        adapter_name: name of that adapter, ``[A-Za-z0-9._-]{1,64}``.
        slots: adapters that the model can hold at a time. A trained adapter needs no more than one.
        max_rank: largest rank of any adapter; by default what ``config`` (or ``reserve``) needs, module by module.
        reserve: modules that later adapters may use beside those of ``config``: a config of its kind (its targets,
            rank, modules_to_save and bias), or just its ``target_modules``. Cells are made now, so that adding an
            adapter later compiles nothing.
        trainable: whether the adapter's Parameters require gradients.
        seed: of the initial values and the masks of dropout; by default ``mindspore.get_seed()``, or 0. Each module has
            its own stream.
        base_model: the base model's name or folder, kept in saved configs and used in messages.
        adapter_format: "float32", or "bfloat16" for adapters that only serve: the pairs of plain linears of the Decoder
            are rounded to nearest and take half the memory, and half the time to read; exact if the adapter was stored
            in bfloat16. All others (embeddings, DoRA, Lily, other libraries' Cells) stay float32.

    Returns:
        :class:`colora_ms.adapters.Adapters`, the handle of everything else.

    Raises:
        AdapterError: the config does not fit the model, or the model has adapters already; the model is unchanged.
    """
    if getattr(net, HANDLE, None) is not None:
        raise AdapterError("this model has adapters already; use add_adapter or load of its handle "
                           "(colora_ms.adapters.adapters_of(net)), or unload() them first")
    if config is None and reserve is None:
        raise AdapterError("inject needs a config, or reserve=... to say which modules later adapters may use")
    if config is not None:
        check_name(adapter_name)
    _check_slots(slots, 1)
    dtype = _pair_dtype(adapter_format, trainable)
    modules, defaults = modules_of(net), tree.default_targets(net)
    matches = [match(config, modules, defaults)] if config is not None else []
    matches += _reserved(reserve, [] if config is None else [config], max_rank, modules, defaults)
    handle = Adapters(net, modules, defaults, slots, trainable, seed, base_model)
    handle.dropout = config.lora_dropout if config is not None else getattr(reserve, "lora_dropout", 0.0)
    if config is not None:
        check_start(handle, config, matches[0])
    first = config if config is not None else reserve
    _replace(net, handle, matches, getattr(first, "peft_type", "LORA"), max_rank, dtype)
    if config is not None:
        handle.add_adapter(adapter_name, config)
        handle.set_adapter(adapter_name)
    return handle


def load_adapter(net: nn.Cell, folder: Union[str, os.PathLike], name: Optional[str] = None, slots: Optional[int] = None,
                 max_rank: Optional[int] = None, reserve: Any = None, trainable: bool = False,
                 base_model: Optional[str] = None, adapter_format: str = "float32",
                 seed: Optional[int] = None) -> Adapters:
    """Load a PEFT adapter folder into a model, which gets its adapter Cells first if it has none.

    Args:
        net: the model; if it has adapters already, the folder's adapter takes a free slot beside them.
        folder: a folder with adapter_config.json and adapter_model.safetensors, or a LoRA of llama.cpp (a GGUF file).
        name: the adapter's name; by default the folder's.
        slots, max_rank, reserve, trainable, base_model, adapter_format, seed: as in :func:`inject`; used if the model
            has no adapters yet.

    Returns:
        The :class:`colora_ms.adapters.Adapters` handle; the adapter is the active one.

    Raises:
        AdapterError: everything that is wrong with the folder, at once; the model is unchanged.
    """
    name = name if name is not None else Path(folder).resolve().name
    handle = load_adapters(net, {name: folder}, slots, max_rank, reserve, trainable, base_model, adapter_format, seed)
    handle.set_adapter(name)
    return handle


def load_adapters(net: nn.Cell, folders: dict[str, Union[str, os.PathLike]], slots: Optional[int] = None,
                  max_rank: Optional[int] = None, reserve: Any = None, trainable: bool = False,
                  base_model: Optional[str] = None, adapter_format: str = "float32",
                  seed: Optional[int] = None) -> Adapters:
    """Load several PEFT adapter folders into a model; its Cells get room for all of them.

    Args:
        folders: {adapter name: folder}.
        slots: adapters that the model can hold; by default as many as there are folders.
        The others as in :func:`load_adapter`.

    Returns:
        The handle; no adapter is active that was not before.

    Raises:
        AdapterError: a folder cannot be loaded; all folders are checked before the model is changed.
    """
    for name in folders:
        check_name(name)
    handle = adapters_of(net)
    if handle is not None:
        for name, folder in folders.items():
            handle.load(folder, name)
        return handle
    slots = max(len(folders), 1) if slots is None else slots
    _check_slots(slots, len(folders))
    dtype = _pair_dtype(adapter_format, trainable)
    modules, defaults = modules_of(net), tree.default_targets(net)
    opened = {name: StoredAdapter(folder) for name, folder in folders.items()}
    growth = _growth(net, modules, opened, base_model)
    handle = Adapters(net, growth.modules if growth else modules, defaults, slots, trainable, seed, base_model)
    # Adapters of the base's own vocabulary are read as such, and get the base's rows of the new tokens.
    plain = Adapters(net, modules, defaults, slots, trainable, seed, base_model) if growth else handle
    loaded = []
    for name, stored in opened.items():
        is_larger = growth is not None and name in growth.names
        matched, values = stage(handle if is_larger else plain, stored)
        loaded.append((name, stored.config, matched, values if is_larger or not growth else growth.widen(values)))
    configs = [config for _, config, _, _ in loaded]
    _check_together(configs, trainable)
    handle.dropout = configs[0].lora_dropout if trainable else 0.0
    matches = [matched for _, _, matched, _ in loaded] + _reserved(reserve, configs, max_rank, modules, defaults)
    if growth:
        check_matches(matches, handle, max_rank)
        growth.apply()
        handle = Adapters(net, growth.modules, defaults, slots, trainable, seed, base_model)
        handle.dropout = configs[0].lora_dropout if trainable else 0.0
    _replace(net, handle, matches, configs[0].peft_type, max_rank, dtype)
    for name, config, matched, values in loaded:
        handle.publish(name, config, matched, values)
    return handle


def adapters_of(net: nn.Cell) -> Optional[Adapters]:
    """The handle of a model's adapters, or None."""
    return getattr(net, HANDLE, None)


def modules_of(net: nn.Cell) -> dict[str, Module]:
    """{name: Module} of a model without adapters."""
    load_integrations(net)
    cells = tree.cells_by_name(net)
    ties = tree.tied_to(cells)
    return {name: dataclasses.replace(tree.module_of(name, cell), tied_to=ties.get(name, ""))
            for name, cell in cells.items()}


def _check_slots(slots, needed):
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise AdapterError(f"slots is {slots!r}, expected a whole number from 1 on")
    if slots < needed:
        raise AdapterError(f"slots is {slots}, but {needed} adapters are to be loaded")


def _check_together(configs, trainable):
    """Refuse adapters that cannot share Cells; configs is not empty."""
    if not configs:
        raise AdapterError("no adapter folder is given")
    kinds = {config.peft_type for config in configs}
    if len(kinds) > 1:
        raise AdapterError(f"adapters of different methods cannot share a model: {', '.join(sorted(kinds))}")
    rates = sorted({config.lora_dropout for config in configs})
    if trainable and len(rates) > 1:
        raise AdapterError(f"adapters with different lora_dropout ({', '.join(map(str, rates))}) cannot be trained in "
                           "one model; load them one at a time")


def _reserved(reserve, configs, max_rank, modules, defaults):
    """What is matched of the modules that later adapters may use, in a list (empty without ``reserve``)."""
    if reserve is None:
        return []
    if not isinstance(reserve, tuple(method_.config for method_ in METHODS.values())):
        ranks = [r for config in configs for r in (config.r, *getattr(config, "rank_pattern", {}).values())]
        rank = max_rank or max(ranks, default=LoraConfig.r)
        if configs and not isinstance(configs[0], LoraConfig):
            reserve = dataclasses.replace(configs[0], target_modules=reserve, r=rank)
        else:
            reserve = LoraConfig(target_modules=reserve, r=rank)
    if configs and reserve.peft_type != configs[0].peft_type:
        raise AdapterError(f"reserve is for {reserve.peft_type} adapters, the adapter is of the method "
                           f"{configs[0].peft_type}; the Cells of a model are of one method")
    return [match(reserve, modules, defaults)]


def _pair_dtype(adapter_format, trainable):
    """The dtype of pairs; AdapterError for a format that is not known, or cannot be trained."""
    formats = {"float32": np.float32, "bfloat16": ms.bfloat16}
    if adapter_format not in formats:
        raise AdapterError(f"adapter_format is {adapter_format!r:.40}, expected one of {', '.join(formats)}."
                           + near(adapter_format, formats))
    if trainable and adapter_format != "float32":
        raise AdapterError(f"adapter_format={adapter_format!r} is for adapters that only serve; train in float32, or "
                           "give trainable=False")
    return formats[adapter_format]


def _replace(net, handle, matches, peft_type, max_rank, dtype):
    """Freeze the model and put the adapter Cells of all matches into it; checks come before the first change."""
    check_matches(matches, handle, max_rank)
    cells = tree.cells_by_name(net)
    wrap, shared, made = method(peft_type).wrap, {}, {}
    handle.peft_type = peft_type
    for parameter in net.get_parameters():
        parameter.requires_grad = False
    for path, module in handle.modules.items():
        targets = [matched.targets[path] for matched in matches if path in matched.targets]
        target = widest(targets)
        rank = target.r if target else 0
        bias = any(path in matched.biases for matched in matches)
        cell = cells[path]
        if rank or bias:
            rank = max_rank if rank and max_rank else rank
            site = Site(handle.capacity, rank, handle.dropout, bias, handle.trainable, handle.active_slot, target,
                        shared, handle.seed, dtype)
            cell = handle.sites[path, "lora"] = wrap(cell, path, site)
        if any(path in matched.saved for matched in matches):
            cell = handle.sites[path, "saved"] = _wrap_saved(cell, path, module, handle, matches)
        count = max((len(matched.tokens[path]) for matched in matches if path in matched.tokens), default=0)
        if count:
            cell = handle.sites[path, "tokens"] = _wrap_tokens(cell, path, module, handle, matches, count)
        if cell is not cells[path]:
            made[path] = cell
    replace_cells(net, made)
    object.__setattr__(net, HANDLE, handle)


def check_matches(matches: list[Matched], handle: Adapters, max_rank: Optional[int]) -> None:
    """Refuse matches that cannot become Cells of the model; changes nothing."""
    needed = max((target.r for matched in matches for target in matched.targets.values()), default=0)
    if max_rank is not None and (not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < needed):
        raise AdapterError(f"max_rank is {max_rank!r}, but an adapter here has rank {needed}")
    check_plain(matches, handle.cells)
    _check_tokens(matches, handle.cells)
    if handle.trainable:
        _check_ties(matches)
    check_names(handle.net)


def check_plain(matches: list[Matched], cells: dict[str, nn.Cell]) -> None:
    """Refuse DoRA and a bias on lora_B on linears that are not plain ones (decomposed, or of other libraries)."""
    odd = [path for matched in matches for path, target in matched.targets.items()
           if (getattr(target, "dora", False) or getattr(target, "up_bias", False)) and not leaf(cells[path]).plain]
    if odd:
        raise AdapterError(f"use_dora and lora_bias are for plain linears; {odd[0]} is a "
                           f"{type(cells[odd[0]]).__name__} ({len(odd)} such modules)")


def wrap_lora(cell: nn.Cell, path: str, site: Site) -> nn.Cell:
    """The LoRA Cell for a base Cell (``Method.wrap``); see :class:`colora_ms.adapters.registry.Site`."""
    face = leaf(cell)
    if face.kind == "embedding":
        if face.takes_rows:
            return LoraEmbedding(cell, path, site.slots, site.max_rank, site.trainable)
        return LoraLookup(cell, path, site.active_slot, site.slots, site.max_rank, site.trainable)
    dropout = Dropout(site.dropout, site.seed, path) if site.dropout and site.max_rank else None
    rest = (site.slots, site.max_rank, dropout, site.bias, site.trainable)
    dora, up_bias = (site.target.dora, site.target.up_bias) if site.target else (False, False)
    if face.takes_rows:
        if dora:
            return DoraLinear(cell, path, *rest, up_bias)
        return LoraLinear(cell, path, *rest, up_bias, site.dtype)
    kind = face.adapted(DoraDense if dora else LoraDense)
    return kind(cell, path, site.active_slot, *rest, up_bias)


def _growth(net, modules, opened, base_model):
    """The :class:`colora_ms.adapters.vocabulary.Growth` that adapters with more tokens than the model need, or None.

    Args:
        opened: {adapter name: StoredAdapter}, whose configs get the tables that PEFT stored without being asked.
    """
    needs = {}
    for name, stored in opened.items():
        if stored.config is None:
            continue  # staging says what is wrong with it
        try:
            found = vocabulary.larger(stored, modules)
            if found is not None:
                needs[name] = (stored, found)
        except AdapterError as error:
            stored.refuse(stored.problems + [str(error)], base_model)
    if not needs:
        return None
    growth = vocabulary.Growth(net, modules, needs)
    for stored, found in needs.values():
        vocabulary.adopt(stored, found)
        vocabulary.warn_of_gaps(found, stored, warnings.warn)
    return growth


def _check_tokens(matches, cells):
    """Refuse rows of single tokens on Cells that are not the decoder's own."""
    odd = [path for matched in matches for path in matched.tokens
           if not (leaf(cells[path]).takes_rows and leaf(cells[path]).plain)]
    if odd:
        raise AdapterError("trainable_token_indices is for the embedding and the head of colora_ms's decoder; "
                           f"{odd[0]} is a {type(cells[odd[0]]).__name__}")


def _check_ties(matches):
    """Refuse to train adapters together of which one ties a head to its embedding's copy and another does not."""
    for role in ("saved", "tokens"):
        for path in {path for matched in matches for path in getattr(matched, role)}:
            if len({matched.ties.get(path) for matched in matches if path in getattr(matched, role)}) > 1:
                raise AdapterError(f"{path} is tied in some of these adapters and not in others, so that they cannot "
                                   "be trained in one model; load them one at a time")


def _source_of(path, role, handle, matches):
    """The Cell whose Parameters a tied one shares: in training, where both must stay equal; otherwise None, each slot
    has values of its own, and adapters that are tied and others can be mixed."""
    ties = {matched.ties[path] for matched in matches if path in matched.ties and path in getattr(matched, role)}
    return handle.sites[ties.pop(), role] if handle.trainable and ties else None


def _wrap_saved(cell, path, module, handle, matches):
    inner = cell.base_layer if isinstance(cell, AdapterCell) else cell
    source = _source_of(path, "saved", handle, matches)
    if leaf(inner).takes_rows:
        return SavedModule(cell, path, handle.capacity, module.parameters, handle.trainable, source)
    if source is not None:
        raise AdapterError(f"ensure_weight_tying is for colora_ms's decoder; {path} is a {type(inner).__name__}")
    return SavedCell(cell, path, handle.active_slot, handle.capacity, handle.trainable)


def _wrap_tokens(cell, path, module, handle, matches, count):
    kind = TokenEmbedding if module.kind == "embedding" else TokenHead
    return kind(cell, path, handle.capacity, count, module.parameters["weight"], handle.trainable,
                _source_of(path, "tokens", handle, matches))
