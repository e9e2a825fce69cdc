"""Where examples come from: JSON lines, JSON arrays, Hugging Face ``datasets``, generators.

A source is described by a dictionary (a list entry in a recipe):

    {"kind": "jsonl", "path": "data/train.jsonl"}
    {"kind": "json", "path": "boolq/train.json", "columns": {"prompt": "instruction", "completion": "output"}}
    {"kind": "reasoning_gym", "task": "chain_sum", "size": 2000, "seed": 1, "options": {...}}
    {"kind": "running_totals", "size": 2000, "seed": 1, "terms": 4}
    {"kind": "datasets", "path": "openai/gsm8k", "name": "main", "split": "train",
     "prompt_key": "question", "completion_key": "answer"}

What the rows look like is ``layouts``' business: it is recognised from their columns, or named with ``layout``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from colora_ms.errors import DataError, near
from colora_ms.extras import needed
from colora_ms.models.messages import short, strict_json, why_no_json
from colora_ms.training.examples import Example, Preference
from colora_ms.training.generated import running_totals
from colora_ms.training.row_reader import RowReader

_REPORTED = 5  # problems shown in one error; the rest are counted
# Tasks whose items carry a worked solution in their metadata, and where it is.
_WORKED_SOLUTIONS = {"gsm_symbolic": "answer_cot"}


def reasoning_gym_examples(task: str, size: int, seed: int, options: dict | None = None,
                           worked_solution: bool = True) -> list[Example]:
    """Generate examples of a reasoning-gym task; nothing is downloaded.

    Most generators make item ``i`` from the number ``seed + i``: two sets whose seeds are closer
    than their size **share items**. Keep seeds far apart (say 1 and 1000000), and let
    ``without_overlap`` remove what coincides all the same.

    Args:
        task: name of the task, for example ``"chain_sum"``.
        size: number of items (some generators leave a few without an answer; they are dropped).
        seed: the generator's seed, an integer.
        options: further settings of the task, for example ``{"min_terms": 2}``.
        worked_solution: take the step-by-step answer where the task has one (``gsm_symbolic``:
            ends with ``#### number``) in place of the bare result.

    Returns:
        List of ``Example``; ``meta`` holds ``task``, ``seed``, ``index`` and the bare ``answer``.

    Raises:
        DataError: reasoning-gym is not installed, unknown task or option, no usable item.
    """
    with needed("data", "a source of kind reasoning_gym", DataError):
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task {task!r}; it has {len(DATASETS)}, for example "
                        f"chain_sum, gsm_symbolic, spell_backward.{near(task, DATASETS)}")
    for name, value, least in (("size", size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"reasoning-gym task {task}: {name} is {value!r}, expected an integer "
                            f"of at least {least}")
    options = dict(options or {})
    _check_options(task, options, DATASETS[task][1])
    try:
        items = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
        generated = [items[index] for index in range(len(items))]
    except Exception as error:  # the generators assert on their settings in many ways
        raise DataError(f"reasoning-gym could not generate {task} with {options}: "
                        f"{type(error).__name__}: {error}") from None
    examples = []
    for index, item in enumerate(generated):
        metadata = item.get("metadata") or {}
        answer = item["answer"]
        completion = answer
        if worked_solution and task in _WORKED_SOLUTIONS:
            completion = metadata.get(_WORKED_SOLUTIONS[task]) or answer
        if not isinstance(completion, str) or not completion.strip():
            continue
        examples.append(Example(prompt=item["question"].strip(), completion=completion.strip(),
                                id=f"{task}-{seed}-{index}",
                                meta={"task": task, "seed": seed, "index": index,
                                      "answer": answer}))
    if not examples:
        raise DataError(f"reasoning-gym task {task} gave no item with a text answer; "
                        "choose another task")
    return examples


def _check_options(task: str, options: dict, config_class: type) -> None:
    known = [name for name in inspect.signature(config_class).parameters
             if name not in ("size", "seed")]
    for name in options:
        if name not in known:
            raise DataError(f"reasoning-gym task {task} has no option {name!r}; it has "
                            f"{', '.join(known)}.{near(name, known)}")


def read_jsonl(path: str | Path, limit: int | None = None, layout: str | None = None,
               columns: Sequence[str] | dict[str, str] | None = None, prompt_key: str = "prompt",
               completion_key: str = "completion", messages_key: str = "messages") -> list[Example] | list[Preference]:
    """Read a file with one JSON object a line (UTF-8; blank lines are skipped).

    Args:
        path: the file.
        limit: read at most this many lines.
        layout, columns, prompt_key, completion_key, messages_key: see ``row_reader.RowReader``.

    Returns:
        List of ``Example``, or of ``Preference`` if the lines are pairs; one without ``"id"`` is called
        ``<file name>:<line>``.

    Raises:
        DataError: the file is missing, unreadable or empty, or some lines are malformed: the
            message lists the first ones and says how many there are.
    """
    path = Path(path)
    reader = RowReader(path.name, layout, columns, prompt_key, completion_key, messages_key)
    return _read_rows(_lines(path, reader), reader, path, limit, "line")


def json_examples(path: str | Path, limit: int | None = None, layout: str | None = None,
                  columns: Sequence[str] | dict[str, str] | None = None, prompt_key: str = "prompt",
                  completion_key: str = "completion",
                  messages_key: str = "messages") -> list[Example] | list[Preference]:
    """Read one JSON array of objects, the form of many published sets.

    Args:
        path: the file.
        limit, layout, columns, prompt_key, completion_key, messages_key: as in ``read_jsonl``.

    Raises:
        DataError: unreadable file, no array, or items that cannot be used (names the first ones).
    """
    path = Path(path)
    reader = RowReader(path.name, layout, columns, prompt_key, completion_key, messages_key)
    try:
        rows = strict_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error or why_no_json(error)}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no JSON array of examples; for JSON lines use kind: jsonl")
    calls = (lambda row=row, number=number: reader.read(row, f"{path.name}:{number}")
             for number, row in enumerate(rows, 1))
    return _read_rows(calls, reader, path, limit, "item")


def hugging_face_examples(path: str | Path, name: str | None = None, split: str = "train", limit: int | None = None,
                          layout: str | None = None, columns: Sequence[str] | dict[str, str] | None = None,
                          prompt_key: str = "prompt", completion_key: str = "completion",
                          messages_key: str = "messages") -> list[Example] | list[Preference]:
    """Read rows through the Hugging Face ``datasets`` library (online, or a local folder).

    The library gives all structs of a column the same fields and fills them up with ``None``. Such fields are left out
    here at every depth, in the arguments of calls and in the tools' schemas, too.

    Args:
        path: name on the hub, or a local folder or file that ``datasets`` understands.
        name: configuration of the data set.
        split: which part.
        limit, layout, columns, prompt_key, completion_key, messages_key: as in ``read_jsonl``.

    Raises:
        DataError: the library is missing, or the data cannot be loaded or has other columns.
    """
    label = Path(path).name
    reader = RowReader(label, layout, columns, prompt_key, completion_key, messages_key)
    with needed("data", "a source of kind datasets", DataError):
        import datasets
    try:
        folder = Path(path)
        if folder.is_dir() and (folder / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(str(folder))
        elif folder.is_dir() and (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(folder))[split]
        else:
            rows = datasets.load_dataset(str(path), name, split=split)
    except Exception as error:  # network, names, formats: the library raises many kinds
        raise DataError(f"datasets cannot load {path!r} (name={name!r}, split={split!r}): "
                        f"{type(error).__name__}: {error}") from None
    calls = (lambda index=index: reader.read(_without_filling(dict(rows[index])), f"{label}:{split}:{index}")
             for index in range(len(rows)))
    return _read_rows(calls, reader, f"{path} (split {split!r})", limit, "row")


def _without_filling(value: Any) -> Any:
    """``value`` without the fields that are ``None``, at every depth."""
    if isinstance(value, dict):
        return {key: _without_filling(item) for key, item in value.items() if item is not None}
    return [_without_filling(item) for item in value] if isinstance(value, list) else value


def _lines(path: Path, reader: RowReader) -> Iterator[Callable[[], Example | Preference]]:
    """A function a line of a JSON lines file, which reads it."""
    try:
        with open(path, "rb") as handle:
            first = True
            for number, raw in enumerate(handle, 1):
                if raw.strip():
                    if first and raw.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                        raise DataError(f"{path} begins with '[', which begins a JSON array and no JSON line; use "
                                        "kind: json")
                    first = False
                    name = f"{path.name}:{number}"
                    yield functools.partial(_read_line, reader, raw, name)
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror or error}") from None


def _read_line(reader: RowReader, raw: bytes, name: str) -> Example | Preference:
    return reader.read(_parse(raw, name), name)


def _parse(raw: bytes, name: str) -> Any:
    try:
        return strict_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON ({why_no_json(error)}): {short(raw[:80])}") from None


def _read_rows(calls: Iterable[Callable[[], Example | Preference]], reader: RowReader, what: object, limit: int | None,
               word: str) -> list:
    """The results of ``calls``; problems of all of them in one error, and a warning of columns that were not read."""
    examples, problems, count = [], [], 0
    for call in calls:
        if limit is not None and len(examples) >= limit:
            break
        try:
            examples.append(call())
        except DataError as error:
            count += 1
            if len(problems) < _REPORTED:
                problems.append(str(error))
    if problems:
        more = f" (and {count - len(problems)} more)" if count > len(problems) else ""
        raise DataError(f"{what} has {count} unusable {word}{'s' if count > 1 else ''}: " + "; ".join(problems) + more)
    if not examples:
        raise DataError(f"the data {what} holds no example; expected one JSON object a {word} "
                        'like {"prompt": "...", "completion": "..."}')
    reader.warn()
    return examples


_KINDS: dict[str, tuple[Callable[..., list], tuple[str, ...]]] = {
    "jsonl": (read_jsonl, ("path",)),
    "json": (json_examples, ("path",)),
    "reasoning_gym": (reasoning_gym_examples, ("task", "size", "seed")),
    "running_totals": (running_totals, ("size", "seed")),
    "datasets": (hugging_face_examples, ("path",)),
}
_FILES = ("jsonl", "json", "datasets")
_E = TypeVar("_E", Example, Preference)


def load_examples(sources: Any, columns: Sequence[str] | dict[str, str] | None = None) -> list[Example]:
    """Read one source, or several in a row.

    Args:
        sources: a source description (see the head of this module), or a list of them. A plain
            string is the path of a JSON lines file.
        columns: ``columns`` of the files that do not have their own, see ``row_reader.RowReader``.

    Returns:
        List of ``Example``.

    Raises:
        DataError: unknown kind or key (with a suggestion), preference pairs, and whatever the source itself raises.
    """
    examples = _load(sources, columns)
    pair = next((one for one in examples if isinstance(one, Preference)), None)
    if pair is not None:
        raise DataError(f"{pair.id} is a preference pair (chosen and rejected), from which no single answer is learned "
                        "or scored; train on pairs with train: dpo")
    return examples


def load_preferences(sources: Any, columns: Sequence[str] | dict[str, str] | None = None) -> list[Preference]:
    """``load_examples`` for preference pairs.

    Returns:
        List of ``Preference``.

    Raises:
        DataError: as ``load_examples``, and for anything but pairs.
    """
    pairs = _load(sources, columns)
    other = next((one for one in pairs if not isinstance(one, Preference)), None)
    if other is not None:
        raise DataError(f"{other.id} is no preference pair; train: dpo needs lines with chosen and rejected "
                        "(and a prompt, if the two do not begin with it)")
    return pairs


def _load(sources: Any, columns: Sequence[str] | dict[str, str] | None) -> list:
    return [example for source in with_columns(sources, columns) for example in _load_one(source)]


def with_columns(sources: Any, columns: Sequence[str] | dict[str, str] | None) -> list:
    """The sources as a list of descriptions; those of files that have no ``columns`` get these.

    Raises:
        DataError: ``sources`` is of no known form.
    """
    if isinstance(sources, (str, Path, dict)):
        sources = [sources]
    if not isinstance(sources, (list, tuple)) or not sources:
        raise DataError(f"the data source is {sources!r}, expected a path, a description like "
                        "{'kind': 'jsonl', 'path': ...}, or a list of these")
    made = []
    for source in sources:
        if isinstance(source, (str, Path)):
            source = {"kind": "jsonl", "path": source}
        if columns is not None and isinstance(source, dict) and source.get("kind") in _FILES:
            source = {"columns": columns, **source}
        made.append(source)
    return made


def _option_problem(name: str, value: object) -> str:
    """What an option of a source was expected to be, or ""."""
    if name == "limit" and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        return "a whole number of at least 1, or null"
    if name == "path" and (not isinstance(value, (str, Path)) or not str(value).strip() or "\0" in str(value)):
        return "a path"
    if name in ("prompt_key", "completion_key", "messages_key") and (not isinstance(value, str) or not value):
        return "the name of a column"
    return ""


def _load_one(source: Any) -> list:
    if not isinstance(source, dict):
        raise DataError(f"the data source {source!r} is not a description like "
                        "{'kind': 'jsonl', 'path': ...}")
    options = dict(source)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise DataError(f"the data source has the kind {kind!r}; known kinds: "
                        f"{', '.join(_KINDS)}.{near(kind, _KINDS)}")
    function, needed = _KINDS[kind]
    known = list(inspect.signature(function).parameters)
    for name in options:
        if name not in known:
            raise DataError(f"a {kind} source has no setting {name!r}; it has "
                            f"{', '.join(known)}.{near(name, known)}")
    for name, value in options.items():
        problem = _option_problem(name, value)
        if problem:
            raise DataError(f"a {kind} source has the {name} {short(value)}, expected {problem}")
    missing = [name for name in needed if options.get(name) is None]
    if missing:
        raise DataError(f"a {kind} source needs {' and '.join(missing)}; given: "
                        f"{', '.join(options) or 'nothing'}")
    return function(**options)


def without_overlap(train: list[_E], held_out: Iterable[Example | Preference],
                    loss: str = "last") -> tuple[list[_E], int]:
    """Remove from ``train`` every example whose question also stands in ``held_out``.

    Args:
        train, held_out: lists of ``Example`` or ``Preference``.
        loss: with ``"all"``, questions inside a training conversation count, too: their answers are learned.

    Returns:
        ``(kept, removed)``: the list of the others, in order, and the number removed.

    Raises:
        DataError: nothing is left.
    """
    asked = {_digest(example.question) for example in held_out}
    kept = [example for example in train
            if not any(_digest(question) in asked for question in example.asked(loss))]
    if train and not kept:
        raise DataError(f"all {len(train)} training examples also stand in the evaluation data; "
                        "use other data, or for reasoning-gym a seed that is far away")
    return kept, len(train) - len(kept)


def _digest(question: str) -> bytes:
    # White space at the ends or doubled inside does not make another question.
    return hashlib.sha256(" ".join(question.split()).encode()).digest()
