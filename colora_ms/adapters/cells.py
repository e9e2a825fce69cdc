"""What all adapter Cells share: the face towards the handle, the stacked low-rank pair, and copies of whole modules."""

from typing import Any, Iterable

import numpy as np

from mindspore import Parameter, Tensor, nn

from colora_ms.adapters.outside import leaf
from colora_ms.adapters.slots import get, put, stacked, to_float32
from colora_ms.kernels import bind
from colora_ms.models.changes import note_whole


class AdapterCell(nn.Cell):
    """A Cell that stands in the place of another one, ``base_layer``, and adds what adapters do to it.

    Subclasses write, read and clear the values of one adapter in a slot, merge them and take them back.

    Attributes:
        base_layer: the Cell that was here before; its parameters keep their names.
        path: its name in the model.
        role: "lora" or "saved".
        fusible: whether ``operands()`` tells all that the Cell computes, so that several can share one kernel call.
    """

    role = "lora"
    fusible = False

    def __init__(self, base_layer: nn.Cell, path: str) -> None:
        super().__init__(auto_prefix=False)
        bind()
        self.base_layer = base_layer
        self.path = path
        self._kept = None

    def write(self, slot: int, values: dict[str, np.ndarray], scaling: float) -> None:
        """Publish an adapter's values ({field: NumPy array}) in a slot; what it does not have here is cleared."""
        raise NotImplementedError

    def read(self, slot: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """{field: NumPy array} of a slot, for the fields in shapes ({field: shape})."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        """Free a slot: its rows get what the base computes."""
        raise NotImplementedError

    def parameters_of(self, slot: int) -> list[Parameter]:
        """The trainable Parameters that hold this slot's values."""
        raise NotImplementedError

    def merge(self, slot: int) -> None:
        """Add a slot's adapter to the base weights, in float32; :meth:`unmerge` restores them to the last bit."""
        raise NotImplementedError

    def why_not_merge(self, slot: int) -> str:
        """Why :meth:`merge` is impossible here, "" if it is possible."""
        return ""

    def problems_with(self, target: Any) -> list[str]:
        """Why an adapter with this Target cannot live in this Cell beside its rank, as a list of sentences."""
        return []

    def release(self) -> None:
        """Undo what this Cell changed in its base, before the base is used alone again."""

    def keep(self, parameters: Iterable[Parameter]) -> None:
        """Copy base Parameters aside before they change."""
        self._kept = [(parameter, parameter.asnumpy().copy()) for parameter in parameters]
        for parameter, _ in self._kept:
            note_whole(parameter)

    def unmerge(self) -> None:
        """Put the kept base weights back, bit for bit."""
        for parameter, value in self._kept or ():
            parameter.set_data(Tensor(value))
            note_whole(parameter)
        self._kept = None


class LowRankCell(AdapterCell):
    """An adapter Cell with a stacked pair ``down``, ``up``, its ``scale``, and perhaps biases for each slot.

    ``values`` in :meth:`write` and :meth:`read` are {"down", "up", "bias", "up_bias"}, whichever there are, in the
    Cell's own orientation: ``bias`` stands in the place of the base's, ``up_bias`` is added to the pair's result before
    scaling (``lora_bias``). A pair of lower rank than ``max_rank`` is padded with zeros.
    """

    max_rank = 0
    has_bias = False
    has_up_bias = False
    has_magnitude = False
    _kept_switches = ()

    def make_pair(self, names: tuple[str, str], down_shape: tuple[int, ...], up_shape: tuple[int, ...], trainable: bool,
                  dtype: Any = np.float32) -> None:
        """Create the stacked pair; ``names`` are the last parts of the Parameters' names, shapes include the slots."""
        self.down = stacked(f"{self.path}.{names[0]}", down_shape, trainable, dtype)
        self.up = stacked(f"{self.path}.{names[1]}", up_shape, trainable, dtype)
        self.scale = stacked(f"{self.path}.lora_scale", down_shape[:1], False)

    def make_bias(self, slots: int, out_features: int, trainable: bool) -> None:
        """Create a bias for each slot, and who owns one."""
        self.bias = stacked(f"{self.path}.lora_bias", (slots, out_features), trainable)
        self.bias_owned = stacked(f"{self.path}.lora_bias_owned", (slots,), False, np.int32)

    def make_up_bias(self, slots: int, out_features: int, trainable: bool) -> None:
        """Create a bias on the pair's result for each slot."""
        self.up_bias = stacked(f"{self.path}.lora_up_bias", (slots, out_features), trainable)

    def problems_with(self, target: Any) -> list[str]:
        """As :class:`AdapterCell` says."""
        found = []
        if target.dora and not self.has_magnitude:
            found.append(f"{self.path} was not prepared for DoRA")
        if target.up_bias and not self.has_up_bias:
            found.append(f"{self.path} was not prepared for a bias on lora_B")
        return found

    def write(self, slot: int, values: dict[str, np.ndarray], scaling: float) -> None:
        """As :class:`AdapterCell` says."""
        if self.max_rank:
            for name in ("down", "up"):
                put(getattr(self, name), slot, values.get(name, np.float32(0)))
            put(self.scale, slot, np.float32(scaling if "down" in values else 0))
        if self.has_bias:
            put(self.bias, slot, values.get("bias", np.float32(0)))
            put(self.bias_owned, slot, "bias" in values)
        if self.has_up_bias:
            put(self.up_bias, slot, values.get("up_bias", np.float32(0)))

    def read(self, slot: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """As :class:`AdapterCell` says."""
        return {name: get(getattr(self, name), slot, shape) for name, shape in shapes.items()}

    def clear(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        if self.max_rank:
            for parameter in (self.down, self.up, self.scale):
                put(parameter, slot, np.float32(0))
        if self.has_bias:
            put(self.bias_owned, slot, 0)
        if self.has_up_bias:
            put(self.up_bias, slot, np.float32(0))

    def parameters_of(self, slot: int) -> list[Parameter]:
        """As :class:`AdapterCell` says."""
        return (([self.down, self.up] if self.max_rank else []) + ([self.bias] if self.has_bias else [])
                + ([self.up_bias] if self.has_up_bias else []))

    def change(self, slot: int) -> np.ndarray:
        """The low-rank product of a slot with its scaling, float32, of the weight's shape."""
        return get(self.scale, slot) * (get(self.up, slot) @ get(self.down, slot))

    def delta(self, slot: int) -> np.ndarray:
        """What a slot adds to the base weight, float32, of the weight's shape."""
        return self.change(slot)

    def merged_weight(self, slot: int) -> np.ndarray:
        """The base weight with a slot's adapter in it, float32."""
        return to_float32(leaf(self.base_layer).leaf_parameters()["weight"]) + self.delta(slot)

    def switches(self, slot: int) -> list[Parameter]:
        """Parameters with an entry a slot that are set to 0 while the slot is merged: its rows get no change twice."""
        return [self.scale]

    def why_not_merge(self, slot: int) -> str:
        """As :class:`AdapterCell` says."""
        adds = self.has_up_bias and np.any(get(self.up_bias, slot)) and get(self.scale, slot) != 0
        if adds and leaf(self.base_layer).leaf_parameters().get("bias") is None:
            return f"it adds a bias (lora_bias) to {self.path}, whose base layer has none to merge it into"
        return ""

    def merge(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        base = leaf(self.base_layer).leaf_parameters()
        own_bias = self.has_bias and get(self.bias_owned, slot) > 0
        up_bias = get(self.scale, slot) * get(self.up_bias, slot) if self.has_up_bias else np.float32(0)
        changed_bias = bool(own_bias or np.any(up_bias))
        self.keep([base["weight"]] * bool(self.max_rank) + [base.get("bias")] * changed_bias)
        if changed_bias:
            start = get(self.bias, slot) if own_bias else to_float32(base["bias"])
            base["bias"].set_data(Tensor(start + up_bias).astype(base["bias"].dtype))
        if self.max_rank:
            base["weight"].set_data(Tensor(self.merged_weight(slot)).astype(base["weight"].dtype))
            self._kept_switches = [(one, slot, get(one, slot)) for one in self.switches(slot)]
            for one in self.switches(slot):
                put(one, slot, 0)

    def unmerge(self) -> None:
        """As :class:`AdapterCell` says."""
        super().unmerge()
        for parameter, slot, value in self._kept_switches:
            put(parameter, slot, value)
        self._kept_switches = ()


class SavedBase(AdapterCell):
    """An adapter Cell with a copy of its base module for each slot; ``owned`` (slots,) says which slots have one."""

    role = "saved"
    kind = "saved"

    @property
    def inner(self) -> nn.Cell:
        """The base module itself, inside a LoRA Cell if there is one."""
        base = self.base_layer
        return base.base_layer if isinstance(base, AdapterCell) else base

    def values_of(self, slot: int) -> dict[str, Parameter]:
        """{field: Parameter} of one slot."""
        return leaf(self.copies[slot]).leaf_parameters()

    def write(self, slot: int, values: dict[str, np.ndarray], scaling: float) -> None:
        """As :class:`AdapterCell` says."""
        self.clear(slot)
        if values:
            for name, parameter in self.values_of(slot).items():
                parameter.set_data(Tensor(np.ascontiguousarray(values[name], np.float32)).astype(parameter.dtype))
            put(self.owned, slot, 1)

    def read(self, slot: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """As :class:`AdapterCell` says."""
        values = self.values_of(slot)
        return {name: to_float32(values[name]) for name in shapes}

    def clear(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        put(self.owned, slot, 0)

    def parameters_of(self, slot: int) -> list[Parameter]:
        """As :class:`AdapterCell` says."""
        return list(self.values_of(slot).values()) if get(self.owned, slot) > 0 else []

    def merge(self, slot: int) -> None:
        """As :class:`AdapterCell` says."""
        if get(self.owned, slot) > 0:
            base = leaf(self.inner).leaf_parameters()
            self.keep(list(base.values()))
            for name, parameter in self.values_of(slot).items():
                base[name].set_data(Tensor(parameter.asnumpy().copy()).astype(base[name].dtype))


class LateActivation:
    """An adapter around a linear of another model, which may end in an activation (``nn.Dense`` does if asked).

    The low-rank product belongs before it: a subclass calls :meth:`take_activation` when it is made, and
    :meth:`activate` where ``late_activation`` is set. It defines ``construct`` itself: ``auto_mixed_precision`` level
    O1 rewrites a Cell with the imports of the file in which ``construct`` stands.
    """

    def take_activation(self) -> None:
        """Switch the base's own activation off, to apply it here."""
        self.late_activation = bool(getattr(self.base_layer, "activation_flag", False))
        if self.late_activation:
            self.activation = self.base_layer.activation
            self.base_layer.activation_flag = False

    def activate(self, y: Tensor) -> Tensor:
        """The base's own activation, for a base that has one."""
        return self.activation(y)

    def release(self) -> None:
        """Undo what this Cell changed in its base, before the base is used alone again."""
        if self.late_activation:
            self.base_layer.activation_flag = True
