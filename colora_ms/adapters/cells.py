"""What all adapter Cells share: the face towards the handle, the stacked low-rank pair, and copies of whole modules."""

import numpy as np

from mindspore import Tensor, nn

from colora_ms.adapters.slots import add_in_float32, get, put, stacked, to_float32
from colora_ms.adapters.tree import leaf_parameters


class AdapterCell(nn.Cell):
    """A Cell that stands in the place of another one, ``base_layer``, and adds what adapters do to it.

    Subclasses write, read and clear the values of one adapter in a slot, merge them and take them back.

    Attributes:
        base_layer: the Cell that was here before; its parameters keep their names.
        path: its name in the model.
        role: "lora" or "saved".
    """

    role = "lora"

    def __init__(self, base_layer, path):
        super().__init__(auto_prefix=False)
        self.base_layer = base_layer
        self.path = path
        self._kept = None

    def write(self, slot, values, scaling):
        """Publish an adapter's values ({field: NumPy array}) in a slot; what it does not have here is cleared."""
        raise NotImplementedError

    def read(self, slot, shapes):
        """{field: NumPy array} of a slot, for the fields in shapes ({field: shape})."""
        raise NotImplementedError

    def clear(self, slot):
        """Free a slot: its rows get what the base computes."""
        raise NotImplementedError

    def parameters_of(self, slot):
        """The trainable Parameters that hold this slot's values."""
        raise NotImplementedError

    def merge(self, slot):
        """Add a slot's adapter to the base weights, in float32; :meth:`unmerge` restores them to the last bit."""
        raise NotImplementedError

    def problems_with(self, target):
        """Why an adapter with this Target cannot live in this Cell beside its rank, as a list of sentences."""
        return []

    def keep(self, parameters):
        """Copy base Parameters aside before they change."""
        self._kept = [(parameter, parameter.asnumpy().copy()) for parameter in parameters]

    def unmerge(self):
        """Put the kept base weights back, bit for bit."""
        for parameter, value in self._kept or ():
            parameter.set_data(Tensor(value))
        self._kept = None


class LowRankCell(AdapterCell):
    """An adapter Cell with a stacked pair ``down``, ``up``, its ``scale``, and perhaps a bias for each slot.

    ``values`` in :meth:`write` and :meth:`read` are {"down", "up", "bias"}, whichever there are, in the Cell's own
    orientation. A pair of lower rank than ``max_rank`` is padded with zeros.
    """

    max_rank = 0
    has_bias = False
    _kept_scale = None

    def make_pair(self, names, down_shape, up_shape, trainable):
        """Create the stacked pair; ``names`` are the last parts of the Parameters' names, shapes include the slots."""
        self.down = stacked(f"{self.path}.{names[0]}", down_shape, trainable)
        self.up = stacked(f"{self.path}.{names[1]}", up_shape, trainable)
        self.scale = stacked(f"{self.path}.lora_scale", down_shape[:1], False)

    def make_bias(self, slots, out_features, trainable):
        """Create a bias for each slot, and who owns one."""
        self.bias = stacked(f"{self.path}.lora_bias", (slots, out_features), trainable)
        self.bias_owned = stacked(f"{self.path}.lora_bias_owned", (slots,), False, np.int32)

    def write(self, slot, values, scaling):
        if self.max_rank:
            for name in ("down", "up"):
                put(getattr(self, name), slot, values.get(name, np.float32(0)))
            put(self.scale, slot, np.float32(scaling if "down" in values else 0))
        if self.has_bias:
            put(self.bias, slot, values.get("bias", np.float32(0)))
            put(self.bias_owned, slot, "bias" in values)

    def read(self, slot, shapes):
        return {name: get(getattr(self, name), slot, shape) for name, shape in shapes.items()}

    def clear(self, slot):
        if self.max_rank:
            for parameter in (self.down, self.up, self.scale):
                put(parameter, slot, np.float32(0))
        if self.has_bias:
            put(self.bias_owned, slot, 0)

    def parameters_of(self, slot):
        return ([self.down, self.up] if self.max_rank else []) + ([self.bias] if self.has_bias else [])

    def delta(self, slot):
        """What a slot adds to the base weight, float32, of the weight's shape."""
        return get(self.scale, slot) * (get(self.up, slot) @ get(self.down, slot))

    def merge(self, slot):
        base = leaf_parameters(self.base_layer)
        own_bias = self.has_bias and get(self.bias_owned, slot) > 0
        self.keep([base["weight"]] * bool(self.max_rank) + [base.get("bias")] * bool(own_bias))
        if self.max_rank:
            add_in_float32(base["weight"], self.delta(slot))
            # The slot's own rows must not get the same change twice.
            self._kept_scale = (slot, get(self.scale, slot))
            put(self.scale, slot, np.float32(0))
        if own_bias:
            base["bias"].set_data(Tensor(get(self.bias, slot)).astype(base["bias"].dtype))

    def unmerge(self):
        super().unmerge()
        if self._kept_scale is not None:
            put(self.scale, *self._kept_scale)
        self._kept_scale = None


class SavedBase(AdapterCell):
    """An adapter Cell with a copy of its base module for each slot; ``owned`` (slots,) says which slots have one."""

    role = "saved"
    kind = "saved"

    @property
    def inner(self):
        """The base module itself, inside a LoRA Cell if there is one."""
        base = self.base_layer
        return base.base_layer if isinstance(base, AdapterCell) else base

    def values_of(self, slot):
        """{field: Parameter} of one slot."""
        return leaf_parameters(self.copies[slot])

    def write(self, slot, values, scaling):
        self.clear(slot)
        if values:
            for name, parameter in self.values_of(slot).items():
                parameter.set_data(Tensor(np.ascontiguousarray(values[name], np.float32)).astype(parameter.dtype))
            put(self.owned, slot, 1)

    def read(self, slot, shapes):
        values = self.values_of(slot)
        return {name: to_float32(values[name]) for name in shapes}

    def clear(self, slot):
        put(self.owned, slot, 0)

    def parameters_of(self, slot):
        return list(self.values_of(slot).values()) if get(self.owned, slot) > 0 else []

    def merge(self, slot):
        if get(self.owned, slot) > 0:
            base = leaf_parameters(self.inner)
            self.keep(list(base.values()))
            for name, parameter in self.values_of(slot).items():
                base[name].set_data(Tensor(parameter.asnumpy().copy()).astype(base[name].dtype))
