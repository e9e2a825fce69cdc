"""Run a generator over examples: one JSON line an item, resumable, and a summary.

The generator is anything with

    generate(prompts, **options) -> list of completions, in order

where a completion has ``text`` (str), ``tokens`` (the ids of the answer, up to the one that ended it)
and ``records`` (details of each of these tokens; may be empty). Both are counted as they come: what a stop
string cuts off is cut off by the generator.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.distributed.workers import Workers
from colora_ms.errors import DataError, DecodingError
from colora_ms.evaluation.item_log import ItemLog, write_json
from colora_ms.evaluation.numbers import extract_number
from colora_ms.evaluation.scoring import Score
from colora_ms.evaluation.scoring import scorer as find_scorer
from colora_ms.evaluation.sharded import ShardedGenerator
from colora_ms.evaluation.significance import PairedTest, mcnemar, wilson_interval
from colora_ms.runtime import all_compilations

if TYPE_CHECKING:
    from colora_ms.evaluation.interfaces import Answer, Prompt, PromptTemplate, Question, TextGenerator


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Outcome of ``evaluate``; ``to_json`` gives a dictionary.

    Attributes:
        items: list of the items' dictionaries (``id``, ``correct``, ``predicted``, ``expected``,
            ``text``, ``tokens``, ``seconds``, with records also ``changed``, the number of tokens
            that the contrast changed; ``refused``, why there is no answer), in the order of the examples.
        accuracy: share of correct items.
        interval: Wilson interval (low, high).
        refused: items that the generator refused (a prompt too long, say); they count as wrong.
        tokens_per_second: generated tokens over time, of the batches in which no graph was compiled (of all, if
            none is left); 0 if nothing was generated in this process.
        setup: what was measured: hashes of template, model and adapter, options.
    """

    items: list[dict]
    accuracy: float
    interval: tuple[float, float]
    refused: int
    tokens_per_second: float
    setup: dict

    @property
    def outcomes(self) -> dict[str, bool]:
        """``{id: correct}``, the input of ``mcnemar``."""
        return {item["id"]: item["correct"] for item in self.items}

    @property
    def changed_share(self) -> float | None:
        """Share of the tokens that the contrast changed; ``None`` where no records were asked for."""
        known = [item for item in self.items if "changed" in item]
        tokens = sum(item["tokens"] for item in known)
        return sum(item["changed"] for item in known) / tokens if tokens else None

    @property
    def mean_tokens(self) -> float:
        """Tokens of an answer; items that were refused have none. 0 without answers."""
        answered = [item["tokens"] for item in self.items if "refused" not in item]
        return sum(answered) / len(answered) if answered else 0.0

    def compare(self, other: EvaluationResult) -> PairedTest:
        """Exact McNemar test of ``other`` against this result on the same items."""
        return mcnemar(self.outcomes, other.outcomes)

    def to_json(self) -> dict:
        """The summary without the items."""
        return {"accuracy": self.accuracy, "correct": sum(i["correct"] for i in self.items),
                "items": len(self.items), "interval": list(self.interval),
                "refused": self.refused, "tokens_per_second": self.tokens_per_second,
                "changed_share": self.changed_share,
                "mean_tokens": self.mean_tokens,
                "setup": self.setup}

    def summary(self) -> str:
        """One line for people."""
        low, high = self.interval
        text = (f"{100 * self.accuracy:.1f} % of {len(self.items)} "
                f"[{100 * low:.1f}, {100 * high:.1f}], {self.tokens_per_second:.1f} tokens/s")
        return text + self._refusals()

    def _refusals(self) -> str:
        """How many items were refused and counted as wrong, and why the first one was."""
        refused = [item for item in self.items if "refused" in item]
        if not refused:
            return ""
        first = refused[0]
        return f", {len(refused)} refused and counted as wrong (the first is {first['id']}: {first['refused']})"


