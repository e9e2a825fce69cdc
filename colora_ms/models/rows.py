"""``rows``: what a decoder tells its Cells of the rows of its batch.

``rows = (slots, lengths)``, a tuple of tensors that the decoder makes once and hands to all of its Cells. slots:
(rows,) int32, the adapter of each row, -1 for none. lengths: (rows,) int32, the real tokens of each row, which stand on
the left; (rows, segments) where several sequences share a row; ``ABSENT`` where nothing is known: all tokens count.
"""

from mindspore import Tensor
from mindspore.ops import constexpr

from colora_ms.errors import AdapterError


def slots_of(rows: tuple) -> Tensor:
    """The slots (rows,) int32 of ``rows``.

    Raises:
        AdapterError: it is a tensor, as before Cells took lengths, too; its first number would be taken for the slots.
    """
    if not isinstance(rows, tuple):
        _refuse()
    return rows[0]


@constexpr
def _refuse():
    raise AdapterError("a Cell of the decoder was called with a tensor in the place of rows; call it with (x, (slots, "
                       "lengths)), or (x, (slots, ABSENT)) where all tokens of a row are real")
