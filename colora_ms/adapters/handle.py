"""``Adapters``: the handle of a model's adapters. It keeps names and configs; what a graph sees are tensors only."""

import copy
import os
from typing import Any, Iterable, Optional, Union

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from colora_ms.adapters import tree
from colora_ms.adapters.combine import combine
from colora_ms.adapters.fitting import check_fits, stage
from colora_ms.adapters.matching import Matched, Module, places_of
from colora_ms.adapters.merging import mergeable_places, not_finite
from colora_ms.adapters.peft_format import StoredAdapter
from colora_ms.adapters.registry import match, value_shapes
from colora_ms.adapters.saving import save_adapter
from colora_ms.adapters.slot_table import SlotTable
from colora_ms.adapters.starting import ChangedBase, check_start, first_values
from colora_ms.adapters.store import check_name
from colora_ms.errors import AdapterError
from colora_ms.models.replacing import replace_cells

#: Attribute of a model that holds its handle.
HANDLE = "colora_adapters"

#: Name that stands for the base model in a list of the rows' adapters (as in PEFT).
BASE = "__base__"


class Adapters:
    """The adapters of one model; made by :func:`colora_ms.adapters.inject` or ``load_adapter``.

    Attributes:
        net: the model; capacity: slots that it has; trainable: whether the adapters' Parameters require gradients.
        sites: {(module name, "lora", "saved" or "tokens"): adapter Cell}; peft_type: the method that the Cells are of.
        cells: {module name: Cell} of the model before injection; modules: what is known of them; defaults: the modules
            that a config without target_modules means.
        slot_table: :class:`colora_ms.adapters.slot_table.SlotTable`, what each slot holds, a bank's slots too.
        active_slot: () int32 Parameter, the adapter of the Cells that take no row slots, -1 = none.
        frozen: [(Parameter of the model before injection, its requires_grad then)].
    """

    def __init__(self, net: nn.Cell, modules: dict[str, Module], defaults: Optional[list], capacity: int,
                 trainable: bool, seed: Optional[int], base_model: Optional[str]) -> None:
        self.net, self.modules = net, modules
        self.capacity, self.trainable = capacity, trainable
        self.base_model = base_model
        self.dropout = 0.0
        self.peft_type = "LORA"
        self.sites = {}
        self.active_slot = Parameter(Tensor(-1, ms.int32), name="adapters.active_slot", requires_grad=False)
        self.defaults = defaults
        self._seed = seed
        self.cells = tree.cells_by_name(net)
        self.frozen = [(parameter, parameter.requires_grad) for parameter in net.get_parameters()]
        self.slot_table = SlotTable(capacity)
        self._entries = {}  # name -> (config, matched)
        self._active: Optional[str] = None
        self._enabled = True
        self._merged: Optional[str] = None
        self._changed: Optional[ChangedBase] = None

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of their slots."""
        return self.slot_table.names

    @property
    def active(self) -> Optional[str]:
        """Name of the active adapter, or None (no adapter, or disabled)."""
        return self._active if self._enabled else None

    @property
    def merged(self) -> Optional[str]:
        """Name of the adapter that is merged into the base weights, or None."""
        return self._merged

    @property
    def changed_base(self) -> Optional[str]:
        """Name of the adapter that started from the base weights and changed them (PiSSA, OLoRA), or None."""
        return self._changed.name if self._changed else None

    @property
    def seed(self) -> int:
        """Seed of new adapters' initial values and of the masks of dropout."""
        return self._seed if self._seed is not None else ms.get_seed() or 0

    @property
    def free_slots(self) -> int:
        """How many more adapters fit."""
        return len(self.slot_table.free)

    def slot(self, name: str) -> int:
        """Slot number of an adapter."""
        return self.slot_table.number(name)

    def config(self, name: Optional[str] = None) -> Any:
        """LoraConfig of an adapter, by default the active one."""
        return self._entry(self._default(name))[1]

    def matched(self, name: Optional[str] = None) -> Matched:
        """What an adapter changes in the model: :class:`colora_ms.adapters.matching.Matched`."""
        return self._entry(self._default(name))[2]

    def slots(self, rows: int, name: Union[str, list, tuple, None] = None) -> Tensor:
        """The slot of each row, as the decoder takes it.

        Args:
            rows: number of rows.
            name: an adapter for all rows, a list with a name for each row ("__base__" or None: the base model), or None
                for the active adapter.

        Returns:
            (rows,) int32 Tensor; -1 where no adapter is to be added (none, disabled, or merged into the weights).
        """
        if isinstance(name, (list, tuple)):
            if len(name) != rows:
                raise AdapterError(f"{len(name)} adapter names for {rows} rows; give one for each row")
            return Tensor(np.array([self._row_slot(one) for one in name], np.int32))
        one = self.active if name is None else name
        return Tensor(np.full(rows, self._row_slot(self._merged if one is None else one), np.int32))

    def trainable_params(self, name: Optional[str] = None) -> list[Parameter]:
        """The Parameters that training an adapter (by default the active one) changes, in the order of the model.

        With more than one slot these are stacked Parameters, of which the other adapters' slots get zero gradients;
        weight decay would still shrink those, so train with ``slots=1``.
        """
        if not self.trainable:
            raise AdapterError("these adapters were loaded for inference; use trainable=True to train them")
        name = self._default(name)
        self._check_not_merged("train")
        slot, _, matched = self._entry(name)
        wanted = set(places_of(matched))
        found = [parameter for place, cell in self.sites.items() if place in wanted
                 for parameter in cell.parameters_of(slot)]
        return list({id(parameter): parameter for parameter in found}.values())

    # -- adding, choosing, removing -----------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: Any) -> None:
        """Start a new adapter in a free slot, with the config's initial values.

        Raises:
            AdapterError: the name is taken or not allowed, no slot is free, or the config does not fit the Cells that
                ``inject`` made; nothing is changed.
        """
        self._check_new_name(name)
        matched = match(config, self.modules, self.defaults)
        check_start(self, config, matched)
        check_fits(self, config, matched)
        values, changes = first_values(self, config, matched)
        if changes:
            self._changed = ChangedBase(self, name, changes, values)
        self.publish(name, config, matched, values)

    def add_weighted_adapter(self, names: Iterable[str], weights: Iterable[float], new_name: str,
                             combination_type: str = "svd", svd_rank: Optional[int] = None,
                             svd_clamp: Optional[float] = None, density: Optional[float] = None,
                             majority_sign_method: str = "total", seed: int = 0) -> None:
        """Combine adapters into a new one in a free slot; see :mod:`colora_ms.adapters.combine` for the ways to do it.

        Args:
            new_name: of the new adapter; its scaling is 1.
            The others as for :func:`colora_ms.adapters.combine.combine`.

        Raises:
            AdapterError: all that is wrong with the arguments, or the new adapter does not fit the Cells (``cat`` needs
                ``max_rank`` as large as the sum of the ranks); nothing is changed.
        """
        self._check_new_name(new_name)
        config, matched, values = combine(self, names, weights, combination_type, svd_rank, svd_clamp, density,
                                       majority_sign_method, seed)
        check_fits(self, config, matched)
        self.publish(new_name, config, matched, values)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; its slot is free afterwards, and base weights that its start changed are restored."""
        slot = self.slot(name)
        self._check_not_merged("delete an adapter")
        if self.changed_base == name:
            self._restore_base()
        del self._entries[name]
        if self._active == name:
            self._active = None
        self._show_active()
        for cell in self.sites.values():
            cell.clear(slot)
        self.slot_table.drop(name)

    def set_adapter(self, name: str) -> None:
        """Make an adapter the active one (and enable adapters again)."""
        self._entry(name)
        if self._merged not in (None, name):
            self._check_not_merged("change the adapter")
        self._active, self._enabled = name, True
        self._show_active()

    def disable_adapter(self) -> '_Disabled':
        """Use the base model alone, until ``enable_adapter()``, or as a context manager until its end."""
        self._check_not_merged("disable it")
        self._check_base_unchanged("use the base model")
        before, self._enabled = self._enabled, False
        self._show_active()
        return _Disabled(self, before)

    def enable_adapter(self) -> None:
        """Use the active adapter again."""
        self._enabled = True
        self._show_active()

    def unload(self) -> None:
        """Take all adapter Cells out of the model; a merged adapter stays in its weights. The handle ends with it."""
        self.slot_table.check_unleased("unload the adapters")
        if self._merged is None:
            self._restore_base()
        for cell in self.sites.values():
            cell.release()
        replace_cells(self.net, {path: self.cells[path] for path, _ in self.sites})
        for parameter, flag in self.frozen:
            parameter.requires_grad = flag
        self.sites, self._entries, self._active = {}, {}, None
        self.slot_table.clear()
        object.__setattr__(self.net, HANDLE, None)

    # -- merging ------------------------------------------------------------------------------------------------------

    def merge(self, name: Optional[str] = None, safe_merge: bool = False) -> None:
        """Add an adapter to the base weights: in float32, rounded once to the weights' dtype.

        Args:
            name: by default the active adapter.
            safe_merge: refuse, and put all back, if a merged weight is not finite.

        Raises:
            AdapterError: another adapter is merged, a base weight is an integer format or tied to another module, or
                (safe_merge) a value is not finite; the weights are as before.
        """
        name = self._default(name)
        slot, config, matched = self._entry(name)
        self._check_not_merged("merge another")
        self.slot_table.check_unleased("merge an adapter")
        places = mergeable_places(self, name, slot, config, matched)
        for place in places:
            self.sites[place].merge(slot)
        self._merged = name
        self._active, self._enabled = name, True
        self._show_active()
        if safe_merge:
            bad = not_finite(self.cells, places)
            if bad:
                self.unmerge()
                raise AdapterError(f"merging adapter {name!r} gives values that are not finite in {len(bad)} modules, "
                                   f"{bad[0]!r} first; the weights are as before")

    def unmerge(self) -> None:
        """Restore the base weights from the kept copies, bit for bit."""
        if self._merged is None:
            raise AdapterError("no adapter is merged")
        for cell in self.sites.values():
            cell.unmerge()
        self._merged = None
        self._show_active()

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: Union[str, os.PathLike], name: Optional[str] = None, layout: Optional[str] = None,
             as_lora: bool = False) -> None:
        """Write an adapter (by default the active one) as a PEFT folder, whole or not at all.

        Args:
            folder: becomes the adapter's folder itself; replaced if it is there, its other files are kept.
            layout: "peft" writes tensors that modules share once for each of them, as PEFT does; None writes them once.
            as_lora: write an adapter that started from the base weights (PiSSA, OLoRA) as plain LoRA of twice the rank,
                which loads on the untouched base like any other. Other adapters are written as always.

        Raises:
            AdapterError: a value is not finite, or the folder cannot be written.
        """
        _, config, matched = self._entry(self._default(name))
        save_adapter(folder, self, config, matched, self.values(name), self._changed, layout, as_lora)

    def values(self, name: Optional[str] = None) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """{(module name, role): {field: float32 array}} of an adapter, by default the active one."""
        slot, config, matched = self._entry(self._default(name))
        return {place: self.sites[place].read(slot, shapes)
                for place, shapes in value_shapes(config, matched, self.modules).items()}

    def load(self, folder: Union[str, os.PathLike], name: str, replace: bool = False) -> None:
        """Load a PEFT folder into a free slot (or, with ``replace``, into the slot of the adapter of that name).

        The folder is read and checked in full before anything changes.

        Raises:
            AdapterError: all that is wrong with it, or no slot is free, or the name is taken; nothing is changed.
        """
        check_name(name)
        if not (replace and name in self._entries):
            self._check_new_name(name)
        else:
            self._check_not_merged("replace one")
        stored = StoredAdapter(folder)
        matched, values = stage(self, stored)
        check_fits(self, stored.config, matched)
        self.publish(name, stored.config, matched, values)

    def publish(self, name: str, config: Any, matched: Matched,
                values: dict[tuple[str, str], dict[str, np.ndarray]]) -> None:
        """Put checked values into a slot and give them a name; cannot fail any more."""
        self._write(self.slot_table.take(name), matched, values)
        self._entries[name] = (copy.deepcopy(config), matched)

    def write_slot(self, slot: int, matched: Matched, values: dict[tuple[str, str], dict[str, np.ndarray]]) -> None:
        """Put checked values into a slot that ``slot_table.place`` gave away and nobody leases yet.

        Raises:
            AdapterError: the slot is free, has a name, or is leased.
        """
        self.slot_table.check_placed(slot)
        self._write(slot, matched, values)

    def _write(self, slot: int, matched: Matched, values: dict) -> None:
        for (path, role), cell in self.sites.items():
            target = matched.targets.get(path)
            own = values.get((path, role), {})
            if role == "tokens" and own:
                own = {**own, "ids": matched.tokens[path]}
            cell.write(slot, own, target.scaling if target else 0.0)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_new_name(self, name: str) -> None:
        check_name(name)
        if name in self._entries:
            raise AdapterError(f"there is an adapter {name!r} already; delete it first, or choose another name")
        self._check_not_merged("add one")
        self._check_base_unchanged("add another")
        self.slot_table.check_free()

    def _check_base_unchanged(self, what: str) -> None:
        if self._changed:
            raise AdapterError(f"adapter {self._changed.name!r} started from the base weights and changed them, so "
                               f"that you cannot {what} now; save it with as_lora=True and load that into an untouched "
                               "model")

    def _check_not_merged(self, what: str) -> None:
        if self._merged is not None:
            raise AdapterError(f"adapter {self._merged!r} is merged into the base weights; call unmerge() before you "
                               f"{what}")

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> tuple:
        return (self.slot_table.number(name), *self._entries[name])

    def _default(self, name: Optional[str]) -> str:
        name = self._active if name is None else name
        if name is None:
            raise AdapterError("no adapter is active; name one")
        return name

    def _row_slot(self, name: Optional[str]) -> int:
        if name is None or name == BASE:
            self._check_not_merged("use the base model")
            self._check_base_unchanged("use the base model")
            return -1
        slot = self.slot(name)
        if self._merged is not None:
            if name != self._merged:
                self._check_not_merged("use another")
            return -1
        return slot

    def _restore_base(self) -> None:
        if self._changed:
            self._changed.undo()
        self._changed = None

    def _show_active(self) -> None:
        slot = -1 if self.active is None or self._merged is not None else self.slot(self.active)
        self.active_slot.set_data(Tensor(slot, ms.int32))


class _Disabled:
    """What ``disable_adapter`` returns: at the end of a with-block the former state comes back."""

    def __init__(self, handle: Adapters, before: bool) -> None:
        self.handle, self.before = handle, before

    def __enter__(self) -> Adapters:
        return self.handle

    def __exit__(self, *reason: Any) -> None:
        if self.before:
            self.handle.enable_adapter()
