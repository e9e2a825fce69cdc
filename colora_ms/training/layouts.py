"""The layouts of training data: what the columns of a row are called, how they are recognised, and how they are read.

    completion            {"prompt": "2 + 2 =", "completion": "4"}
    completion_messages   the same with lists of messages on both sides
    messages              OpenAI's chat lines: {"messages": [{"role": "user", "content": "2 + 2 ="}, ...]}
    sharegpt              {"conversations": [{"from": "human", "value": "2 + 2 ="}, {"from": "gpt", "value": "4"}]}
    alpaca                {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    preference            {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}: texts or messages; without a
                          prompt, it is what both begin with
    text                  {"text": "a document"}

``LAYOUTS`` has one record a layout, so that a further one is a further record. ``null`` equals absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from colora_ms.errors import DataError, near
from colora_ms.models.messages import clean_messages, parse_json, short

#: What ShareGPT's ``from`` may say, and the role that it means.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
            "bing": "assistant", "bard": "assistant", "model": "assistant", "function_call": "assistant",
            "system": "system", "developer": "developer", "tool": "tool", "function": "tool", "observation": "tool"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        name: what ``layout`` may say.
        needs: columns that every row must have; they identify the layout.
        read: ``function(row)`` that gives the fields of an ``Example``, or of a ``Preference`` with ``chosen``.
        takes: further columns that are read where they are there.
        lists: whether the needed columns hold lists; ``None`` if that does not matter.
        family: rows of one file may mix the layouts of a family; its own name if left out.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[dict], dict]
    takes: tuple[str, ...] = ()
    lists: bool | None = None
    family: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return self.needs + self.takes

    def fits(self, row: dict) -> bool:
        """Whether a row (without nulls) has this layout."""
        return all(name in row for name in self.needs) and \
            (self.lists is None or self.lists == any(isinstance(row[name], (list, tuple)) for name in self.needs))


_EQUAL = "chosen and rejected are equal, so that there is nothing to prefer"


# -- readers: a row without nulls, as the fields of an Example or a Preference ---------------------------------------


def _read_text(row: dict) -> dict:
    return {"text": row["text"]}


def _read_completion(row: dict) -> dict:
    return {"prompt": row["prompt"], "completion": row["completion"], "tools": _tools(row)}


def _read_completion_messages(row: dict) -> dict:
    return {**_question(row["prompt"]), "answer": _side(row["completion"], "completion"), "tools": _tools(row)}


def _read_messages(row: dict) -> dict:
    return _conversation(row["messages"], "messages", _tools(row))


def _read_sharegpt(row: dict) -> dict:
    turns = row["conversations"]
    if not isinstance(turns, (list, tuple)):
        raise DataError(f"conversations is {short(turns)}, expected a list of {{'from', 'value'}}")
    messages = [_turn(turn, f"conversations[{number}]") for number, turn in enumerate(turns)]
    if row.get("system"):
        if messages and messages[0].get("role") == "system":
            raise DataError("the row has a system column, and its conversation begins with a system message, too")
        messages.insert(0, {"role": "system", "content": row["system"]})
    return _conversation(messages, "conversations", _tools(row))


def _turn(turn: Any, where: str) -> dict:
    """A turn of ShareGPT as a message; ``{"role", "content"}`` is one already."""
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {short(turn)}, expected {{'from', 'value'}}")
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" not in turn:
        return turn
    speaker, value = turn.pop("from"), turn.pop("value", None)
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise DataError(f"{where} is from {short(speaker)}, expected one of {', '.join(SPEAKERS)}."
                        f"{near(speaker, SPEAKERS)}")
    if "role" in turn or "content" in turn:
        raise DataError(f"{where} has 'from' and also role or content, expected 'from' and 'value'")
    message = {"role": SPEAKERS[speaker.lower()], **turn}
    if speaker.lower() != "function_call":
        return {**message, "content": value}
    calls = parse_json(value, f"{where}.value") if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    return {**message, "tool_calls": [{"type": "function", "function": call} for call in calls]
            if isinstance(calls, list) else calls}


def _read_alpaca(row: dict) -> dict:
    """The user says the instruction, and behind a blank line the input if there is one."""
    for name in ("instruction", "input", "system"):
        if not isinstance(row.get(name, ""), str):
            raise DataError(f"the {name} is {short(row[name])}, expected a text")
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input", "").strip() else "")
    said = []
    history = row.get("history") or ()
    if not isinstance(history, (list, tuple)):
        raise DataError(f"the history is {short(history)}, expected a list of [question, answer]")
    for number, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history[{number}] is {short(pair)}, expected [question, answer]")
        said += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]
    if row.get("system", "").strip():
        said.insert(0, {"role": "system", "content": row["system"]})
    question = {"messages": said + [{"role": "user", "content": prompt}]} if said else {"prompt": prompt}
    return {**question, "completion": row["output"], "tools": _tools(row)}


def _read_preference(row: dict) -> dict:
    sides = row["chosen"], row["rejected"]
    texts = [isinstance(side, str) for side in sides]
    if texts[0] != texts[1]:
        raise DataError(f"chosen is {short(sides[0])}, but rejected {short(sides[1])}, expected two texts or two lists")
    if texts[0]:
        question, sides = _split_texts(row.get("prompt"), *sides)
        return {**question, "chosen": sides[0], "rejected": sides[1], "tools": _tools(row)}
    answers = [clean_messages(_list(side, name), name) for side, name in zip(sides, ("chosen", "rejected"))]
    asked = [] if "prompt" not in row else _question(row["prompt"]).get("messages")
    if asked is None:
        asked = [{"role": "user", "content": row["prompt"]}]
    asked, (chosen, rejected) = _split_messages(clean_messages(asked, "prompt"), *answers)
    return {"messages": asked, "chosen": chosen, "rejected": rejected, "tools": _tools(row)}


def _split_texts(prompt: Any, chosen: Any, rejected: Any) -> tuple[dict, tuple[str, str]]:
    """The question, and both answers without it; where no prompt is given, it is all words that both begin with."""
    if prompt is not None:
        if isinstance(prompt, str) and prompt.strip() and chosen.startswith(prompt) and rejected.startswith(prompt):
            return _question(prompt), (chosen[len(prompt):], rejected[len(prompt):])  # both repeat the prompt
        return _question(prompt), (chosen, rejected)
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if chosen == rejected:
        raise DataError(_EQUAL)
    while length and not chosen[length - 1:length].isspace() and not chosen[length:length + 1].isspace():
        length -= 1  # back to the end of a word
    head = chosen[:length].rstrip(" ")
    if not head.strip():
        raise DataError("there is no prompt, and chosen and rejected do not begin with the same words")
    return {"prompt": head}, (chosen[len(head):], rejected[len(head):])


def _split_messages(asked: tuple[dict, ...], chosen: Any,
                    rejected: Any) -> tuple[tuple[dict, ...], tuple[tuple[dict, ...], tuple[dict, ...]]]:
    """The question's messages, and both answers without them, if they repeat the question (TRL's implicit prompt)."""
    if asked and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return asked, (chosen, rejected)
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if asked and (chosen[:len(asked)] != asked or rejected[:len(asked)] != asked):
        plain = [item for item in chosen[:length] if item["role"] != "system"]
        if len(asked) != 1 or list(asked) != plain:
            raise DataError("chosen and rejected do not begin with the prompt, nor with an assistant's message")
    length = len(asked) if asked and chosen[:len(asked)] == asked else length
    if chosen == rejected:
        raise DataError(_EQUAL)
    if not length:
        raise DataError("there is no prompt, and chosen and rejected do not begin with the same messages")
    return chosen[:length], (chosen[length:], rejected[length:])


def _question(prompt: Any) -> dict:
    """A prompt column, text or messages, as a field of an ``Example``."""
    return {"messages": prompt} if isinstance(prompt, (list, tuple)) else {"prompt": prompt}


def _side(value: Any, name: str) -> list[dict] | tuple[dict, ...]:
    """An answer's column as messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return clean_messages(_list(value, name), name)


