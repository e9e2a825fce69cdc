"""From the messages and tools of a request to the prompt, and to what reads the answer."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from colora_ms.decoding.grammar import Grammar
from colora_ms.decoding.prompt import Conversation
from colora_ms.errors import DataError, TokenizerError, near
from colora_ms.models.chat_template import variables_of
from colora_ms.models.detokenizer import special_texts
from colora_ms.models.messages import clean_messages, clean_tools
from colora_ms.serving.http.calls import FORMATS, CallFormat, CallReader, format_of
from colora_ms.serving.http.failures import RequestError
from colora_ms.serving.http.forms import calls_grammar
from colora_ms.serving.http.schema import ChatBody, ConversationBody

#: Names that a template is told in other ways.
_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
#: Switches of reasoning that clients send to every model: a template that does not know them has nothing to switch.
_SWITCHES = ("enable_thinking", "thinking")
#: Fields of former answers that clients send back as they got them, and that say nothing to the model: of messages, of
#: parts of their content, of functions of their calls.
_NOTHING = ("annotations", "parsed", "logprobs")
_NOTHING_OF_PARTS = ("annotations", "cache_control", "id", "index", "logprobs")
_NOTHING_OF_FUNCTIONS = ("parsed_arguments", "strict")
#: Fields of messages that would say something.
_REFUSED = ("audio", "function_call", "weight")


@dataclasses.dataclass(frozen=True)
class Toolbox:
    """Tools that an answer may call.

    Attributes:
        tools: as the template reads them; form: how the model writes calls; most: calls that are wanted at most.
        grammar: what an answer keeps to that must call; None: it may do as it likes.
    """

    tools: Tuple[dict, ...]
    form: CallFormat
    most: Optional[int] = None
    grammar: Optional[Grammar] = None

    def reader(self) -> CallReader:
        """What reads one answer."""
        return CallReader(self.form, {tool.get("function", tool)["name"] for tool in self.tools}, self.most)


def toolbox(body: ChatBody, tokenizer: Any, wanted: str) -> Optional[Toolbox]:
    """The tools of a request; None: there are none, or it asks for no calls.

    Args:
        tokenizer: the model's; wanted: the name of a format, or "auto": the one of the chat template.

    Raises:
        RequestError: they, or how they are to be chosen, cannot be used.
    """
    tools, choice = tuple(body.tools or ()), body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError(f"tool_choice={choice!r:.60}, but the request has no tools", "tool_choice")
        return None
    made = checked_tools(tools)
    if choice == "none":
        return None
    forced, named = _forced(choice, made)
    strict = next((number for number, tool in enumerate(made) if tool.get("function", tool).get("strict")), None)
    if strict is not None and not forced:
        raise RequestError(f"tools[{strict}].function.strict: this server holds a call to its schema only where "
                           "tool_choice asks for one; leave it out, and check the arguments",
                           f"tools[{strict}].function.strict", "unsupported_parameter")
    form = FORMATS[wanted] if wanted != "auto" else format_of(_template(tokenizer, made))
    asked = ({"role": "user", "content": "?"},)
    if form is None:
        raise RequestError(f"tools: the chat template of this model shows none of the forms in which calls are read, "
                           f"{', '.join(FORMATS)}; the server's option --tool-calls names one", "tools",
                           "unsupported_parameter")
    if Conversation(asked, made).text(tokenizer) == Conversation(asked).text(tokenizer):
        raise RequestError("tools: the chat template of this model does not write them, so that it would never know "
                           "of them", "tools", "unsupported_parameter")
    several = body.parallel_tool_calls is not False and named is None
    grammar = calls_grammar(made, form, named, several, _tokens(tokenizer, form)) if forced else None
    return Toolbox(made, form, None if several else 1, grammar)


def _forced(choice: Any, tools: Tuple[dict, ...]) -> Tuple[bool, Optional[str]]:
    """(whether a tool must be called, the one that must be) of ``tool_choice``."""
    if choice in (None, "auto"):
        return False, None
    if choice in ("required", "any"):
        return True, None
    inner = choice.get("function") if isinstance(choice, dict) else None
    name = inner.get("name") if isinstance(inner, dict) and choice.get("type") == "function" else None
    if not isinstance(name, str):
        raise RequestError(f"tool_choice={choice!r:.80}: expected \"none\", \"auto\", \"required\" or {{\"type\": "
                           "\"function\", \"function\": {\"name\": …}}", "tool_choice")
    known = [tool.get("function", tool)["name"] for tool in tools]
    if name not in known:
        raise RequestError(f"tool_choice names {name!r:.60}, which is none of the tools.{near(name, known)}",
                           "tool_choice")
    return True, name


def _tokens(tokenizer: Any, form: CallFormat) -> Dict[str, int]:
    """{text: id} of a format's texts that are special tokens."""
    backend = getattr(tokenizer, "backend", None)
    if backend is None:
        return {}
    special = special_texts(tokenizer)
    return {one: backend.token_to_id(one) for one in form.specials if one in special}


def checked_tools(tools: Tuple[dict, ...]) -> Tuple[dict, ...]:
    """Tools as a template reads them.

    Raises:
        RequestError: one is no function.
    """
    for number, tool in enumerate(tools):
        if tool.get("type", "function") != "function":
            raise RequestError(f"tools[{number}] has the type {tool['type']!r:.40}; this server knows functions only",
                               f"tools[{number}].type")
    try:
        return clean_tools(tools)
    except DataError as error:
        raise RequestError(str(error), "tools") from None


