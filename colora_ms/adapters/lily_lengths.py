"""The rows' lengths, brought to Cells that pool over the tokens of a row.

A linear Cell gets x and the rows' slots, not their lengths. Pooling needs them to leave padding out, so the decoder's
inner Cell notes them in one Parameter, which the pooling Cells read in the same graph.
"""

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from colora_ms.errors import AdapterError
from colora_ms.models.decoder import DecoderModel

#: Rows of a batch, at most, when Cells pool over tokens.
MOST_ROWS = 4096

#: Name of the Parameter.
NAME = "adapters.row_lengths"

#: Length of a row that nothing is known of: all of its tokens count.
UNKNOWN = 2 ** 30


#: Why a row of several sequences is refused.
PACKED = ("this adapter's routers pool over the tokens of a row (router_pool \"sequence\" or \"batch\"), so that packed examples "
          "would see each other; set data.packing to false, or train with router_pool \"token\" or \"static\"")


def row_lengths(shared):
    """The (MOST_ROWS,) int32 Parameter with the rows' lengths that all Cells of a model share."""
    if "lengths" not in shared:
        shared["lengths"] = Parameter(Tensor(np.full(MOST_ROWS, UNKNOWN, np.int32)), name=NAME,
                                      requires_grad=False)
    return shared["lengths"]


def length_mask(lengths, x):
    """(rows, tokens) float32: 1 for the real tokens of x (rows, tokens, ...), which stand on the left."""
    rows, tokens = x.shape[:2]
    index = ops.arange(tokens).astype(ms.int32).reshape((1, -1))
    return (index < lengths[:rows].reshape((-1, 1))).astype(ms.float32)


def pools_rows(net):
    """Whether Cells of a decoder pool over the tokens of a row, which must then hold a single sequence."""
    return isinstance(getattr(net, "model", None), NotingDecoderModel)


@constexpr
def _refuse_packed():
    raise AdapterError(PACKED)


class NoteLengths(nn.Cell):
    """Writes the rows' lengths into the Parameter and returns the slots, so that what uses them comes after."""

    def __init__(self, lengths):
        super().__init__(auto_prefix=False)
        self.lengths = lengths
        self.unknown = Tensor(np.full(MOST_ROWS, UNKNOWN, np.int32))

    def construct(self, slots, lengths):
        if lengths.ndim == 2:
            _refuse_packed()
        rows = lengths.shape[0]
        whole = ops.concat((lengths.astype(ms.int32), self.unknown[rows:]))
        return ops.depend(slots, ops.assign(self.lengths, whole))


class NotingDecoderModel(DecoderModel):
    """A DecoderModel that notes the rows' lengths before it runs."""

    run_plain = DecoderModel.construct
    run_cached = DecoderModel.cached

    def construct(self, ids, lengths, slots):
        return self.run_plain(ids, lengths, self.note_lengths(slots, lengths))

    def cached(self, ids, slots, cache, cache_rows, start, length):
        return self.run_cached(ids, self.note_lengths(slots, length), cache, cache_rows, start, length)


def install(net, shared):
    """Make a decoder note its rows' lengths, if a Cell of it asks for them; other models are left alone."""
    inner = getattr(net, "model", None)
    if "lengths" in shared and type(inner) is DecoderModel:
        inner.note_lengths = NoteLengths(shared["lengths"])
        inner.__class__ = NotingDecoderModel


def remove(net):
    """Undo :func:`install`."""
    inner = getattr(net, "model", None)
    if isinstance(inner, NotingDecoderModel):
        inner.__class__ = DecoderModel
        del inner.note_lengths
