"""Which expert of a Lily adapter serves what: the router's weights, counted while a model reads texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable, Optional

import numpy as np

from mindspore import Parameter, Tensor, nn

from colora_ms import runtime
from colora_ms.errors import AdapterError
from colora_ms.models.replacing import forget_graphs

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters


@dataclass(frozen=True)
class ExpertUse:
    """The experts of one module.

    Attributes:
        path: its name; group: the modules that share its experts; block: number of its A within the group.
        mean: (experts,) float64, the router's weights averaged over the tokens; they sum to 1.
        top: (experts,) float64, the share of tokens whose largest weight is this expert's.
        tokens: how many tokens were counted; 0 for static weights, which need none.
    """

    path: str
    group: str
    block: int
    mean: np.ndarray
    top: np.ndarray
    tokens: int

    @property
    def effective(self) -> float:
        """exp of the mean weights' entropy: from 1 (one expert serves all) to the number of experts (all alike)."""
        return float(np.exp(-(self.mean * np.log(np.maximum(self.mean, 1e-30))).sum()))


class _Hidden(nn.Cell):
    """The decoder without its head."""

    def __init__(self, decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, ids, lengths, slots):
        return self.decoder.hidden(ids, lengths, slots)


def expert_use(handle: 'Adapters', sequences: Iterable, name: Optional[str] = None, rows: int = 8,
               multiple: int = 16) -> list[ExpertUse]:
    """How a Lily adapter's routers weigh the experts, module by module.

    Args:
        handle: :class:`colora_ms.adapters.Adapters` of a decoder of this package.
        sequences: lists of token ids, at least one, none empty (not looked at if the weights are static).
        name: the adapter, by default the active one.
        rows: sequences read in one call; multiple: calls are padded to a multiple of this.

    Returns:
        list of :class:`ExpertUse`, in the order of the model.

    Raises:
        AdapterError: no Lily adapter, another model's Cells, no token, or a sequence longer than the model's context.
    """
    config, matched = handle.config(name), handle.matched(name)
    slot = handle.slot(name if name is not None else handle.active)
    if config.peft_type != "LILY":
        raise AdapterError(f"an adapter of the method {config.peft_type} has no router; expert use is Lily's")
    cells = {path: handle.sites[path, "lora"] for path in matched.targets}
    if config.router_pool == "static":
        weights = {path: cell.static_weights(slot) for path, cell in cells.items()}
        return [ExpertUse(path, target.group, target.block, weights[path], _one_hot(weights[path]), 0)
                for path, target in matched.targets.items()]
    limit = getattr(handle.net, "max_positions", None)
    if limit is None:
        raise AdapterError("expert use is counted on this package's decoders only")
    sequences = [list(one) for one in sequences]
    if not sequences or not all(sequences):
        raise AdapterError("expert use needs texts of at least one token each; give prompts or a data file")
    longest = max(map(len, sequences))
    if longest > limit:
        raise AdapterError(f"a text has {longest} tokens, the model's context is {limit}")
    width = min(-(-longest // multiple) * multiple, limit)
    counts = _begin(cells)
    try:
        net = _Hidden(handle.net).set_train(False)
        for begin in range(0, len(sequences), rows):
            part = sequences[begin:begin + rows]
            ids = np.zeros((rows, width), np.int32)
            lengths = np.zeros(rows, np.int32)
            for i, one in enumerate(part):
                ids[i, :len(one)], lengths[i] = one, len(one)
            slots = np.where(lengths > 0, slot, -1).astype(np.int32)
            # A row of no tokens has no meaning for attention; its slot of -1 keeps it out of the count.
            runtime.run(net, Tensor(ids), Tensor(np.maximum(lengths, 1)), Tensor(slots))
    finally:
        _end(cells)
    result = []
    for path, target in matched.targets.items():
        mean, top = counts[path].asnumpy().astype(np.float64)
        total = int(round(top.sum()))
        result.append(ExpertUse(path, target.group, target.block, mean / mean.sum(), top / max(total, 1), total))
    return result


def _one_hot(weights):
    return (np.arange(len(weights)) == weights.argmax()).astype(np.float64)


def _begin(cells):
    """Let the Cells count; returns {path: Parameter (2, experts)} with the sums of weights and of first places."""
    counts = {}
    for path, cell in cells.items():
        counts[path] = Parameter(Tensor(np.zeros((2, cell.experts), np.float32)), name=f"{path}.lily_use",
                                 requires_grad=False)
        cell.counts = counts[path]
        counts[path].name = f"{path}.lily_use"
        cell.counting = True
    forget_graphs()
    return counts


def _end(cells):
    """Undo :func:`_begin`."""
    for cell in cells.values():
        cell.counting = False
        del cell.counts
    forget_graphs()


def table(uses: list[ExpertUse]) -> list[str]:
    """The uses as lines of text: a row for each module, the weight of each expert, and the effective number of
    experts."""
    wide = max(len(use.path) for use in uses)
    experts = len(uses[0].mean)
    head = f"{'module':{wide}s}  A  " + " ".join(f"{'B' + str(i):>6s}" for i in range(experts))
    head += "  effective  first place"
    lines = [head]
    for use in uses:
        lines.append(f"{use.path:{wide}s} {use.block:2d}  " + " ".join(f"{value:6.3f}" for value in use.mean)
                     + f"  {use.effective:9.2f}  " + "/".join(f"{100 * value:.0f} %" for value in use.top))
    return lines
