"""The messages of a conversation as people have them, checked and brought into the one form that templates are given.

``null`` equals absent for the fields of a message, of a tool call and of its function; nulls inside a call's arguments
stay, since a model may have to write them. Content that comes in parts becomes one text, and arguments that come as a
JSON text are parsed, or a template would write them as JSON a second time. OpenAI's older ``function_call`` and role
``function`` become ``tool_calls`` and role ``tool``. A field that is not known is an error, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from colora_ms.errors import DataError, near
from colora_ms.errors import short as cut

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight")
_CALL_FIELDS = ("id", "type", "index", "function", "name", "arguments")


class Arguments(dict):
    """Arguments of a tool call.

    Most templates write them with ``tojson``, a few put them into the text as they are: as a text this is JSON, too
    (the very text that the data held, if it held one), and not Python's notation.
    """

    def __init__(self, values: dict, text: str | None = None) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False) if self._text is None else self._text

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def clean_messages(messages: Sequence[Any], what: str = "messages",
                   roles: Sequence[str] | None = ROLES) -> tuple[dict, ...]:
    """A tuple of checked messages: dictionaries with ``role``, ``content`` and whatever else of ``FIELDS`` they have.

    ``content`` is a str, or ``None`` in an assistant's message that only calls tools. ``weight`` is 0 or 1.

    Args:
        messages: a list of dictionaries.
        what: how errors call the list.
        roles: those that a message may have; None: any name, for templates that know further ones.

    Raises:
        DataError: a message that cannot be used; says which one and why.
    """
    return tuple(_clean(item, f"{what}[{number}]", roles) for number, item in enumerate(messages))


def _clean(item: Any, where: str, roles: Sequence[str] | None) -> dict:
    if not isinstance(item, dict):
        raise DataError(f"{where} is {short(item)}, expected {{'role', 'content'}}")
    item = {key: value for key, value in item.items() if value is not None}
    item = _without_legacy(item, where)
    for key in item:
        if key not in FIELDS:
            raise DataError(f"{where} has the key {key!r}, which is not read; a message has {', '.join(FIELDS)}."
                            f"{near(key, FIELDS)}")
    role = item.get("role")
    if not isinstance(role, str) or not role or roles is not None and role not in roles:
        known = ROLES if roles is None else roles
        raise DataError(f"{where} has the role {short(role)}, expected one of {', '.join(known)}.{near(role, known)}")
    made = {"role": role, "content": _text_of(item.get("content"), where)}
    calls = _calls(item.get("tool_calls") or [], where)
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls and the role {role!r}; only an assistant's message calls tools")
    if made["content"] is None and not calls:
        raise DataError(f"{where} has the content None, expected a text")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in item:
            if not isinstance(item[key], str):
                raise DataError(f"{where} has the {key} {short(item[key])}, expected a text")
            made[key] = item[key]
    if calls:
        made["tool_calls"] = calls
    if "weight" in item:
        made["weight"] = _weight(item["weight"], role, where)
    return made


def _without_legacy(item: Any, where: str) -> dict:
    """``item`` with OpenAI's older names replaced by today's."""
    if item.get("role") == "function":
        item = {**item, "role": "tool"}
    if "function_call" in item:
        if item.get("tool_calls"):
            raise DataError(f"{where} has both function_call and tool_calls, expected tool_calls alone")
        item = {**item, "tool_calls": [{"type": "function", "function": item["function_call"]}]}
        del item["function_call"]
    return item


def _text_of(content: Any, where: str) -> str | None:
    """The content as one text; ``None`` stays."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{where} has the content {short(content)}, expected a text")
    texts = []
    for part in content:
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(f"{where} has a content part of the type {short(kind)}; messages are text only, "
                            "in parts like {'type': 'text', 'text': '...'}")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise DataError(f"{where} has the content part {short(part)}, expected {{'type': 'text', 'text': '...'}}")
        texts.append(part["text"])
    return "".join(texts)


