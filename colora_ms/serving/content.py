"""What the bank keeps of an adapter in host memory: one folder, read and checked, independent of its files."""

import os
from dataclasses import dataclass
from typing import Union

import numpy as np

from colora_ms.adapters.fitting import check_fits, stage
from colora_ms.adapters.handle import Adapters
from colora_ms.adapters.peft_format import StoredAdapter
from colora_ms.errors import AdapterError


@dataclass(frozen=True)
class Content:
    """An adapter's checked values, ready to be put into a slot.

    Attributes:
        digest: 64 hexadecimal digits that name the content (see :func:`colora_ms.adapters.digest`).
        matched: :class:`colora_ms.adapters.matching.Matched`.
        values: {(module name, role): {field: float32 array}}, copies that no file can change.
        rank: its largest rank.
        nbytes: bytes of all arrays.
    """

    digest: str
    matched: object
    values: dict
    rank: int
    nbytes: int


def read_content(handle: Adapters, folder: Union[str, os.PathLike], max_rank: int, max_bytes: int,
                 allow_pickle: bool = False) -> Content:
    """Read an adapter folder and check it in full; nothing of the model changes. Any thread may call this.

    Args:
        handle: :class:`colora_ms.adapters.Adapters` of the model.
        folder: the PEFT folder.
        max_rank: the largest rank that the slots hold, for the message.
        max_bytes: the largest file that may be read.
        allow_pickle: read adapter_model.bin too, see :mod:`colora_ms.adapters.pickle_file`.

    Raises:
        AdapterError: all that is wrong with it.
    """
    stored = StoredAdapter(folder, allow_pickle)
    size = sum(end - begin for _, _, begin, end in stored.file.entries.values())
    if size > max_bytes:
        raise AdapterError(f"the adapter in {folder} has {size} bytes of tensors, the bank keeps {max_bytes} in "
                           "memory; make the bank with a larger host_bytes")

    def check(config, matched):
        ranks = {name: target.r for name, target in matched.targets.items()}
        wide = [name for name, r in ranks.items() if r > max_rank]
        if wide:
            raise AdapterError(f"the adapter in {folder} has rank {ranks[wide[0]]} in {len(wide)} modules, {wide[0]!r} "
                               f"first; this bank was made with max_rank={max_rank}: make it with a larger one")
        check_fits(handle, config, matched)

    digest = stored.digest()
    matched, values = stage(handle, stored, check)
    # A float32 tensor is a view of the mapped file: it would change, or take the process down, with the file.
    values = {place: {field: np.array(value) for field, value in fields.items()} for place, fields in values.items()}
    nbytes = sum(value.nbytes for fields in values.values() for value in fields.values())
    return Content(digest, matched, values, max((t.r for t in matched.targets.values()), default=0), nbytes)