def _template(tokenizer: Any, tools: Optional[Tuple[dict, ...]]) -> str:
    if hasattr(tokenizer, "template_for"):
        return tokenizer.template_for(list(tools) if tools else None)
    return getattr(tokenizer, "chat_template", None) or ""


def conversation(body: ConversationBody, tokenizer: Any, box: Optional[Toolbox] = None) -> Conversation:
    """The prompt of a chat.

    Raises:
        RequestError: the messages or what goes with them cannot be used.
        TokenizerError: the template refuses them.
    """
    if not body.messages:
        raise RequestError("messages is empty; send at least one {\"role\": \"user\", \"content\": ...}", "messages")
    prepared = [_prepared(message, f"messages[{number}]") for number, message in enumerate(body.messages)]
    try:
        messages = clean_messages(prepared, roles=None)
    except DataError as error:
        raise RequestError(str(error), str(error).split(" ")[0].partition(".")[0]) from None
    goes_on = bool(body.continue_final_message)
    opens = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    if goes_on and opens:
        raise RequestError("continue_final_message goes on with the last message and add_generation_prompt opens a new "
                           "one; send one of them", "continue_final_message")
    tools = None if box is None else box.tools
    made = Conversation(messages, tools, _variables(body, _template(tokenizer, tools)), opens, goes_on)
    _check_written(made, tokenizer)
    return made


def _prepared(message: Dict[str, Any], where: str) -> Dict[str, Any]:
    """A message without what asks for nothing; an assistant's without a text and calls has an empty text."""
    kept = {name: value for name, value in message.items()
            if name == "content" or value not in (None, [], "") and name not in _NOTHING}
    for name in _REFUSED:
        if name in kept:
            raise RequestError(f"{where} has {name!r:.40}, which this server cannot use", where)
    kept["content"] = _parts(kept.get("content"))
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_without(call, "function", _NOTHING_OF_FUNCTIONS) for call in kept["tool_calls"]]
    if "reasoning" in kept:  # the newer name of the same
        kept.setdefault("reasoning_content", kept.pop("reasoning"))
    refusal = kept.pop("refusal", None)
    if kept.get("role") == "assistant" and kept["content"] is None and not kept.get("tool_calls"):
        kept["content"] = "" if refusal is None else refusal  # a refusal is what it said
    return kept


def _parts(content: Any) -> Any:
    """Content without what says nothing; a refusal among its parts is text."""
    if not isinstance(content, list):
        return content
    made = []
    for part in content:
        if isinstance(part, dict):
            part = {name: value for name, value in part.items() if name not in _NOTHING_OF_PARTS}
            if part.get("type") == "refusal":
                part = {"type": "text", "text": part.get("refusal")}
        made.append(part)
    return made


def _without(outer: Any, field: str, names: Tuple[str, ...]) -> Any:
    """A dictionary whose field, a dictionary, lacks these names."""
    if not isinstance(outer, dict) or not isinstance(outer.get(field), dict):
        return outer
    return {**outer, field: {name: value for name, value in outer[field].items() if name not in names}}


def _variables(body: ConversationBody, template: str) -> Dict[str, Any]:
    """What the template is told by name.

    Raises:
        RequestError: a name that the template does not read.
    """
    try:
        known = variables_of(template) - set(_TAKEN)
    except TokenizerError:
        known = frozenset()
    found: Dict[str, Any] = {}
    for name, value in (body.chat_template_kwargs or {}).items():
        field = f"chat_template_kwargs.{name:.40}"
        if name in _TAKEN:
            raise RequestError(f"{field}: send {name!r} as a field of its own", field)
        if name in known:
            found[name] = value
        elif value not in (None, False) and name not in _SWITCHES:
            raise RequestError(f"{field}: the chat template of this model does not read it.{near(name, known)}", field)
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None and "reasoning_effort" in known:
        found["reasoning_effort"] = effort
    elif effort not in (None, "none"):
        raise RequestError(f"reasoning_effort={effort!r:.40}: the chat template of this model does not read it; leave "
                           "it out", "reasoning_effort", "unsupported_parameter")
    return found


def _check_written(asked: Conversation, tokenizer: Any) -> None:
    """Refuse calls and their results in the history that the template would leave out.

    Raises:
        RequestError: it would.
    """
    told = [number for number, one in enumerate(asked.messages) if one.get("tool_calls") or one["role"] == "tool"]
    if not told:
        return
    text = asked.text(tokenizer)
    for number in told:
        one = dict(asked.messages[number])
        if one["role"] == "tool":
            changed, what = {**one, "content": f"{one['content']} #7q"}, "content"
        else:
            changed, what = _renamed(one), "tool_calls"
        messages = [*asked.messages[:number], changed, *asked.messages[number + 1:]]
        if _same(dataclasses.replace(asked, messages=messages), tokenizer, text):
            raise RequestError(f"messages[{number}].{what}: the chat template of this model leaves it out, so that the "
                               "model would not see it", f"messages[{number}]", "unsupported_parameter")


def _renamed(message: Mapping[str, Any]) -> Dict[str, Any]:
    """An assistant's message whose calls have another name."""
    calls: List[Dict[str, Any]] = []
    for call in message["tool_calls"]:
        inner: Union[Dict[str, Any], Any] = call.get("function", call)
        other = {**inner, "name": inner["name"] + "_7q"}
        calls.append({**call, "function": other} if "function" in call else other)
    return {**message, "tool_calls": calls}


def _same(asked: Conversation, tokenizer: Any, text: str) -> bool:
    try:
        return asked.text(tokenizer) == text
    except TokenizerError:  # it reads what was changed
        return False
