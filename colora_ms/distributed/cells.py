"""The Cells that put a split decoder's parts together: two sums over the workers for each block of a layer.

Every worker has the whole gradient of its activations, since the one of a column-split block's input is summed; of the
factors that every worker has whole each has a part (see ``colora_ms.training.split``).
"""

from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor, nn, ops

from colora_ms.distributed.workers import Workers
from colora_ms.models.decoder import Decoder
from colora_ms.models.replacing import replace_cells


class Sum(nn.Cell):
    """The sum of the tensors of a team's workers.

    On a device whose operators know no groups (a CPU) all processes of the job add: groups side by side each at a place
    of their own, so that the groups' numbers do not meet.

    Args:
        team: the workers.
    """

    def __init__(self, team: Workers) -> None:
        super().__init__(auto_prefix=False)
        self.reduce = ops.AllReduce(ops.ReduceOp.SUM, *(() if team.group is None else (team.group,)))
        self.number = team.number
        self.places = team.groups if team.group is None else 1

    def construct(self, x: Tensor) -> Tensor:
        """x: any shape, float32, of the same shape on all processes of the job -> the same shape."""
        return sum_at(self.reduce, self.number, self.places, x)


def sum_at(reduce: Callable[[Tensor], Tensor], number: int, places: int, x: Tensor) -> Tensor:
    """The sum of the x whose place is ``number`` of ``places``, in a graph; reduce: the sum over all."""
    if places == 1:
        return reduce(x)
    parts: tuple = ()
    for place in range(places):
        parts = parts + (x if place == number else ops.zeros_like(x),)
    return reduce(ops.stack(parts))[number]


class SumOfParts(nn.Cell):
    """The sum of the workers' x; the gradient of the sum is that of each x.

    Args:
        team: the workers over which the model is split.
    """

    def __init__(self, team: Workers) -> None:
        super().__init__(auto_prefix=False)
        self.sum = Sum(team)

    def construct(self, x: Tensor) -> Tensor:
        """x: any shape, float32 -> the same shape, equal on all workers."""
        return self.sum(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """The operator's own gradient would sum dout, which all workers have in full."""
        return (dout,)


class SumOfGradients(nn.Cell):
    """x itself; its gradient is the sum of the workers' gradients; team: as of ``SumOfParts``."""

    def __init__(self, team: Workers) -> None:
        super().__init__(auto_prefix=False)
        self.sum = Sum(team)

    def construct(self, x: Tensor) -> Tensor:
        """x: any shape, float32 -> x."""
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """dx: the sum of what the workers' column-split linears give."""
        return (self.sum(dout),)


class SplitInput(nn.Cell):
    """The norm before a block of column-split linears.

    Args:
        norm: the whole norm; team: as of ``SumOfParts``.
    """

    #: The layers' own operator is for whole layers.
    fusible = False

    def __init__(self, norm: nn.Cell, team: Workers) -> None:
        super().__init__(auto_prefix=False)
        self.norm = norm
        self.split = SumOfGradients(team)

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """As of the norm."""
        return self.split(self.norm(x, rows))

    def add(self, x: Tensor, residual: Tensor, rows: tuple) -> tuple[Tensor, Tensor]:
        """As of the norm; the residual goes on whole."""
        y, residual = self.norm.add(x, residual, rows)
        return self.split(y), residual


class SummedLinear(nn.Cell):
    """The sum of a row-split linear's outputs over all workers.

    Args:
        linear: the worker's linear, with its adapter; team: as of ``SumOfParts``.
    """

    #: The layers' own operator knows nothing of the sum.
    fusible = False

    def __init__(self, linear: nn.Cell, team: Workers) -> None:
        super().__init__(auto_prefix=False)
        self.linear = linear
        self.sum = SumOfParts(team)

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (..., in / workers) -> (..., out) float32, equal on all workers."""
        return self.sum(self.linear(x, rows))


def join_parts(decoder: Decoder, team: Workers) -> None:
    """Put the sums into a decoder of one worker's shares, in place; Parameters keep their names."""
    cells = {}
    for number, layer in enumerate(decoder.model.layers):
        place = f"model.layers.{number}"
        for before in ("before_attention", "before_mlp"):
            name = layer.norm_names[before]
            if name:  # a parallel layer has one for both blocks
                cells[f"{place}.{name}"] = SplitInput(getattr(layer, name), team)
        cells[f"{place}.self_attn.o_proj"] = SummedLinear(layer.self_attn.o_proj, team)
        cells[f"{place}.mlp.down_proj"] = SummedLinear(layer.mlp.down_proj, team)
    replace_cells(decoder, cells)
