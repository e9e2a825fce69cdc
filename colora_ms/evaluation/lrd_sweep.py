"""The design space of low-rank decomposition, measured: placement, matrices and rank against size and quality.

Quality is measured with the products of the factors in one compiled model: the output is that of the factors, and no
variant has to be compiled. Latency needs the factors themselves, see :mod:`colora_ms.evaluation.lrd_latency`.
Source of the design space: arXiv 2405.06626.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colora_ms.decomposition.plan import GROUPS, LrdPlan, linear_shapes, place, plan_for
from colora_ms.decomposition.tucker import factorise
from colora_ms.errors import ConfigError

if TYPE_CHECKING:
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder


@dataclass(frozen=True)
class Variant:
    """One point of the design space: a plan, or blocks that are left out altogether, or (neither) the model itself."""

    name: str
    placement: str = ""
    plan: LrdPlan | None = None
    dropped: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the blocks that are changed."""
        planned: Any = self.plan.layers if self.plan else ()
        return self.dropped or planned

    def cost(self, config: DecoderConfig) -> dict:
        """{"parameters", "reduction", "macs"}: macs are the multiplications of the linears and the head for one
        token."""
        shapes = linear_shapes(config)
        total, linears = config.parameter_count(), sum(out * inner for out, inner in shapes.values())
        saved = weights = 0
        if self.dropped:
            prefixes = tuple(f"model.layers.{layer}." for layer in self.dropped)
            saved = sum(int(np.prod(shape)) for name,
                        shape in config.parameter_shapes().items() if name.startswith(prefixes))
            weights = sum(out * inner for path, (out, inner) in shapes.items() if path.startswith(prefixes))
        elif self.plan:
            saved = weights = sum(piece.saved for piece in self.plan.resolve(shapes).values())
        return {"parameters": total - saved, "reduction": saved / total,
                "macs": linears - weights + config.vocab_size * config.hidden_size}


def variants(config: DecoderConfig, share: float = 0.09,
             placements: Sequence[str] = ("early", "middle", "late", "spread"),
             tensors: Sequence[str] = ("all", "attn", "mlp"), ranks: Sequence[int] = (), factors: int = 3,
             drop: bool = True) -> list[Variant]:
    """The variants of a sweep, the model itself first.

    Args:
        config: DecoderConfig; share: of the parameters that each plan removes at least (see ``plan_for``).
        ranks: ranks to try beside the one that ``plan_for`` finds, in the same blocks; those past break-even are left
            out.
        drop: also leave out the blocks altogether that the plans for all matrices decompose.
    """
    found = [Variant("base")]
    for kind in tensors:
        for placement in placements:
            plan = plan_for(config, share, placement, kind, factors)
            for rank in dict.fromkeys((plan.rank, *ranks)):
                one = dataclasses.replace(plan, rank=rank)
                try:
                    one.resolve(linear_shapes(config))
                except ConfigError:
                    continue
                found.append(Variant(f"{kind} {placement} r{rank}", placement, one))
    if drop:
        for placement in placements:
            count = len(plan_for(config, share, placement, "all", factors).layers)
            found.append(Variant(f"drop {placement}", placement,
                                 dropped=place(config.num_hidden_layers, count, placement)))
    return found


class Switch:
    """Turns a dense decoder into a variant and back by writing weights: nothing is compiled anew.

    Args:
        decoder: float32 :class:`Decoder` without adapters.
        variants: those it will show; their largest rank bounds what is kept of the decompositions.
    """

    def __init__(self, decoder: Decoder, variants_: Sequence[Variant]) -> None:
        self.parameters = {p.name: p for p in decoder.get_parameters()}
        self.shapes = linear_shapes(decoder.config)
        self.rank: dict[str, int] = {}
        for variant in variants_:
            for path, piece in (variant.plan.resolve(self.shapes) if variant.plan else {}).items():
                self.rank[path] = max(piece.rank, self.rank.get(path, 0))
        self._kept: dict[str, np.ndarray] = {}
        self._factors: dict[str, Any] = {}

    def show(self, variant: Variant) -> None:
        """Put the variant's weights in; what an earlier one changed is restored first."""
        self.restore()
        if variant.dropped:
            # A block whose two output matrices are zero adds nothing to the residual stream: it is left out.
            for layer in variant.dropped:
                for last in ("self_attn.o_proj", "mlp.down_proj"):
                    path = f"model.layers.{layer}.{last}"
                    self._set(path, np.zeros(self.shapes[path], np.float32))
                    if f"{path}.bias" in self.parameters:
                        self._write(f"{path}.bias", np.zeros(self.shapes[path][0], np.float32))
        elif variant.plan:
            for path, piece in variant.plan.resolve(self.shapes).items():
                found = self._decomposed(path)
                self._set(path, (found.outer[:, :piece.rank] @ found.core[:piece.rank,
                                                                          :piece.rank]) @ found.inner[:piece.rank])

    def restore(self) -> None:
        """Put the model's own weights back, bit for bit."""
        from mindspore import Tensor

        for name, value in self._kept.items():
            self.parameters[name].set_data(Tensor(value))
        self._kept = {}

    def _decomposed(self, path: str) -> Any:
        if path not in self._factors:
            self._factors[path] = factorise(self.parameters[f"{path}.weight"].asnumpy(), self.rank[path])
        return self._factors[path]

    def _set(self, path: str, value: Any) -> None:
        self._write(f"{path}.weight", value)

    def _write(self, name: str, value: Any) -> None:
        from mindspore import Tensor

        self._kept[name] = self.parameters[name].asnumpy().copy()
        self.parameters[name].set_data(Tensor(np.ascontiguousarray(value, np.float32)))


