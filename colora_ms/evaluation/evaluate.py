"""Run a generator over examples: one JSON line an item, resumable, and a summary.

The generator is anything with

    generate(prompts, **options) -> list of completions, in order

where a completion has ``text`` (str), ``tokens`` (the ids of the answer, up to the one that ended it)
and ``records`` (details of each of these tokens; may be empty). Both are counted as they come: what a stop
string cuts off is cut off by the generator.
"""

import dataclasses
import hashlib
import json
import time
import warnings
from pathlib import Path

from colora_ms.errors import DataError, DecodingError
from colora_ms.evaluation.sharded import ShardedGenerator
from colora_ms.evaluation.numbers import extract_number
from colora_ms.evaluation.scoring import scorer as find_scorer
from colora_ms.evaluation.significance import mcnemar, wilson_interval
from colora_ms.files import replacing
from colora_ms.runtime import all_compilations
from colora_ms.distributed.workers import Workers


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

    items: list
    accuracy: float
    interval: tuple
    refused: int
    tokens_per_second: float
    setup: dict

    @property
    def outcomes(self):
        """``{id: correct}``, the input of ``mcnemar``."""
        return {item["id"]: item["correct"] for item in self.items}

    @property
    def changed_share(self):
        """Share of the tokens that the contrast changed; ``None`` where no records were asked for."""
        known = [item for item in self.items if "changed" in item]
        tokens = sum(item["tokens"] for item in known)
        return sum(item["changed"] for item in known) / tokens if tokens else None

    @property
    def mean_tokens(self):
        """Tokens of an answer; items that were refused have none. 0 without answers."""
        answered = [item["tokens"] for item in self.items if "refused" not in item]
        return sum(answered) / len(answered) if answered else 0.0

    def compare(self, other):
        """Exact McNemar test of ``other`` against this result on the same items."""
        return mcnemar(self.outcomes, other.outcomes)

    def to_json(self):
        """The summary without the items."""
        return {"accuracy": self.accuracy, "correct": sum(i["correct"] for i in self.items),
                "items": len(self.items), "interval": list(self.interval),
                "refused": self.refused, "tokens_per_second": self.tokens_per_second,
                "changed_share": self.changed_share,
                "mean_tokens": self.mean_tokens,
                "setup": self.setup}

    def summary(self):
        """One line for people."""
        low, high = self.interval
        text = (f"{100 * self.accuracy:.1f} % of {len(self.items)} "
                f"[{100 * low:.1f}, {100 * high:.1f}], {self.tokens_per_second:.1f} tokens/s")
        return text + self._refusals()

    def _refusals(self):
        """How many items were refused and counted as wrong, and why the first one was."""
        refused = [item for item in self.items if "refused" in item]
        if not refused:
            return ""
        first = refused[0]
        return f", {len(refused)} refused and counted as wrong (the first is {first['id']}: {first['refused']})"


def evaluate(generator, examples, scorer="number", *, template, path=None, batch_size=8,
             options=None, model_hash="", adapter_hash="", resume=True, keep_records=False,
             progress=None, team=Workers()):
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


def _check_numbers(examples):
    """Right answers without a number can never be met: refuse if all are such, else say how many."""
    without = [example.id for example in examples if extract_number(example.completion) is None]
    if len(without) == len(examples):
        raise DataError(f"none of the {len(examples)} right answers holds a number (the first is of {without[0]}), so that the "
                        "scorer 'number' would count every answer as wrong; use scorer exact or normalised")
    if without:
        warnings.warn(f"{len(without)} of {len(examples)} right answers hold no number and count as wrong whatever is answered "
                      f"(the first is of {without[0]})", stacklevel=3)


def _check_examples(examples):
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


def _generate(generator, prompts, options, first):
    """Completions of a batch; a refused prompt gives its error instead, the others go on."""
    try:
        return _checked(generator.generate(prompts, **options), len(prompts))
    except DecodingError as error:
        if len(prompts) == 1:
            if first:
                raise
            return [error]
    results = []
    for prompt in prompts:
        try:
            results += _checked(generator.generate([prompt], **options), 1)
        except DecodingError as error:
            results.append(error)
    if first and all(isinstance(result, DecodingError) for result in results):
        raise results[0]  # nothing works: the options are wrong, not one prompt
    return results