def evaluate(generator: TextGenerator, examples: Sequence[Question],
             scorer: str | Callable[[str, Any], Score] = "number", *, template: PromptTemplate,
             path: str | Path | None = None, batch_size: int = 8, options: dict | None = None, model_hash: str = "",
             adapter_hash: str = "", resume: bool = True, keep_records: bool = False,
             progress: Callable[[int, int, int], Any] | None = None, team: Workers = Workers()) -> EvaluationResult:
    """Generate an answer to every example and score it.

    Args:
        generator: see the head of this module.
        examples: objects with ``id``, ``completion`` and whatever ``template`` reads.
        scorer: a name of ``scoring.SCORERS`` or a function ``(text, example) -> Score``.
        template: has ``request(example)``, the prompt for ``generate``, and ``digest`` (the templates
            of ``training.data`` do). A ``check(examples)`` is called before anything is generated; a
            dictionary ``setup`` becomes part of the setup (``benchmarks.FewShotTemplate`` has both).
        path: JSON lines of the items; the summary goes to ``<path without suffix>.summary.json``.
            ``None`` writes nothing.
        batch_size: prompts of one ``generate`` call of one worker.
        options: keyword arguments of ``generate`` (adapter, contrast, max_new_tokens, ...); what
            they are is part of the setup that a resumed run checks.
        model_hash, adapter_hash: names or digests of the weights, kept in the results.
        resume: continue a file of an interrupted run; its items are not generated again.
        keep_records: write each token's details too.
        progress: called with ``(items done, items, correct so far)`` after each batch.
        team: ``Workers``; several of them split each batch, return the same result, and the first one
            writes. All have to call with the same arguments.

    Returns:
        EvaluationResult.

    Raises:
        DataError: no examples, doubled ids, a file of another setup or that cannot be written.
        DecodingError: the generator refused every prompt of the first batch.
    """
    score = find_scorer(scorer)
    options = dict(options or {})
    examples = list(examples)
    _check_examples(examples)
    if scorer == "number":
        _check_numbers(examples)
    if hasattr(template, "check"):
        template.check(examples)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size is {batch_size!r}, expected an integer of at least 1")
    setup = {"template": template.digest, "model": model_hash, "adapter": adapter_hash,
             "scorer": scorer if isinstance(scorer, str) else getattr(scorer, "__name__", "own"),
             "options": {key: _plain(value) for key, value in sorted(options.items())},
             "examples": _digest_examples(examples), **getattr(template, "setup", {})}
    log = ItemLog(path, setup, resume, team)
    if team.world > 1:
        generator, batch_size = ShardedGenerator(generator, team), batch_size * team.world
    done = log.items
    waiting = [example for example in examples if example.id not in done]
    timed = []  # (tokens, seconds, whether a graph was compiled) of each batch
    try:
        for start in range(0, len(waiting), batch_size):
            chunk = waiting[start:start + batch_size]
            compiled, began = all_compilations(), time.perf_counter()
            completions = _generate(generator, [template.request(item) for item in chunk], options,
                                    first=not done)
            seconds = team.share(time.perf_counter() - began)  # all workers return the same items
            rows = [_item(example, completion, score, seconds / len(chunk), keep_records)
                    for example, completion in zip(chunk, completions)]
            log.add(rows)
            timed.append((sum(row["tokens"] for row in rows), seconds, all_compilations() > compiled))
            if progress is not None:
                progress(len(done), len(examples), sum(row["correct"] for row in done.values()))
    finally:
        log.close()
    timed = [batch for batch in timed if not batch[2]] or timed
    timed_seconds = sum(seconds for _, seconds, _ in timed)
    items = [done[example.id] for example in examples]
    correct = sum(item["correct"] for item in items)
    result = EvaluationResult(
        items=items, accuracy=correct / len(items), interval=wilson_interval(correct, len(items)),
        refused=sum("refused" in item for item in items),
        tokens_per_second=sum(tokens for tokens, _, _ in timed) / timed_seconds if timed_seconds else 0.0,
        setup=setup)
    if path is not None and team.first:
        write_json(Path(path).with_suffix(".summary.json"), result.to_json())
    return result


