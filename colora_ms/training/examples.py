"""One training or evaluation example, and reading many of them from JSON lines.

Two line formats are read:

    {"prompt": "2 + 2 =", "completion": "4"}
    {"messages": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}]}

Further keys of a line are kept in ``Example.meta``; ``"id"`` becomes ``Example.id``.
"""

import dataclasses
import json
from pathlib import Path

from colora_ms.errors import DataError, near

ROLES = ("system", "user", "assistant", "tool")
_REPORTED = 5  # problems shown in one error; the rest are counted


@dataclasses.dataclass(frozen=True)
class Example:
    """A question and the answer that the model should learn to give.

    Exactly one of ``prompt`` and ``messages`` is set.

    Attributes:
        completion: the answer (str); the only part that carries a loss.
        prompt: the question as plain text.
        messages: the question as a conversation, a tuple of ``{"role", "content"}`` that ends
            before the answer; earlier assistant turns in it carry no loss.
        id: a name that is unique within its data set.
        meta: whatever else the source knew about the item.
    """

    completion: str
    prompt: str = None
    messages: tuple = None
    id: str = ""
    meta: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        problem = _example_problem(self)
        if problem:
            raise DataError(f"example {self.id or '(no id)'}: {problem}")
        if self.messages is not None:
            object.__setattr__(self, "messages", tuple(dict(item) for item in self.messages))

    @property
    def question(self):
        """A string that is equal for two examples exactly if they ask the same."""
        if self.prompt is not None:
            return self.prompt
        if len(self.messages) == 1 and self.messages[0]["role"] == "user":
            return self.messages[0]["content"]
        return json.dumps([[item["role"], item["content"]] for item in self.messages],
                          ensure_ascii=False)


def _example_problem(example):
    """What is wrong with an example, or ""."""
    if not isinstance(example.completion, str) or not example.completion.strip():
        return f"the completion is {_short(example.completion)}, expected a text that is not empty"
    if (example.prompt is None) == (example.messages is None):
        return "exactly one of prompt and messages must be given"
    if example.prompt is not None:
        if not isinstance(example.prompt, str) or not example.prompt.strip():
            return f"the prompt is {_short(example.prompt)}, expected a text that is not empty"
        return ""
    return _messages_problem(example.messages)


def _messages_problem(messages):
    """What is wrong with the conversation before the answer, or ""."""
    if not isinstance(messages, (list, tuple)) or not messages:
        return f"messages is {_short(messages)}, expected a list with at least one user message"
    for number, item in enumerate(messages):
        if not isinstance(item, dict):
            return f"messages[{number}] is {_short(item)}, expected {{'role', 'content'}}"
        if item.get("role") not in ROLES:
            return (f"messages[{number}] has the role {_short(item.get('role'))}, expected one of "
                    f"{', '.join(ROLES)}.{near(item.get('role'), ROLES)}")
        if not isinstance(item.get("content"), str):
            return (f"messages[{number}] has the content {_short(item.get('content'))}, "
                    "expected a text")
    if messages[-1]["role"] == "assistant":
        return "two assistant messages stand at the end of the conversation, expected one"
    return ""


def example_from_record(record, name, prompt_key="prompt", completion_key="completion",
                        messages_key="messages"):
    """Turn one parsed JSON object into an ``Example``.

    Args:
        record: the dictionary.
        name: id of the example if the record has no ``"id"``.
        prompt_key, completion_key, messages_key: where the texts are.

    Raises:
        DataError: keys are missing or values have the wrong type; the message names them.
    """
    if not isinstance(record, dict):
        raise DataError(f"{name}: found {_short(record)}, expected a JSON object")
    used = {"id"}
    if messages_key in record and record[messages_key] is not None:
        used.add(messages_key)
        turns = record[messages_key]
        if not isinstance(turns, (list, tuple)) or len(turns) < 2 or \
                not isinstance(turns[-1], dict) or turns[-1].get("role") != "assistant":
            raise DataError(f"{name}: {messages_key} must be a list of at least two messages that "
                            f"ends with the assistant's answer; found {_short(turns)}")
        fields = {"messages": turns[:-1], "completion": turns[-1].get("content")}
    else:
        missing = [key for key in (prompt_key, completion_key) if key not in record]
        if missing:
            hint = "".join(near(key, record) for key in missing[:1])
            raise DataError(
                f"{name}: the key {' and '.join(map(repr, missing))} is missing; a line needs "
                f"{prompt_key!r} and {completion_key!r}, or {messages_key!r}; found "
                f"{_short(sorted(map(str, record)))}.{hint}")
        used |= {prompt_key, completion_key}
        fields = {"prompt": record[prompt_key], "completion": record[completion_key]}
    identity = record.get("id")
    meta = {key: value for key, value in record.items() if key not in used}
    try:
        return Example(id=name if identity is None else str(identity), meta=meta, **fields)
    except DataError as error:
        # With an id from the file, the line is still what the reader needs to find it.
        text = str(error).split(": ", 1)[-1]
        raise DataError(f"{name}: {text}") from None


def read_jsonl(path, limit=None, **keys):
    """Read examples from a file with one JSON object a line (UTF-8; blank lines are skipped).

    Args:
        path: the file.
        limit: read at most this many examples.
        **keys: ``prompt_key``, ``completion_key``, ``messages_key`` of ``example_from_record``.

    Returns:
        List of ``Example``; an example without ``"id"`` is called ``<file name>:<line>``.

    Raises:
        DataError: the file is missing, unreadable or empty, or some lines are malformed: the
            message lists the first ones and says how many there are.
    """
    path = Path(path)
    examples, problems, count = [], [], 0
    try:
        with open(path, "rb") as handle:
            for number, raw in enumerate(handle, 1):
                if limit is not None and len(examples) >= limit:
                    break
                if not raw.strip():
                    continue
                name = f"{path.name}:{number}"
                try:
                    examples.append(example_from_record(_parse(raw, name), name, **keys))
                except DataError as error:
                    count += 1
                    if len(problems) < _REPORTED:
                        problems.append(str(error))
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror or error}") from None
    if problems:
        more = f" (and {count - len(problems)} more)" if count > len(problems) else ""
        raise DataError(f"{path} has {count} unusable line{'s' if count > 1 else ''}: "
                        + "; ".join(problems) + more)
    if not examples:
        raise DataError(f"the data file {path} holds no example; expected one JSON object a line "
                        'like {"prompt": "...", "completion": "..."}')
    return examples


def _parse(raw, name):
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 text (byte {error.start} of the line)") from None
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(f"{name}: not valid JSON ({reason}): {_short(raw[:80])}") from None


def _short(value):
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