def _weight(value: Any, role: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in (0, 1):
        raise DataError(f"{where} has the weight {short(value)}, expected 0 (no loss) or 1")
    if value and role != "assistant":
        raise DataError(f"{where} has the weight 1 and the role {role!r}; only an assistant's message can carry a loss")
    return int(value)


def _calls(calls: Any, where: str) -> list[dict]:
    if not isinstance(calls, (list, tuple)):
        raise DataError(f"{where} has the tool_calls {short(calls)}, expected a list")
    return [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict:
    """A call with its arguments parsed; ``{"function": {...}}`` and the bare function are both kept as they come."""
    if not isinstance(call, dict):
        raise DataError(f"{where} is {short(call)}, expected "
                        "{'type': 'function', 'function': {'name', 'arguments'}}")
    call = {key: value for key, value in call.items() if value is not None}
    for key in call:
        if key not in _CALL_FIELDS:
            raise DataError(f"{where} has the key {key!r}, which is not read; a call has {', '.join(_CALL_FIELDS)}."
                            f"{near(key, _CALL_FIELDS)}")
    if call.get("type", "function") != "function":
        raise DataError(f"{where} has the type {short(call['type'])}; only functions can be called")
    if "function" in call:
        if "name" in call or "arguments" in call:
            raise DataError(f"{where} has name or arguments beside its function, expected them inside")
        return {**call, "function": _function(call["function"], f"{where}.function")}
    outer = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    return {**outer, **_function({key: call[key] for key in ("name", "arguments") if key in call}, where)}


def _function(function: Any, where: str) -> dict:
    if not isinstance(function, dict):
        raise DataError(f"{where} is {short(function)}, expected {{'name', 'arguments'}}")
    function = {key: value for key, value in function.items() if value is not None}
    for key in function:
        if key not in ("name", "arguments"):
            raise DataError(f"{where} has the key {key!r}, which is not read; it has name and arguments."
                            f"{near(key, ('name', 'arguments'))}")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} has the name {short(function.get('name'))}, expected the function's name")
    return {**function, "arguments": _arguments(function.get("arguments", {}), where)}


def _arguments(value: Any, where: str) -> dict:
    text = None
    if isinstance(value, Arguments):
        return value
    if isinstance(value, str):
        text, value = value, parse_json(value, f"{where}.arguments")
    if not isinstance(value, dict):
        raise DataError(f"{where} has the arguments {short(value)}, expected an object of names and values")
    return Arguments(value, text)


def clean_tools(tools: Any) -> tuple[dict, ...]:
    """The tools that a conversation may call, as a tuple of dictionaries; ``()`` if there are none.

    Args:
        tools: a list of ``{"type": "function", "function": {"name", "description", "parameters"}}`` or of the bare
            functions, or such a list as a JSON text. Templates write all that a tool says, so nothing in it is refused.

    Raises:
        DataError: something else.
    """
    if isinstance(tools, str):
        tools = parse_json(tools, "tools")
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools is {short(tools)}, expected a list of "
                        "{'type': 'function', 'function': {'name', 'description', 'parameters'}}")
    made = []
    for number, tool in enumerate(tools):
        tool = {key: value for key, value in tool.items() if value is not None}
        function = tool.get("function", tool)
        if isinstance(tool.get("function"), dict):
            tool["function"] = {key: value for key, value in function.items() if value is not None}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tools[{number}] is {short(tool)}, which has no function's name")
        made.append(tool)
    return tuple(made)


def parse_json(text: str, what: str) -> Any:
    """A JSON text's value.

    Raises:
        DataError: it is none, has a key twice, or a number that JSON cannot write (NaN, an infinity).
    """
    try:
        value = strict_json(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is the text {short(text)}, which is not valid JSON ({why_no_json(error)})") from None
    return value


def strict_json(text: str) -> Any:
    """``json.loads`` that refuses an object with a key twice, of which Python would silently keep the last.

    Raises:
        ValueError, RecursionError: see ``why_no_json``.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return made


def why_no_json(error: Exception) -> str:
    """What an error of ``strict_json`` says, in a few words."""
    return "nested too deeply" if isinstance(error, RecursionError) else \
        (getattr(error, "msg", None) or str(error)).partition(";")[0]


def short(value: object) -> str:
    """A value for an error message, at most 100 characters."""
    return cut(value, 100)
