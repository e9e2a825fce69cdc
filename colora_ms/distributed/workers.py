"""The processes of one job under msrun: who this one is, and Python values passed between them.

    team = workers.start()                  # rank 0 of 1 outside msrun
    lengths = team.gather(len(mine))        # every worker's value, in the order of the ranks

Every worker has to make the same calls in the same order: a call waits for all of them.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterable, Sequence
from typing import Optional, TypeVar

import numpy as np

from colora_ms.errors import ConfigError

T = TypeVar("T")

_SMALLEST = 1024  # int32 of a message; sizes are powers of two, so that few shapes are compiled


class Workers:
    """One process among ``world``.

    Args:
        rank: number of this process, from 0.
        world: number of processes; above 1, MindSpore's communication must be initialized.
        members: their numbers in the job; None: they are all of it. Groups of one size work side by side then, and
            every process of the job makes the same calls for its own group.
        group: MindSpore's name of the group, where the device has groups.
    """

    def __init__(self, rank: int = 0, world: int = 1, members: Optional[Sequence[int]] = None,
                 group: Optional[str] = None) -> None:
        self.rank, self.world, self.members, self.group = rank, world, members, group
        #: This group's number among the groups side by side, and how many there are.
        self.number, self.groups = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every worker, in the order of the ranks; any picklable object."""
        if self.world == 1:
            return [value]
        from mindspore import Tensor, ops
        blob = pickle.dumps(value)
        gather = ops.AllGather()
        sizes = gather(Tensor(np.array([len(blob)], np.int32))).asnumpy()
        size = max(_SMALLEST, 1 << int(-(-sizes.max() // 4) - 1).bit_length())
        # AllGather has no kernel for bytes on a CPU, so four of them travel as one int32.
        message = np.frombuffer(blob.ljust(4 * size, b"\0"), np.int32)
        rows = gather(Tensor(message)).asnumpy().reshape(len(sizes), size)
        return [pickle.loads(rows[k].tobytes()[:sizes[k]]) for k in self.members or range(self.world)]

    def share(self, value: T) -> T:
        """The ``value`` of rank 0; what the others give is ignored."""
        return self.gather(value if self.first else None)[0]

    def wait(self) -> None:
        """Return when every worker has come here."""
        self.gather(None)

    def grid(self, columns: int) -> tuple[Workers, Workers]:
        """This process's row and column of the processes in rows of ``columns``: worker k stands in row k // columns.

        All workers make this call.

        Returns:
            (row, column): the ``columns`` workers of its row, and the workers of the same place in all rows.

        Raises:
            ConfigError: the number of workers is no multiple of ``columns``.
        """
        if columns < 1 or self.world % columns:
            raise ConfigError(f"{self.world} workers cannot stand in groups of {columns}; start a multiple of "
                              f"{columns} (-n)")
        if columns == 1:
            return Workers(), self
        if columns == self.world:
            return self, Workers()
        place, number = self.rank % columns, self.rank // columns
        row = _group("row", list(range(self.world)), columns, number)
        column = _group("column", [k for at in range(columns) for k in range(at, self.world, columns)],
                        self.world // columns, place)
        row.rank, column.rank = place, number
        return row, column

    def split(self, items: Iterable[T]) -> list[T]:
        """This worker's part of a list: every ``world``-th item."""
        return list(items)[self.rank::self.world]

    def join(self, mine: list[T]) -> list[T]:
        """The whole list again, in its order, from the workers' parts (see ``split``)."""
        parts = self.gather(mine)
        return [parts[k % self.world][k // self.world] for k in range(sum(map(len, parts)))]


def _group(kind: str, order: list[int], size: int, number: int) -> Workers:
    """The group ``number`` of the workers in an order, ``size`` in each; its rank is set by the caller."""
    import mindspore as ms

    members, name = order[number * size:(number + 1) * size], None
    if ms.get_context("device_target") != "CPU":  # whose collective operators know one group, all processes
        from mindspore.communication import create_group
        name = f"colora-{kind}-{size}-{number}"
        create_group(name, members)
    team = Workers(0, size, members, name)
    team.number, team.groups = number, len(order) // size
    return team


_team = None


def start() -> Workers:
    """Join the job that msrun has started; alone if it has not.

    The job's scheduler, which msrun starts from the same script, stays in here until the job ends
    and leaves the process.

    Returns:
        Workers.
    """
    global _team
    if _team is None:
        role = os.environ.get("MS_ROLE")
        if role not in ("MS_WORKER", "MS_SCHED"):
            return Workers()
        from mindspore import communication
        communication.init()
        if role == "MS_SCHED":
            sys.exit(0)
        _team = Workers(communication.get_rank(), communication.get_group_size())
    return _team


def current() -> Workers:
    """The ``Workers`` of this process; alone before ``start``."""
    return _team or Workers()
