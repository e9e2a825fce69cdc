"""What answers a test: the base model, the adapter, the adapter with contrasts; one resumable evaluation each."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.distributed.workers import Workers

if TYPE_CHECKING:
    from colora_ms.decoding import Contrast, Generator
    from colora_ms.evaluation.benchmarks import TextPerplexity
    from colora_ms.evaluation.evaluate import EvaluationResult
    from colora_ms.evaluation.interfaces import PromptTemplate, Question
    from colora_ms.evaluation.likelihood import ChoiceItem, ChoiceResult
    from colora_ms.recipes.settings import EvaluationSettings
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.examples import Example

#: Name of the trained adapter inside the generator.
ADAPTER = "trained"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decoder: ``key`` for file names, ``label`` for tables, whether it is ``adapted``, its ``contrast`` or
    None."""

    key: str
    label: str
    adapted: bool
    contrast: Contrast | None = None


def choices(decoders: Sequence[str | Contrast], name: str = "LoRA", generates: bool = True) -> list[Choice]:
    """The :class:`Choice` of each decoder that ``settings.expand`` gave.

    Args:
        decoders: "base", "greedy" and :class:`Contrast`.
        name: the adapter's kind, for the labels.
        generates: whether the task generates text, so that "greedy" means something.
    """
    found = []
    for one in decoders:
        if one == "base":
            found.append(Choice("base", "base", False))
        elif isinstance(one, str):
            found.append(Choice("greedy", f"{name}, greedy" if generates else name, True))
        else:
            form = "" if one.adapt == "fixed" and not one.skip_copies else one.label.split(", alpha")[0] + ", "
            key = f"cold-{one.adapt}{'-nocopies' if one.skip_copies else ''}-{one.alpha:g}-{one.beta:g}"
            found.append(Choice(key, f"{name} + CoLD ({form}alpha {one.alpha:g}, beta {one.beta:g})", True, one))
    return found


def answer(generator: Any, examples: Sequence[Question], chosen: Choice, *, template: PromptTemplate,
           scorer: str, max_new_tokens: int, folder: str | Path, stop: Sequence[str] = (), rows: int | None = None,
           model_hash: str = "", adapter_hash: str = "", keep_records: bool = False,
           team: Workers = Workers()) -> EvaluationResult:
    """``evaluate`` with one decoder; batches fill ``rows`` rows.

    Args:
        generator: has the adapter under the name ``ADAPTER``.
        chosen: :class:`Choice`.
        folder: where the items go, ``<key>.jsonl``; an interrupted evaluation goes on from there.
        the others: as in ``evaluation.evaluate.evaluate``.

    Returns:
        EvaluationResult.
    """
    from colora_ms.evaluation.evaluate import evaluate

    rows = rows or generator.max_rows
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "records": True, "stop": list(stop)}
    if chosen.adapted:
        options["adapter"] = ADAPTER
    if chosen.contrast is not None:
        options["contrast"] = chosen.contrast
    return evaluate(generator, examples, scorer, template=template, path=Path(folder) / f"{chosen.key}.jsonl",
                    batch_size=max(rows // (1 if chosen.contrast is None else 2), 1), options=options,
                    model_hash=model_hash, adapter_hash=adapter_hash if chosen.adapted else "",
                    keep_records=keep_records,
                    team=team)


def read_items(settings: EvaluationSettings) -> list[Example] | list[ChoiceItem] | str:
    """The items of the section ``evaluate``: examples, multiple-choice items, or a text; read before the training.

    Raises:
        DataError: the data cannot be read.
    """
    source: Any = settings.data
    if settings.task == "perplexity":
        from colora_ms.evaluation.benchmarks import read_text
        return read_text(source)[:settings.items]
    if settings.task == "choice":
        from colora_ms.evaluation.benchmarks import read_commonsense
        return read_commonsense(source, settings.form, settings.items)
    from colora_ms.training.sources import load_examples
    return load_examples(source)[:settings.items]


class Subject:
    """Base and trained model, loaded when they are asked for.

    Args:
        config: the recipe.
        trained: folder of the adapter, or of the quantised model if ``quantised``.
        rows: rows of the generator's batches.
    """

    def __init__(self, config: TrainingConfig, trained: str | Path, rows: int, quantised: bool = False) -> None:
        self.config, self.trained, self.rows, self.quantised = config, trained, rows, quantised
        self.hashes = self._hashes()
        self._loaded: tuple[Any, Any] = (None, None)

    def _hashes(self) -> dict[str, str]:
        from colora_ms.adapters import digest
        from colora_ms.evaluation.evaluate import file_digest, model_hash

        return {"model": model_hash(self.config.model, self.config.weight_format),
                "trained": file_digest(self.trained) if self.quantised else digest(self.trained)}

    def generator(self, adapted: bool) -> Generator:
        """The Generator that has the base model (and the adapter), or the quantised model."""
        from colora_ms.decoding import Generator

        source: Any = self.trained if self.quantised and adapted else self.config.model
        if self._loaded[0] != source:
            self._loaded = (None, None)
            gc.collect()  # one model at a time in memory
            adapters = None if self.quantised else {ADAPTER: self.trained}
            self._loaded = (source, Generator.from_pretrained(
                source, adapters, weight_format=self.config.weight_format, max_rows=self.rows))
        return self._loaded[1]

    def measure(self, chosen: Choice, items: Any, settings: EvaluationSettings, folder: str | Path,
                team: Workers = Workers()) -> EvaluationResult | ChoiceResult | TextPerplexity:
        """Evaluate one decoder; the result of ``evaluate``, ``evaluate_choices`` or ``evaluate_perplexity``."""
        generator = self.generator(chosen.adapted)
        if self.quantised and chosen.adapted:
            hashes = {"model_hash": self.hashes["trained"], "adapter_hash": ""}
        else:
            hashes = {"model_hash": self.hashes["model"],
                      "adapter_hash": self.hashes["trained"] if chosen.adapted else ""}
        if settings.task == "problems":
            return self._answers(generator, chosen, items, settings, folder, hashes, team)
        from colora_ms.evaluation.benchmarks import evaluate_choices, evaluate_perplexity
        from colora_ms.evaluation.decoder_scorer import DecoderScorer

        slot = generator.adapters.slot(ADAPTER) if chosen.adapted and not self.quantised else -1
        scorer = DecoderScorer(generator.decoder, slot, rows=settings.rows)
        shared: dict[str, Any] = dict(path=Path(folder) / f"{chosen.key}.jsonl", batch_size=settings.rows, team=team,
                                      **hashes)
        if settings.task == "choice":
            return evaluate_choices(scorer, generator.tokenizer, items, normalise=settings.normalise, **shared)
        return evaluate_perplexity(scorer, generator.tokenizer, items, window=settings.window, stride=settings.stride,
                                   **shared)

    def _answers(self, generator: Generator, chosen: Choice, items: Sequence[Question], settings: EvaluationSettings,
                 folder: str | Path, hashes: dict[str, str], team: Workers) -> EvaluationResult:
        from colora_ms.training.templates import make_template

        template = make_template(settings.template or self.config.data.template, generator.tokenizer,
                                 self.config.data.system)
        if self.quantised and chosen.adapted:
            chosen = dataclasses.replace(chosen, adapted=False)
        return answer(generator, items, chosen, template=template, scorer=settings.scorer, folder=folder,
                      max_new_tokens=settings.max_new_tokens, stop=settings.stop, rows=settings.rows, team=team,
                      model_hash=hashes["model_hash"], adapter_hash=hashes["adapter_hash"])
