"""Forms that an answer is to keep to, and voices of a mix, from the fields of OpenAI, vLLM, SGLang and llama-server."""

from __future__ import annotations

import json
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

from colora_ms.decoding.grammar import Grammar, grammar_of
from colora_ms.errors import DecodingError
from colora_ms.serving.http.calls import CallFormat
from colora_ms.serving.http.failures import RequestError


def response_format(value: Dict[str, Any], name: str = "response_format") -> Optional[Dict[str, Any]]:
    """A grammar's mapping of OpenAI's ``response_format``, or of ``text.format`` of /v1/responses; None: plain text.

    Raises:
        RequestError: it has another form.
    """
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_schema": value["schema"]} if "schema" in value else {"json": True}
    inner = value if kind == "json_schema" and "json_schema" not in value else value.get("json_schema")
    if kind == "json_schema" and isinstance(inner, dict) and isinstance(inner.get("schema"), dict):
        return {"json_schema": inner["schema"]}
    raise RequestError(f"{name}={value!r:.100}: expected {{\"type\": \"text\"}}, {{\"type\": \"json_object\"}} or "
                       "{\"type\": \"json_schema\", \"json_schema\": {\"name\": …, \"schema\": {…}}}", name)


def _structured(value: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """vLLM's ``structured_outputs``."""
    given = {name: one for name, one in value.items() if one not in (None, False)}
    if not given:
        return None
    name, one = next(iter(given.items()))
    kinds = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark", "json_object": "json"}
    if len(given) > 1 or name not in kinds:
        raise RequestError(f"structured_outputs={value!r:.80}: expected one of {', '.join(kinds)}",
                           "structured_outputs")
    return {kinds[name]: one}


def _own(value: Union[str, Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """Our own ``grammar``, a mapping; llama-server's is a text of another language."""
    if isinstance(value, str):
        if not value:
            return None
        raise RequestError("grammar: llama.cpp's grammars (GBNF) are not read here; send {\"lark\": \"…\"}, "
                           "{\"regex\": \"…\"} or {\"json_schema\": {…}}", "grammar", "unsupported_parameter")
    return value


#: {HTTP's field: (type, what makes a grammar's mapping of it)}; one of them may ask for something.
FORMS: Dict[str, Tuple[Any, Callable[[Any], Optional[Dict[str, Any]]]]] = {
    "response_format": (Dict[str, Any], response_format),
    "guided_json": (Union[Dict[str, Any], str], lambda value: {"json_schema": value}),
    "guided_regex": (str, lambda value: {"regex": value}),
    "guided_choice": (List[str], lambda value: {"choice": value} if value else None),
    "guided_grammar": (str, lambda value: {"lark": value}),
    "guided_json_object": (bool, lambda value: {"json": True} if value else None),
    "structured_outputs": (Dict[str, Any], _structured),
    "json_schema": (Union[Dict[str, Any], str], lambda value: {"json_schema": value}),
    "regex": (str, lambda value: {"regex": value}),
    "grammar": (Union[Dict[str, Any], str], _own),
}


def grammar_asked(given: Dict[str, Any]) -> Optional[Grammar]:
    """The grammar that a body's fields ask for; None: none.

    Args:
        given: {field of :data:`FORMS`: value or None}.

    Raises:
        RequestError: it cannot be used, or two fields ask for one.
    """
    found: Optional[Grammar] = None
    said = ""
    for name, value in given.items():
        if value is None:
            continue
        mapping = FORMS[name][1](value)
        if mapping is None:
            continue
        if found is not None:
            raise RequestError(f"{said} and {name} both say what the answer is to keep to; send one of them", name)
        try:
            found, said = grammar_of(mapping, name), name
        except DecodingError as error:
            raise RequestError(str(error), name) from None
    return found


def calls_grammar(tools: Tuple[dict, ...], form: CallFormat, named: Optional[str], several: bool,
                  tokens: Dict[str, int]) -> Grammar:
    """The grammar of an answer that must call a tool.

    Args:
        tools: as the template reads them; form: how calls are written.
        named: the tool that must be called; None: any.
        several: whether it may make more than one call.
        tokens: {text of the format: id} of those that are special tokens.
    """
    inner = "parameters" if form.bare else "arguments"
    options = []
    for tool in tools:
        function = tool.get("function", tool)
        if named in (None, function["name"]):
            schema = function.get("parameters") or {"type": "object"}
            options.append({"type": "object", "properties": {"name": {"const": function["name"]}, inner: schema},
                            "required": ["name", inner], "additionalProperties": False})
    call: Dict[str, Any] = {"anyOf": options}
    if form.bare:
        return grammar_of({"json_schema": call})
    listed = form.short_ids
    body = {"type": "array", "items": call, "minItems": 1, **({} if several else {"maxItems": 1})} if listed else call
    body["x-guidance"] = _LAYOUT
    parts = [_literal(form.opening, tokens), f"%json {json.dumps(body)}"]
    if form.closing:
        parts.append(_literal(form.closing, tokens))
    return grammar_of({"lark": f"start: call{'+' if several and not listed else ''}\ncall: {' '.join(parts)}\n"})


#: How templates write the JSON of calls; with free blanks a model may write blanks for ever.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _literal(text: str, tokens: Dict[str, int]) -> str:
    """A text in llguidance's Lark: a special token by its number, else the characters."""
    return f"<[{tokens[text]}]>" if text in tokens else json.dumps(text)


def one_adapter(wanted: List[Dict[str, Any]], names: List[str]) -> Optional[Tuple[Optional[str], float]]:
    """(adapter, factor on its scale) of llama-server's ``lora``; None: the field asks for nothing.

    Args:
        wanted: ``{"id": number of an adapter, or "name": its name, "scale": number}`` each; those of scale 0 are off.
        names: the adapters, by their numbers.

    Raises:
        RequestError: an entry cannot be used, or there is more than one.
    """
    found: List[Tuple[str, float]] = []
    for number, one in enumerate(wanted):
        field = f"lora[{number}]"
        if not isinstance(one, dict) or not set(one) <= {"id", "name", "scale"} or ("id" in one) == ("name" in one):
            raise RequestError(f"{field}={one!r:.80}: expected {{\"id\" or \"name\": an adapter, \"scale\": a number}}",
                               field)
        place, scale = one.get("id"), one.get("scale", 1.0)
        if "id" in one and (not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(names)):
            raise RequestError(f"{field}.id={place!r:.40} is no number of an adapter; GET /lora-adapters lists them",
                               f"{field}.id")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise RequestError(f"{field}.scale={scale!r:.40} is not a number", f"{field}.scale")
        name = one["name"] if place is None else names[place]
        if not isinstance(name, str):
            raise RequestError(f"{field}.name={name!r:.40} is not an adapter's name", f"{field}.name")
        if scale:
            found.append((name, float(scale)))
    if len(found) > 1:
        raise RequestError("lora: this server does not add adapters up; send one of them, or an ensemble of them as "
                           "mix", "lora", "unsupported_parameter")
    if found:
        return found[0]
    return (None, 1.0) if wanted else None