def _checked(completions, count):
    completions = list(completions)
    if len(completions) != count:
        raise DataError(f"the generator gave {len(completions)} completions for {count} prompts")
    return completions


def _item(example, completion, score, seconds, keep_records):
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


class ItemLog:
    """The JSON lines of an evaluation: a head line with the setup, then one line an item.

    Of several workers the first one reads and writes the file, and all know the items.
    """

    def __init__(self, path, setup, resume, team=Workers()):
        self.items = {}
        self._handle = None
        if path is not None and team.first:
            self._open(path, setup, resume)
        if path is not None:
            self.items = team.share(self.items)

    def _open(self, path, setup, resume):
        path = Path(path)
        keep = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.is_file():
                keep = self._read(path, setup)
            self._handle = open(path, "r+b" if keep else "wb")
            if keep:
                # An interrupted run may end in half a line: cut it off, then append.
                self._handle.truncate(keep)
                self._handle.seek(keep)
            else:
                self._write({"setup": setup})
        except OSError as error:
            raise DataError(f"cannot write the evaluation to {path}: "
                            f"{error.strerror or error}") from None

    def _read(self, path, setup):
        """Take over the complete lines of an earlier run; returns how many bytes they fill."""
        keep = 0
        with open(path, "rb") as handle:
            for number, raw in enumerate(handle):
                if not raw.endswith(b"\n"):
                    break
                try:
                    row = json.loads(raw)
                except (ValueError, RecursionError):
                    row = None
                if number == 0:
                    earlier = row.get("setup") if isinstance(row, dict) else None
                    if earlier != json.loads(json.dumps(setup)):
                        raise DataError(_other_setup(path, earlier, setup))
                elif isinstance(row, dict) and isinstance(row.get("correct", False), bool) \
                        and isinstance(row.get("tokens"), int) and isinstance(row.get("id"), str):
                    self.items[row["id"]] = row
                else:
                    raise DataError(f"{path}:{number + 1} is not an item of an evaluation; "
                                    "move the file away or use resume=False")
                keep += len(raw)
        return keep

    def add(self, rows):
        """Keep and write items: dicts with a string "id" and what the evaluation knows of each."""
        for row in rows:
            self.items[row["id"]] = row
            self._write(row)

    def _write(self, row):
        if self._handle is not None:
            self._handle.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
                               + b"\n")
            self._handle.flush()

    def close(self):
        """Close the file, if this worker has it open."""
        if self._handle is not None:
            self._handle.close()


def _other_setup(path, earlier, setup):
    if not isinstance(earlier, dict):
        return (f"{path} exists and is not an evaluation of this package; choose another path or "
                "use resume=False to overwrite it")
    differing = [key for key in setup
                 if earlier.get(key) != json.loads(json.dumps(setup[key]))]
    listing = "; ".join(f"{key} was {earlier.get(key)!r}, now {setup[key]!r}" for key in differing)
    return (f"{path} holds an evaluation of another setup ({listing}); choose another path or use "
            "resume=False to overwrite it")


def _digest_examples(examples):
    digest = hashlib.sha256()
    for example in examples:
        for text in (example.id, str(getattr(example, "question", "")), example.completion):
            digest.update(text.encode("utf-8", "replace") + b"\0")
    return digest.hexdigest()[:16]


def _plain(value):
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


def write_json(path, value):
    """Write through a temporary file, so that a summary is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Write a text file, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    with replacing(path, lambda reason: DataError(f"cannot write {path}: {reason}")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def model_hash(model, weight_format):
    """Digest of a model's files (known name, folder or file) and the format of its weights, for results files."""
    from colora_ms.models.checkpoint import resolve_model

    return f"{file_digest(resolve_model(model))}:{weight_format}"


def file_digest(path):
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