def _check_numbers(examples: Sequence[Question]) -> None:
    """Right answers without a number can never be met: refuse if all are such, else say how many."""
    without = [example.id for example in examples if extract_number(example.completion) is None]
    if len(without) == len(examples):
        raise DataError(f"none of the {len(examples)} right answers holds a number (the first is of {without[0]}), so "
                        "that the scorer 'number' would count every answer as wrong; use scorer exact or normalised")
    if without:
        warnings.warn(f"{len(without)} of {len(examples)} right answers hold no number and count as wrong whatever is "
                      f"answered (the first is of {without[0]})", stacklevel=3)


def _check_examples(examples: Sequence[Question]) -> None:
    if not examples:
        raise DataError("there are no examples to evaluate")
    seen = set()
    for example in examples:
        if not isinstance(example.id, str) or not example.id:
            raise DataError(f"an example has the id {example.id!r}; evaluation needs a name for "
                            "each one")
        if example.id in seen:
            raise DataError(f"two examples have the id {example.id!r}; ids must be unique")
        seen.add(example.id)


def _generate(generator: TextGenerator, prompts: list[Prompt], options: dict,
              first: bool) -> list:
    """Completions of a batch; a refused prompt gives its error instead, the others go on."""
    try:
        return _checked(generator.generate(prompts, **options), len(prompts))
    except DecodingError as error:
        if len(prompts) == 1:
            if first:
                raise
            return [error]
    results: list = []
    for prompt in prompts:
        try:
            results += _checked(generator.generate([prompt], **options), 1)
        except DecodingError as error:
            results.append(error)
    if first and all(isinstance(result, DecodingError) for result in results):
        raise results[0]  # nothing works: the options are wrong, not one prompt
    return results


def _checked(completions: Any, count: int) -> list[Answer]:
    completions = list(completions)
    if len(completions) != count:
        raise DataError(f"the generator gave {len(completions)} completions for {count} prompts")
    return completions


def _item(example: Question, completion: Any, score: Callable[[str, Any], Score], seconds: float,
          keep_records: bool) -> dict:
    if isinstance(completion, DecodingError):
        return {"id": example.id, "correct": False, "predicted": "", "text": "", "tokens": 0,
                "expected": example.completion, "seconds": seconds, "refused": str(completion)}
    outcome = score(completion.text, example)
    row = {"id": example.id, "correct": bool(outcome.correct), "predicted": outcome.predicted,
           "expected": outcome.expected, "text": completion.text,
           "tokens": len(completion.tokens), "seconds": seconds}
    if completion.records:
        # Tokens where the contrast chose another one than the expert's favourite.
        row["changed"] = sum(bool(getattr(record, "changed", False)) for record in completion.records)
    if keep_records and completion.records:
        row["records"] = [_plain(record) for record in completion.records]
    return row


def _digest_examples(examples: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.id, str(getattr(example, "question", "")), example.completion):
            digest.update(text.encode("utf-8", "replace") + b"\0")
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """``value`` as JSON types; dataclasses become dictionaries, other objects their repr."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name))
                for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return _plain(value.item())
    return repr(value)


def model_hash(model: str | Path, weight_format: str) -> str:
    """Digest of a model's files (known name, folder or file) and the format of its weights, for results files."""
    from colora_ms.models.checkpoint import resolve_model

    return f"{file_digest(resolve_model(model))}:{weight_format}"


def file_digest(path: str | Path) -> str:
    """Digest of a file, or of all files below a folder (names and contents): a model's hash.

    Raises:
        DataError: there is nothing at ``path``.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
    else:
        files = [path]
    digest = hashlib.sha256()
    try:
        for item in files:
            if path.is_dir():
                digest.update(item.relative_to(path).as_posix().encode() + b"\0")
            with open(item, "rb") as handle:
                for block in iter(lambda: handle.read(1 << 20), b""):
                    digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: "
                        f"{error.strerror or error}") from None
    return digest.hexdigest()[:16]