def _list(value: Any, name: str) -> list | tuple:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{name} is {short(value)}, expected a text or a list of messages")
    return value


def _conversation(turns: Any, column: str, tools: Any) -> dict:
    """A conversation that ends with its answer."""
    if not isinstance(turns, (list, tuple)) or len(turns) < 2 or not isinstance(turns[-1], dict) \
            or turns[-1].get("role") != "assistant":
        raise DataError(f"{column} must be a list of at least two messages that ends with the assistant's answer; "
                        f"found {short(turns)}")
    turns = clean_messages(turns, column)
    return {"messages": turns[:-1], "answer": turns[-1:], "tools": tools}


def _tools(row: dict) -> Any:
    """The tools of a row, ``functions`` in OpenAI's older lines."""
    if row.get("functions"):
        if row.get("tools"):
            raise DataError("the row has both functions and tools, expected tools alone")
        found = row["functions"]
        return [{"type": "function", "function": one} for one in found] if isinstance(found, list) else found
    return row.get("tools") or ()


#: In the order in which they are tried: columns such as ``text`` or ``messages`` often stand beside a fuller layout.
LAYOUTS = (
    Layout("preference", ("chosen", "rejected"), _read_preference, ("prompt", "tools", "functions")),
    Layout("messages", ("messages",), _read_messages, ("tools", "functions"), family="answers"),
    Layout("sharegpt", ("conversations",), _read_sharegpt, ("system", "tools", "functions")),
    Layout("completion", ("prompt", "completion"), _read_completion, ("tools", "functions"), lists=False,
           family="answers"),
    Layout("completion_messages", ("prompt", "completion"), _read_completion_messages, ("tools", "functions"),
           lists=True, family="answers"),
    Layout("alpaca", ("instruction", "output"), _read_alpaca, ("input", "system", "history", "tools")),
    Layout("text", ("text",), _read_text),
)


def layout_named(name: str) -> Layout:
    """The layout called ``name``.

    Raises:
        DataError: there is none.
    """
    names = [layout.name for layout in LAYOUTS]
    if name not in names:
        raise DataError(f"there is no layout {name!r}; there are {', '.join(names)}.{near(name, names)}")
    return LAYOUTS[names.index(name)]
