"""Rendering of chat templates (Jinja2) in a sandbox, as transformers renders them.

A template comes with a model's files, so it is foreign code: it runs in Jinja2's immutable
sandbox, without access to Python objects, files or imports.

``{% generation %} ... {% endgeneration %}`` marks what the assistant writes; it renders as its
content, and ``render_spans`` tells where that lies.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Optional

from colora_ms.errors import TokenizerError

#: The pair of characters that stands around generation blocks while spans are looked for, else None.
_marks = contextvars.ContextVar("marks", default=None)

# characters that Unicode keeps free for a program's own use
_MARK_CHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

# what transformers appends to find where the last message ends
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "


def render(template: str, messages: Sequence[Mapping], add_generation_prompt: bool = False,
           variables: Optional[Mapping] = None, continue_final_message: bool = False) -> str:
    """Render a conversation.

    Args:
        template: Jinja2 source.
        messages: list of ``{"role": ..., "content": ...}``. The content is a text, a list of parts
            (``{"type": "text", "text": ...}``), or ``None`` or absent in an assistant's message (one with
            ``tool_calls``, say); a tool's message may hold any JSON value. Other keys go to the template as they are.
        add_generation_prompt: end with the opening of the assistant's turn.
        variables: further names for the template (``bos_token``, ``tools``, ...). ``tools`` and
            ``documents`` are None where they are not given.
        continue_final_message: end behind the text of the last message, without its end of turn.

    Returns:
        The prompt as ``str``.

    Raises:
        TokenizerError: messages of a wrong form, or the template fails or refuses them.
    """
    _check(messages)
    if not continue_final_message:
        return _run(template, messages, add_generation_prompt, variables)
    if add_generation_prompt:
        raise TokenizerError("add_generation_prompt opens a new turn and continue_final_message goes on with the last "
                             "one; choose one of them")
    messages, last = _with_tag(messages)
    text = _run(template, messages, False, variables)
    if last.strip() not in text or _CONTINUE.strip() not in text:
        raise TokenizerError("the chat template leaves out or changes the last message, so it cannot be continued")
    at = text.rindex(_CONTINUE.strip())
    # where the template has trimmed the tag, it trims blanks behind the message, too
    return text[:at] if text.startswith(_CONTINUE, at) else text[:at].rstrip()


def render_spans(template: str, messages: Sequence[Mapping], add_generation_prompt: bool = False,
                 variables: Optional[Mapping] = None) -> tuple[str, list[tuple[int, int]]]:
    """``render``, with the places of the generation blocks.

    Returns:
        ``(text, spans)``: the same text as ``render``'s, and the (begin, end) characters of what
        stands between ``{% generation %}`` and ``{% endgeneration %}``, in order, without empty
        ones; ``[]`` for a template without such blocks (see ``marks_generation``).

    Raises:
        TokenizerError: as ``render``; or the template goes on to change what the blocks gave.
    """
    _check(messages)
    now = datetime.datetime.now()  # both renderings show the same time
    variables = {"strftime_now": now.strftime, **(variables or {})}
    text = _run(template, messages, add_generation_prompt, variables)
    if not marks_generation(template):
        return text, []
    marks = tuple([character for character in _MARK_CHARACTERS if character not in text][:2])
    if len(marks) < 2:
        raise TokenizerError("the conversation holds all of the characters U+FDD0 to U+FDEF, which are no text")
    token = _marks.set(marks)
    try:
        marked = _run(template, messages, add_generation_prompt, variables)
    finally:
        _marks.reset(token)
    spans, begin, depth, length = [], 0, 0, 0
    for character in marked:
        if character == marks[0]:
            begin = begin if depth else length
            depth += 1
        elif character == marks[1]:
            depth -= 1
            if depth == 0 and begin < length:
                spans.append((begin, length))
        else:
            length += 1
    if marked.replace(marks[0], "").replace(marks[1], "") != text:
        raise TokenizerError("the chat template changes the text of a {% generation %} block after the block (a "
                             "filter over it, say), so the places of the assistant's turns cannot be told")
    return text, spans


def marks_generation(template: str) -> bool:
    """Whether a template has ``{% generation %}`` blocks.

    Raises:
        TokenizerError: it is no Jinja2 template.
    """
    with _said():
        return _compile(template).environment.has_generation


@functools.lru_cache(maxsize=16)
def variables_of(template: str) -> frozenset:
    """The names that a template reads and does not set itself: ``tools``, ``enable_thinking``, ...

    Raises:
        TokenizerError: it is no Jinja2 template.
    """
    from jinja2 import meta

    with _said():
        environment = _environment()
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def _run(template, messages, add_generation_prompt, variables):
    names = {"tools": None, "documents": None, **(variables or {})}
    _check_records("tools", names["tools"])
    _check_records("documents", names["documents"])
    with _said():
        return _compile(template).render(**{**names, "messages": messages,
                                            "add_generation_prompt": add_generation_prompt})


@contextlib.contextmanager
def _said():
    """Failures of a template as TokenizerError."""
    from jinja2 import TemplateError
    try:
        yield
    except TemplateError as error:
        raise TokenizerError(f"the chat template refuses the conversation: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError,
            MemoryError) as error:
        raise TokenizerError(f"the chat template fails on the conversation: {error}") from None


@functools.lru_cache(maxsize=16)
def _compile(template):
    """Compiling a long template takes milliseconds, so a server keeps the last few."""
    return _environment().from_string(template)


def _environment():
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[_generation_extension(), loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=1)
def _generation_extension():
    """The class of the Jinja2 extension that knows ``{% generation %}``; a class of its own needs Jinja2's import."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """Renders the block's content, between marks while spans are looked for."""

        tags = {"generation"}

        def __init__(self, environment):
            super().__init__(environment)
            environment.extend(has_generation=False)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            self.environment.has_generation = True
            return nodes.CallBlock(self.call_method("between_marks"), [], [], body).set_lineno(line)

        def between_marks(self, caller):
            """The content of the block."""
            marks = _marks.get()
            return caller() if marks is None else marks[0] + caller() + marks[1]

    return Generation


def _with_tag(messages):
    """(messages with a tag behind the last text of the last one, that text)."""
    messages = copy.deepcopy(list(messages))
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE
        return messages, content
    for part in reversed(content if isinstance(content, (list, tuple)) else ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            content, part["text"] = part["text"], part["text"] + _CONTINUE
            return messages, content
    raise TokenizerError("the last message has no text that could be continued")


def _check(messages):
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TokenizerError(f"messages is {messages!r:.80}, expected a list of "
                             "{'role': ..., 'content': ...} with at least one entry")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"messages[{index}] is {message!r:.80}, expected a dictionary with "
                                 "'role' and 'content'")
        content, role = message.get("content"), message["role"]
        if content is None and role in ("assistant", "model"):
            continue  # tool calls, or reasoning, or an answer that was cut
        if content is None:
            raise TokenizerError(f"messages[{index}] is {message!r:.80}, expected a dictionary with 'role' and "
                                 "'content' (only an assistant's message may be without content)")
        parts = isinstance(content, (list, tuple)) and all(isinstance(part, (dict, str)) for part in content)
        if not isinstance(content, str) and not parts and role not in ("tool", "ipython", "function"):
            raise TokenizerError(f"messages[{index}]: the content is {content!r:.80}, expected a text or a list of "
                                 "parts such as {'type': 'text', 'text': ...}")


def _check_records(name, value):
    if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(item, dict) for item in value)):
        raise TokenizerError(f"{name} is {value!r:.80}, expected a list of dictionaries" + (
            " (JSON schemas of functions)" if name == "tools" else ""))
