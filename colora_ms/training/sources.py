"""Where examples come from: JSON lines, reasoning-gym's generators, Hugging Face ``datasets``.

A source is described by a dictionary (a list entry in a recipe):

    {"kind": "jsonl", "path": "data/train.jsonl"}
    {"kind": "json", "path": "boolq/train.json", "prompt_key": "instruction",
     "completion_key": "output"}
    {"kind": "reasoning_gym", "task": "chain_sum", "size": 2000, "seed": 1, "options": {...}}
    {"kind": "datasets", "path": "openai/gsm8k", "name": "main", "split": "train",
     "prompt_key": "question", "completion_key": "answer"}
"""

import hashlib
import inspect
import json
from pathlib import Path

from colora_ms.errors import DataError, near
from colora_ms.training.examples import Example, example_from_record, read_jsonl

# Tasks whose items carry a worked solution in their metadata, and where it is.
_WORKED_SOLUTIONS = {"gsm_symbolic": "answer_cot"}


def reasoning_gym_examples(task, size, seed, options=None, worked_solution=True):
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
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError("the task generator reasoning-gym is not installed; "
                        "run `pip install reasoning-gym`") from None
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


def _check_options(task, options, config_class):
    known = [name for name in inspect.signature(config_class).parameters
             if name not in ("size", "seed")]
    for name in options:
        if name not in known:
            raise DataError(f"reasoning-gym task {task} has no option {name!r}; it has "
                            f"{', '.join(known)}.{near(name, known)}")


def hugging_face_examples(path, name=None, split="train", limit=None, prompt_key="prompt",
                          completion_key="completion", messages_key="messages"):
    """Read examples through the Hugging Face ``datasets`` library (online, or a local folder).

    Args:
        path: name on the hub, or a local folder or file that ``datasets`` understands.
        name: configuration of the data set.
        split: which part.
        limit: at most this many examples.
        prompt_key, completion_key, messages_key: the columns that hold the texts.

    Raises:
        DataError: the library is missing, or the data cannot be loaded or has other columns.
    """
    try:
        import datasets
    except ImportError:
        raise DataError("reading Hugging Face data needs the package datasets; "
                        "run `pip install datasets`") from None
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
    total = len(rows) if limit is None else min(limit, len(rows))
    label = Path(path).name
    examples = [example_from_record(dict(rows[index]), f"{label}:{split}:{index}",
                                    prompt_key=prompt_key, completion_key=completion_key,
                                    messages_key=messages_key) for index in range(total)]
    if not examples:
        raise DataError(f"{path!r} (split {split!r}) holds no examples")
    return examples


def json_examples(path, limit=None, prompt_key="prompt", completion_key="completion",
                  messages_key="messages"):
    """Read examples from one JSON array of objects, the layout of many published sets.

    Args:
        path: the file.
        limit: at most this many examples.
        prompt_key, completion_key, messages_key: the keys that hold the texts.

    Raises:
        DataError: unreadable file, no array, or an item without the keys (names the first one).
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no JSON array of examples; for JSON lines use kind: jsonl")
    return [example_from_record(row, f"{path.name}:{number}", prompt_key=prompt_key,
                                completion_key=completion_key, messages_key=messages_key)
            for number, row in enumerate(rows[:limit], 1)]


_KINDS = {
    "jsonl": (read_jsonl, ("path",)),
    "json": (json_examples, ("path",)),
    "reasoning_gym": (reasoning_gym_examples, ("task", "size", "seed")),
    "datasets": (hugging_face_examples, ("path",)),
}


def load_examples(sources):
    """Read one source, or several in a row.

    Args:
        sources: a source description (see the head of this module), or a list of them. A plain
            string is the path of a JSON lines file.

    Returns:
        List of ``Example``.

    Raises:
        DataError: unknown kind or key (with a suggestion), and whatever the source itself raises.
    """
    if isinstance(sources, (str, Path, dict)):
        sources = [sources]
    if not isinstance(sources, (list, tuple)) or not sources:
        raise DataError(f"the data source is {sources!r}, expected a path, a description like "
                        "{'kind': 'jsonl', 'path': ...}, or a list of these")
    examples = []
    for source in sources:
        if isinstance(source, (str, Path)):
            source = {"kind": "jsonl", "path": source}
        examples += _load_one(source)
    return examples


def _load_one(source):
    if not isinstance(source, dict):
        raise DataError(f"the data source {source!r} is not a description like "
                        "{'kind': 'jsonl', 'path': ...}")
    options = dict(source)
    kind = options.pop("kind", None)
    if kind not in _KINDS:
        raise DataError(f"the data source has the kind {kind!r}; known kinds: "
                        f"{', '.join(_KINDS)}.{near(kind, _KINDS)}")
    function, needed = _KINDS[kind]
    known = [name for name, parameter in inspect.signature(function).parameters.items()
             if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    if kind == "jsonl":
        known += ["prompt_key", "completion_key", "messages_key"]
    for name in options:
        if name not in known:
            raise DataError(f"a {kind} source has no setting {name!r}; it has "
                            f"{', '.join(known)}.{near(name, known)}")
    missing = [name for name in needed if options.get(name) is None]
    if missing:
        raise DataError(f"a {kind} source needs {' and '.join(missing)}; given: "
                        f"{', '.join(options) or 'nothing'}")
    return function(**options)


def without_overlap(train, held_out):
    """Remove from ``train`` every example whose question also stands in ``held_out``.

    Returns:
        ``(kept, removed)``: the list of the others, in order, and the number removed.

    Raises:
        DataError: nothing is left.
    """
    asked = {_digest(example) for example in held_out}
    kept = [example for example in train if _digest(example) not in asked]
    if train and not kept:
        raise DataError(f"all {len(train)} training examples also stand in the evaluation data; "
                        "use other data, or for reasoning-gym a seed that is far away")
    return kept, len(train) - len(kept)


def _digest(example):
    # White space at the ends or doubled inside does not make another question.
    return hashlib.sha256(" ".join(example.question.split()).encode()).digest()
