"""Contrasts against greedy decoding of the same adapter: the comparison, and the choice of one or of none.

Greedy decoding is run as a contrast with beta = 0, which gives the same tokens and tells at each one how many tokens
were valid. Where only one was valid at every step of an answer, every contrast with at least that alpha gives the same
answer, so such *settled* items are not decoded again: the comparison is exact and costs only the items that a contrast
can change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.decoding import Contrast
from colora_ms.errors import ConfigError
from colora_ms.evaluation.evaluate import EvaluationResult, evaluate
from colora_ms.evaluation.significance import best_of_many, mcnemar, wilson_interval

if TYPE_CHECKING:
    from colora_ms.evaluation.interfaces import PromptTemplate, Question, TextGenerator
    from colora_ms.evaluation.scoring import Score
    from colora_ms.evaluation.significance import PairedTest

#: What is tried where nothing else is asked for: the paper's rule, and the adaptive forms.
DEFAULT_GRID = (
    Contrast(0.1, 0.25), Contrast(0.1, 0.5), Contrast(0.1, 1.0), Contrast(0.3, 0.5), Contrast(0.3, 1.0),
    Contrast(0.1, 0.5, "entropy"), Contrast(0.1, 1.0, "entropy"),
    Contrast(0.1, 1.0, "divergence"), Contrast(0.1, 2.0, "divergence"),
    Contrast(0.1, 0.5, "margin"), Contrast(0.1, 1.0, "margin"),
    Contrast(0.1, 0.5, skip_copies=True),
)


@dataclasses.dataclass(frozen=True)
class ContrastOutcome:
    """One contrast on all items.

    Attributes:
        contrast: the :class:`Contrast`.
        outcomes: ``{id: was it right}``.
        changed, tokens: tokens that the contrast changed, and all tokens of the answers.
        test: :class:`PairedTest` of it against greedy decoding.
    """

    contrast: Contrast
    outcomes: dict[str, bool]
    changed: int
    tokens: int
    test: PairedTest

    @property
    def accuracy(self) -> float:
        """Share of the items that were answered right."""
        return sum(self.outcomes.values()) / len(self.outcomes)

    @property
    def changed_share(self) -> float:
        """Share of the tokens that the contrast changed; 0 without tokens."""
        return self.changed / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict:
        """Numbers for a results file."""
        correct, items = sum(self.outcomes.values()), len(self.outcomes)
        return {"contrast": dataclasses.asdict(self.contrast), "label": self.contrast.label, "correct": correct,
                "items": items, "accuracy": self.accuracy, "interval": list(wilson_interval(correct, items)),
                "fixed": self.test.second_only, "broken": self.test.first_only, "p_value": self.test.p_value,
                "changed_share": self.changed_share}


@dataclasses.dataclass(frozen=True)
class ContrastComparison:
    """Greedy decoding and several contrasts on the same items.

    Attributes:
        greedy: ``{id: was it right}`` of greedy decoding with the adapter.
        results: a :class:`ContrastOutcome` a contrast.
        settled: items whose answer no contrast could change.
        refused: items that the generator refused; they count as wrong for every decoder.
        setup: hashes and options, as ``evaluate`` writes them.
    """

    greedy: dict[str, bool]
    results: list[ContrastOutcome]
    settled: int
    setup: dict
    refused: int = 0

    @property
    def accuracy(self) -> float:
        """Accuracy of greedy decoding."""
        return sum(self.greedy.values()) / len(self.greedy)

    def to_json(self) -> dict:
        """Everything but the items."""
        correct, items = sum(self.greedy.values()), len(self.greedy)
        return {"items": items, "settled": self.settled, "refused": self.refused, "setup": self.setup,
                "greedy": {"correct": correct, "accuracy": self.accuracy,
                           "interval": list(wilson_interval(correct, items))},
                "contrasts": [result.to_json() for result in self.results]}

    def table(self) -> str:
        """Markdown table."""
        low, high = wilson_interval(sum(self.greedy.values()), len(self.greedy))
        lines = ["| decoder | accuracy | 95 % interval | fixed | broken | p | tokens changed |",
                 "|---|---|---|---|---|---|---|",
                 f"| greedy | {100 * self.accuracy:.1f} % | {100 * low:.1f} - {100 * high:.1f} % | | | | |"]
        for result in self.results:
            row = result.to_json()
            low, high = row["interval"]
            lines.append(f"| {row['label']} | {100 * row['accuracy']:.1f} % | {100 * low:.1f} - {100 * high:.1f} % | "
                         f"{row['fixed']} | {row['broken']} | {row['p_value']:.2g} | {100 * row['changed_share']:.1f} "
                         "% |")
        if self.refused:
            lines += ["", f"{self.refused} of {len(self.greedy)} items were refused and count as wrong for every "
                          "decoder."]
        return "\n".join(lines)


def compare_contrasts(generator: TextGenerator, examples: Sequence[Question], adapter: str,
                      contrasts: Sequence[Contrast], *, template: PromptTemplate,
                      scorer: str | Callable[[str, Any], Score] = "number", max_new_tokens: int = 64,
                      stop: Sequence[str] = (), batch_size: int = 8, folder: str | Path | None = None,
                      model_hash: str = "", adapter_hash: str = "",
                      progress: Callable[[str, str], Any] | None = None) -> ContrastComparison:
    """Answer all examples greedily and with each contrast.

    Args:
        generator: :class:`colora_ms.decoding.Generator`, or what ``evaluate`` takes.
        examples, template, scorer, batch_size, model_hash, adapter_hash: as in ``evaluate``.
        adapter: name of the adapter.
        contrasts: list of :class:`Contrast`.
        max_new_tokens, stop: as in ``Generator.generate``.
        folder: where the items are written; an interrupted comparison goes on from there.
        progress: called with (name of the decoder, one line about it) after each one.

    Returns:
        ContrastComparison.

    Raises:
        ConfigError: no contrasts. DataError, DecodingError: as ``evaluate`` raises them.
    """
    contrasts, examples = list(contrasts), list(examples)
    if not contrasts:
        raise ConfigError("there is no contrast to compare with greedy decoding")

    def run(name: str, chosen: Sequence[Question], contrast: Contrast) -> EvaluationResult:
        path = Path(folder) / f"{name}.jsonl" if folder else None
        return evaluate(generator, chosen, scorer, template=template, path=path, batch_size=batch_size,
                        model_hash=model_hash, adapter_hash=adapter_hash, keep_records=contrast.beta == 0,
                        options={"adapter": adapter, "contrast": contrast, "max_new_tokens": max_new_tokens,
                                 "stop": list(stop), "records": True})

    least = min(contrast.alpha for contrast in contrasts)
    greedy = run("greedy", examples, Contrast(least, 0.0))
    items = {item["id"]: item for item in greedy.items}
    open_ids = {key for key, item in items.items() if "refused" not in item
                and any(record["valid"] > 1 for record in item.get("records", ()))}
    if progress:
        progress("greedy", f"{greedy.summary()}; {len(items) - len(open_ids)} settled")
    waiting = [example for example in examples if example.id in open_ids]
    results = []
    for contrast in contrasts:
        outcomes, changed = greedy.outcomes, 0
        tokens = sum(item["tokens"] for key, item in items.items() if key not in open_ids)
        if waiting and contrast.beta > 0:
            name = f"{contrast.adapt}{'-nocopies' if contrast.skip_copies else ''}-{contrast.alpha:g}-{contrast.beta:g}"
            found = run(name, waiting, contrast)
            outcomes = {**outcomes, **found.outcomes}
            changed = sum(item.get("changed", 0) for item in found.items)
            tokens += sum(item["tokens"] for item in found.items)
        else:
            tokens = sum(item["tokens"] for item in greedy.items)
        results.append(ContrastOutcome(contrast, outcomes, changed, tokens, mcnemar(greedy.outcomes, outcomes)))
        if progress:
            progress(contrast.label, f"{100 * results[-1].accuracy:.1f} %, {results[-1].test.summary()}")
    return ContrastComparison(greedy.outcomes, results, len(items) - len(open_ids), greedy.setup, greedy.refused)


@dataclasses.dataclass(frozen=True)
class ContrastChoice:
    """What ``choose_contrast`` answers.

    Attributes:
        contrast: the contrast to use, or None: decode greedily.
        best: the :class:`ContrastOutcome` with the highest accuracy, whether it is used or not.
        gain: items that it fixes minus items that it breaks.
        p_value: of that gain as the best of all that were tried.
        level: the highest p_value that switches the contrast on.
    """

    contrast: Contrast | None
    best: ContrastOutcome
    gain: int
    p_value: float
    level: float

    def to_json(self) -> dict:
        """Numbers for a results file; "contrast" is None for "off"."""
        return {"contrast": None if self.contrast is None else dataclasses.asdict(self.contrast),
                "best": self.best.to_json(), "gain": self.gain, "p_value": self.p_value, "level": self.level}

    def summary(self) -> str:
        """One line for people."""
        answer = "off" if self.contrast is None else self.contrast.label
        return (f"contrast: {answer} (best of all tried: {self.best.contrast.label}, gain {self.gain} items, "
                f"p = {self.p_value:.3g}, on at p <= {self.level:g})")


def choose_contrast(comparison: ContrastComparison, level: float = 0.05) -> ContrastChoice:
    """The contrast to use, judged on validation items.

    The rule: take the contrast that gains most items (of equals the one that breaks fewer, then the one that changes
    fewer tokens). It is used only if a gain of this size has at most the probability ``level`` as the best of all the
    contrasts that were tried when none of them differs from greedy decoding (``significance.best_of_many``). Otherwise
    the answer is "off".

    Args:
        comparison: :class:`ContrastComparison` on the validation items.
        level: in (0, 1).

    Returns:
        ContrastChoice.

    Raises:
        ConfigError: ``level`` is out of its range.
    """
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ConfigError(f"level is {level!r}, expected a probability between 0 and 1; 0.05 is usual")
    order = sorted(comparison.results,
                   key=lambda r: (r.test.first_only - r.test.second_only, r.test.first_only, r.changed_share))
    found = best_of_many(comparison.greedy, [result.outcomes for result in order])
    best = order[found.best]
    used = found.gain > 0 and found.p_value <= level
    return ContrastChoice(best.contrast if used else None, best, found.gain, found.p_value, float(level))
