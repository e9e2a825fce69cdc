"""Stacked Parameters: values of several adapters in one tensor, one slot each, changed without compiling anew."""

from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from colora_ms.models.changes import note_slot, note_whole
from colora_ms.models.mapped import array_dtype, zeros
from colora_ms.models.safetensors_file import bfloat16_to_float32, float32_to_bfloat16


def stacked(name: str, shape: tuple[int, ...], trainable: bool, dtype: Any = np.float32) -> Parameter:
    """A Parameter of zeros, first axis = slots; dtype: NumPy's, or ``mindspore.bfloat16``."""
    kind = array_dtype(dtype) if dtype == ms.bfloat16 else np.dtype(dtype)
    if trainable:
        return Parameter(Tensor.from_numpy(np.zeros(shape, kind)), name=name, requires_grad=True)
    return zeros(shape, kind, name)


def put(parameter: Parameter, slot: int, value: Any) -> None:
    """Set one slot of a stacked Parameter; a value smaller than the slot is padded with zeros (a rank below the
    widest).

    The Parameter stays the same object with the same shape, so that compiled graphs see the new value. Where its memory
    is the host's (a CPU), the slot is written in place: copying the whole stack for each slot would make the loading of
    an adapter as slow as the loading of all of them. A bfloat16 Parameter gets the value rounded to nearest.
    """
    whole = _numbers(parameter)
    in_place = whole.flags.writeable and whole.ctypes.data == parameter.data_ptr()
    if not in_place:
        whole = whole.copy()
    value = np.asarray(value)
    if parameter.dtype == ms.bfloat16:
        value = float32_to_bfloat16(value)
    if value.shape != whole.shape[1:]:
        whole[slot] = 0
    whole[(slot, *(slice(n) for n in value.shape))] = value
    if not in_place:
        parameter.set_data(Tensor.from_numpy(whole) if parameter.dtype != ms.bfloat16
                           else Tensor(bfloat16_to_float32(whole)).astype(ms.bfloat16))
    note_slot(parameter, slot)


def get(parameter: Parameter, slot: int, shape: tuple[int, ...] = ()) -> np.ndarray:
    """One slot of a stacked Parameter as a NumPy copy, cut to ``shape``; bfloat16 is widened to float32."""
    part = _numbers(parameter)[(slot, *(slice(n) for n in shape))]
    return bfloat16_to_float32(part) if parameter.dtype == ms.bfloat16 else part.copy()


def _numbers(parameter):
    """A Parameter's memory as a NumPy array; of bfloat16 the bit patterns, uint16."""
    whole = parameter.asnumpy()
    return whole.view(np.uint16) if parameter.dtype == ms.bfloat16 else whole


def to_float32(tensor: Tensor) -> np.ndarray:
    """Any floating-point Tensor as a float32 NumPy array."""
    return tensor.astype(ms.float32).asnumpy()


def rows_where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``where`` with one condition a row: mask (rows,) bool, yes and no (rows, ...)."""
    return ops.where(mask.reshape((-1,) + (1,) * (yes.ndim - 1)), yes, no)


def owned_slots(slots: Tensor, owned: Tensor) -> Tensor:
    """slots (rows,) int32 with -1 in place of every slot that owns nothing; owned: (slots,) int32, 1 where it does."""
    used = ops.logical_and(slots >= 0, ops.gather(owned, ops.maximum(slots, 0), 0) > 0)
    return ops.where(used, slots, -ops.ones_like(slots))


def add_in_float32(parameter: Parameter, delta: np.ndarray) -> None:
    """parameter + delta, added in float32 and rounded once to the parameter's dtype."""
    parameter.set_data(Tensor(to_float32(parameter) + delta).astype(parameter.dtype))
    note_whole(parameter)