def describe(variant: Variant, config: DecoderConfig) -> dict:
    """The row of a variant before anything is measured."""
    cost = variant.cost(config)
    plan: Any = variant.plan
    kind = "-" if not variant.layers else "drop" if variant.dropped else \
        plan.tensors if plan.tensors in GROUPS else ",".join(plan.tensors)
    return {"name": variant.name, "placement": variant.placement, "tensors": kind, "layers": list(variant.layers),
            "rank": 0 if plan is None else plan.rank, "factors": 0 if plan is None else plan.factors, **cost,
            "bytes": 4 * cost["parameters"], "perplexity": None, "accuracy": None, "items": None,
            "step_ms": None, "step_ratio": None, "prefill_ms": None, "prefill_ratio": None}


def points_lost(row: dict, base: dict) -> float | None:
    """Accuracy points that a row loses against the model itself, or None where one of the two is not measured."""
    if row["accuracy"] is None or base["accuracy"] is None:
        return None
    return 100 * (base["accuracy"] - row["accuracy"])


def pareto(rows: Sequence[dict]) -> set[str]:
    """Names of the rows that no other row beats in all of size, quality and (where all have it) latency.

    Quality is the accuracy where the rows have it, else the perplexity; rows without quality are left out.
    """
    usable = [row for row in rows if row["perplexity"] is not None]
    with_accuracy = [row for row in usable if row["accuracy"] is not None]
    if len(with_accuracy) > 1:
        usable = with_accuracy
    timed = bool(usable) and all(row["step_ratio"] is not None for row in usable)

    def point(row: dict) -> tuple:
        quality = (-row["accuracy"], row["perplexity"]) if row["accuracy"] is not None else (row["perplexity"],)
        return (row["parameters"], *quality) + ((row["step_ratio"],) if timed else ())

    def beats(a: tuple, b: tuple) -> bool:
        return all(x <= y for x, y in zip(a, b)) and a != b

    return {row["name"] for row in usable if not any(beats(point(other), point(row)) for other in usable)}


def recommend(rows: Sequence[dict], tolerance: float) -> str:
    """The name of the smallest variant that loses at most ``tolerance`` accuracy points; the base if there is none.

    Between variants of one size the one with the lowest perplexity wins. Rows without an accuracy are not considered.
    """
    base = rows[0]
    lost = [(row, points_lost(row, base)) for row in rows]
    fit = [row for row, points in lost if points is not None and points <= tolerance]
    if not fit:
        return base["name"]
    return min(fit, key=lambda row: (row["parameters"], row["perplexity"] or np.inf))["name"]


def table(rows: Sequence[dict], tolerance: float) -> str:
    """The rows as a Markdown table: ``*`` marks the Pareto front, ``<-`` the recommendation."""
    base, front, best = rows[0], pareto(rows), recommend(rows, tolerance)
    lines = ["| variant | blocks | rank | parameters | fewer | M mult-adds | perplexity | accuracy | points lost | "
             "step ms | step | prefill | |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lost = points_lost(row, base)
        mark = ("*" if row["name"] in front else "") + (" <-" if row["name"] == best else "")
        lines.append("| " + " | ".join([
            row["name"], _blocks(row["layers"]), str(row["rank"] or ""), f"{row['parameters']:,}",
            f"{row['reduction']:.1%}",
            f"{row['macs'] / 1e6:.1f}", _number(row["perplexity"], ".2f"),
            _number(row["accuracy"], ".1%"), _number(lost, "+.1f"), _number(row["step_ms"], ".2f"),
            _change(row["step_ratio"]), _change(row["prefill_ratio"]), mark.strip()]) + " |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _change(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio - 1:+.1%}"


def _blocks(layers: Sequence[int]) -> str:
    """Block numbers with runs as ranges."""
    runs = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
