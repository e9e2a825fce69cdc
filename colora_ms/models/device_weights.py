"""A decoder's weights and adapters as a device step reads them: packed, in the compute type, rank-major.

They are made once, from the Parameters of the decoder's Cells, which stay on the host. Neighbours that read the same
rows are one linear: q, k and v, and gate and up. An adapter's pair is kept as ``kernels.ascend.multi_lora`` takes it,
so that nothing is transposed, cast or copied in a step; a slot that was written is written again here, in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Sequence

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from colora_ms.errors import CheckpointError
from colora_ms.kernels import ascend, ascend_builtin
from colora_ms.kernels.operands import ADAPTER
from colora_ms.models.changes import slot_versions, whole_version
from colora_ms.models.device_lily import LilyPart, is_routed
from colora_ms.models.device_prompts import banks_of, is_masked, masked_pair
from colora_ms.models.device_quantized import INTEGERS, integer_tensors
from colora_ms.models.safetensors_file import bfloat16_to_float32

#: Formats of linears that the device step keeps in the compute type, by their names in ``kernels.operands.FORMATS``;
#: those of :mod:`colora_ms.models.device_quantized` stay integers.
FLOATS = ("float32", "bfloat16")


def device_tensor(values: np.ndarray, dtype: Any, name: str) -> Tensor:
    """Float values in a compute type, rounded to nearest.

    Raises:
        CheckpointError: one is larger than the type holds.
    """
    values = np.ascontiguousarray(values, np.float32)
    if dtype == ms.float16:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.all(np.isfinite(half)):
            raise CheckpointError(f"{name} holds {np.abs(values).max():g}, which is more than float16 holds (65504) or "
                                  "no number; set COLORA_ASCEND_DTYPE=bfloat16")
        return Tensor(half)
    return Tensor(values).astype(dtype)


def constant(values: np.ndarray, dtype: Any, name: str) -> Parameter:
    """A Parameter without gradients of float values."""
    return Parameter(device_tensor(values, dtype, name), name=name, requires_grad=False)


def plain(cell: nn.Cell) -> nn.Cell:
    """The Cell with the base weights, under whatever adapter Cells stand in its place."""
    while hasattr(cell, "base_layer"):
        cell = cell.base_layer
    return cell


class Watch:
    """Tells whether the weights of Cells were written since the last look."""

    def __init__(self, cells: Sequence[nn.Cell]) -> None:
        self._parameters = [parameter for cell in cells for parameter in cell.get_parameters()]
        self._seen = self._state()

    def changed(self, trained: bool) -> bool:
        """Whether they were, or may have been: what has gradients, after a training."""
        before, self._seen = self._seen, self._state()
        return self._seen != before or trained and any(one.requires_grad for one in self._parameters)

    def _state(self) -> list[tuple[int, int]]:
        return [(one.data_ptr(), whole_version(one)) for one in self._parameters]


class Heads(NamedTuple):
    """Heads that are wider on the device than in the model: each half of a head is followed by zeros, so that rotation
    turns the same pairs and products of heads are what they were."""

    count: int
    dim: int
    wide: int

    def spread(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Values of all heads on one axis -> the same with zeros between them."""
        if self.dim == self.wide:
            return values
        moved = np.moveaxis(values, axis, -1)
        out = np.zeros((*moved.shape[:-1], self.count, 2, self.wide // 2), values.dtype)
        out[..., :self.dim // 2] = moved.reshape(*moved.shape[:-1], self.count, 2, self.dim // 2)
        return np.moveaxis(out.reshape(*moved.shape[:-1], self.count * self.wide), -1, axis)


class PackedLinear(nn.Cell):
    """Linears of the same input as one, with the adapters of all slots.

    Args:
        name: of its Parameters; cells: the decoder's Cells, in the order of the output's slices.
        dtype: ``mindspore.float16`` or ``bfloat16``.
        outputs: the heads of each Cell's outputs; (): they are no heads. inputs: those of the inputs, or None.
        prompts: whether it is ever given many tokens at once with adapters; the head is not.

    Attributes:
        weight: (out, in); where it is ``integer``, what :mod:`colora_ms.models.device_quantized` makes of it, with
            antiquant, its scale, and group. bias: (out,), where ``has_bias``.
        down: (slots, slices * rank, in), up: (slots, rank, out), scale: (slots, slices) float32, ends: (slices,) int32,
            the outputs behind the last one of each slice; where ``has_lora``. A slice without an adapter has scale 0.
        masked: whether prompts take the masked form (:mod:`colora_ms.models.device_prompts`, where ``shrink`` and
            ``expand`` are told); owner: which of the step's masks is this linear's, given by the decoder.
    """

    def __init__(self, name: str, cells: Sequence[nn.Cell], dtype: Any, outputs: Sequence[Heads] = (),
                 inputs: Optional[Heads] = None, prompts: bool = True) -> None:
        super().__init__()
        self._name = name
        self._sources, self._dtype, self._outputs, self._inputs = list(cells), dtype, list(outputs), inputs
        self.slices = len(cells)
        leaves = [plain(cell) for cell in cells]
        self.in_features = inputs.count * inputs.wide if inputs else leaves[0].in_features
        widths = [heads.count * heads.wide for heads in outputs] or [leaf.out_features for leaf in leaves]
        self.ends_at = tuple(int(n) for n in np.cumsum(widths))
        self.out_features = self.ends_at[-1]
        self.has_bias = any(leaf.has_bias for leaf in leaves)
        self.integer, self.group = leaves[0].format.name in INTEGERS, 0
        if self.integer:
            weight, scale, self.group = integer_tensors(leaves, dtype, name)
            self.weight = Parameter(weight, name=f"{name}.weight", requires_grad=False)
            self.antiquant = Parameter(scale, name=f"{name}.antiquant", requires_grad=False)
        else:
            self.weight = constant(self._base_values(), dtype, f"{name}.weight")
        if self.has_bias:
            self.bias = constant(self._bias_values(), dtype, f"{name}.bias")
        self.mixes = nn.CellList([self._mix(f"{name}.{i}", i, cell) for i, cell in enumerate(cells)
                                  if is_routed(cell) and not cell.fusible])
        pairs = self._pairs()
        self._paired = [cell for cell, pair in zip(cells, pairs) if pair]
        self.has_lora, self.masked, self.owner = bool(self._paired), False, 0
        self.slots = max((mix.slots for mix in self.mixes), default=0)
        if self.has_lora:
            self.rank = max(pair["down"].shape[1] for pair in pairs if pair)
            self.slots = next(pair["down"].shape[0] for pair in pairs if pair)
            self.masked = is_masked(self.slots, self.slices * self.rank)
            self._kept = list(ADAPTER) + (banks_of(self.masked) if prompts else [])
            self._first = 0 if self.masked else 1  # the place of slot 0 in the banks of prompts
            banks = [self._slot_values(pairs, slot) for slot in range(self.slots)]
            for part in self._kept:
                values = np.stack([one[part] for one in banks])
                if part not in ADAPTER and not self.masked:
                    values = np.concatenate((np.zeros_like(values[:1]), values))
                setattr(self, part, constant(values, ms.float32 if part == "scale" else dtype, f"{name}.{part}"))
            self.ends = Parameter(Tensor(np.array(self.ends_at, np.int32)), name=f"{name}.ends", requires_grad=False)
        self._base, self._seen_slots = Watch(leaves), self._slot_state()

    def construct(self, x: Tensor, slots: tuple) -> Tensor:
        """x: (tokens, in) -> (tokens, out).

        slots: () for no adapters; ((tokens,) int32,), -1 for the base; or, for many tokens that stand in the order of
        their slots, what :func:`colora_ms.models.device_prompts.prepared` makes of them.
        """
        if self.integer:
            y = ascend_builtin.quantized_linear(x, self.weight, self.antiquant, self.group)
        else:
            y = ascend_builtin.linear(x, self.weight)
        if self.has_bias:
            y = ascend_builtin.add(y, self.bias)
        if self.has_lora and len(slots) > 1 and self.masked:
            y = ascend_builtin.add(y, masked_pair(x, self.down, self.expand, slots[2][self.owner], slots[3]))
        elif self.has_lora and len(slots) > 1:
            inner = ascend_builtin.grouped_linear(x, self.shrink, slots[1])
            y = ascend_builtin.add(y, ascend_builtin.grouped_linear(inner, self.expand, slots[1]))
        elif self.has_lora and len(slots) == 1:
            y = ascend.multi_lora(x, slots[0], self.down, self.up, self.scale, y, self.ends)
        if len(slots) > 0:
            for mix in self.mixes:
                y = mix(x, slots[0], y)
        return y

    @property
    def adapted(self) -> bool:
        """Whether it has adapters of any kind."""
        return self.has_lora or len(self.mixes) > 0

    # -- keeping up with the decoder -------------------------------------------------------------------------------

    def refresh(self, trained: bool = False) -> None:
        """Read again what was written since the last time; trained: also what has gradients.

        What was not written is not touched, and banks stay where they are.
        """
        if self._base.changed(trained):
            if self.integer:
                weight, scale, _ = integer_tensors([plain(cell) for cell in self._sources], self._dtype,
                                                   self.weight.name)
                self.weight.set_data(weight)
                self.antiquant.set_data(scale)
            else:
                self.weight.set_data(device_tensor(self._base_values(), self._dtype, self.weight.name))
            if self.has_bias:
                self.bias.set_data(device_tensor(self._bias_values(), self._dtype, self.bias.name))
        for mix in self.mixes:
            mix.refresh(trained)
        if not self.has_lora:
            return
        slots = self._slot_state()
        everything = trained and any(parameter.requires_grad for parameter in self._adapter_parameters())
        changed = [slot for slot in range(self.slots) if everything or slots[slot] != self._seen_slots[slot]]
        pairs = self._pairs() if changed else []
        for slot in changed:
            self._put(pairs, slot)
        self._seen_slots = slots

    def _pairs(self) -> list[dict[str, Tensor]]:
        """The adapters' tensors of each Cell, {} where it has none; some Cells compute them."""
        return [{} if is_routed(cell) and not cell.fusible else dict(zip(ADAPTER, cell.operands()[1]))
                for cell in self._sources]

    def _mix(self, name: str, i: int, cell: nn.Cell) -> LilyPart:
        """The routed adapters of Cell i."""
        start = (0, *self.ends_at)[i]

        def put_out(values: np.ndarray) -> np.ndarray:
            whole = np.zeros((*values.shape[:-1], self.out_features), np.float32)
            whole[..., start:self.ends_at[i]] = self._out(i, values, -1)
            return whole

        return LilyPart(name, cell, self._dtype, self._in, put_out, device_tensor, write_slot, slot_of)

    def _put(self, pairs: list[dict[str, Tensor]], slot: int) -> None:
        """Write one slot of the banks, on the device."""
        values = self._slot_values(pairs, slot)
        for part in self._kept:
            parameter, first = getattr(self, part), 0 if part in ADAPTER else self._first
            write_slot(parameter, first + slot, device_tensor(values[part][None], parameter.dtype, parameter.name))

    def _out(self, i: int, values: np.ndarray, axis: int) -> np.ndarray:
        """Values of Cell i with the device's heads on the axis of the outputs."""
        return self._outputs[i].spread(values, axis) if self._outputs else values

    def _in(self, values: np.ndarray) -> np.ndarray:
        """Values with the device's heads on the last axis, of the inputs."""
        return self._inputs.spread(values, -1) if self._inputs else values

    def _base_values(self) -> np.ndarray:
        return np.concatenate([self._out(i, self._in(plain(cell).base_values()["weight"]), 0)
                               for i, cell in enumerate(self._sources)])

    def _bias_values(self) -> np.ndarray:
        return np.concatenate([self._out(i, plain(cell).base_values()["bias"] if plain(cell).has_bias
                                         else np.zeros(plain(cell).out_features, np.float32), 0)
                               for i, cell in enumerate(self._sources)])

    def _slot_values(self, pairs: list[dict[str, Tensor]], slot: int) -> dict[str, np.ndarray]:
        """down (slices * rank, in), up (rank, out), scale (slices,), shrink (in, slices * rank), expand (slices * rank,
        out) of one slot, float32.

        Raises:
            CheckpointError: one holds a number that is not finite.
        """
        down = np.zeros((self.slices, self.rank, self.in_features), np.float32)
        expand = np.zeros((self.slices, self.rank, self.out_features), np.float32)
        up = np.zeros((self.rank, self.out_features), np.float32)
        scale = np.zeros(self.slices, np.float32)
        starts = (0, *self.ends_at)
        for i, one in enumerate(pairs):
            if one:
                values = {name: slot_of(one[name], slot) for name in ADAPTER}
                for name, numbers in values.items():
                    if not np.all(np.isfinite(numbers)):
                        raise CheckpointError(
                            f"slot {slot} of {self._name}, {name} of its linear {i}, holds "
                            f"{numbers[~np.isfinite(numbers)].flat[0]}, expected finite numbers: all slots share the "
                            "products of a prompt; load the adapter again, or train it with a lower learning rate")
                rank = len(values["down"])
                down[i, :rank] = self._in(values["down"])
                up[:rank, starts[i]:starts[i + 1]] = self._out(i, values["up"], 0).T
                scale[i] = values["scale"]
                part = slice(starts[i], starts[i + 1])
                expand[i, :, part] = scale[i] * up[:, part]
        down = down.reshape(-1, self.in_features)
        return {"down": down, "up": up, "scale": scale, "shrink": down.T,
                "expand": expand.reshape(-1, self.out_features)}

    def _slot_state(self) -> list[tuple[int, ...]]:
        """A tuple a slot that changes when the slot is written."""
        versions = [slot_versions(parameter) for parameter in self._adapter_parameters()]
        return [tuple(row) for row in np.stack(versions, 1).tolist()] if versions else []

    def _adapter_parameters(self) -> list[Parameter]:
        """The stacked Parameters of the adapters, a slot a row."""
        base = {id(one) for cell in self._sources for one in plain(cell).get_parameters()}
        return [one for cell in self._paired for one in cell.get_parameters() if id(one) not in base]


def write_slot(parameter: Parameter, slot: int, value: Tensor) -> None:
    """Write one slot of a bank in place; value: (1, ...) of its dtype."""
    if ms.get_context("device_target") == "CPU":  # which has no ScatterUpdate for bfloat16; the memory is the host's
        parameter.asnumpy()[slot] = value.asnumpy()[0]
    else:
        ops.scatter_update(parameter, Tensor(np.array([slot], np.int32)), value)


def slot_of(tensor: Tensor, slot: int) -> np.ndarray:
    """One slot of a stacked tensor, float32; read on the host, so that the whole of it is not brought to the device."""
    whole = tensor.asnumpy()
    return bfloat16_to_float32(whole.view(np.uint16)[slot]) if tensor.dtype == ms.bfloat16 else whole[slot]
