"""Rendering of chat templates (Jinja2) in a sandbox.

A template comes with a model's files, so it is foreign code: it runs in Jinja2's immutable
sandbox, without access to Python objects, files or imports.
"""

import datetime
import functools
import json

from colora_ms.errors import TokenizerError


def render(template, messages, add_generation_prompt=False, variables=None):
    """Render a conversation.

    Args:
        template: Jinja2 source.
        messages: list of ``{"role": ..., "content": ...}``.
        add_generation_prompt: end with the opening of the assistant's turn.
        variables: further names for the template (``bos_token``, ``tools``, ...).

    Returns:
        The prompt as ``str``.

    Raises:
        TokenizerError: messages of a wrong form, or the template fails or refuses them.
    """
    _check(messages)
    from jinja2 import TemplateError
    try:
        return _compile(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **(variables or {}))
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
                                                extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _check(messages):
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TokenizerError(f"messages is {messages!r:.80}, expected a list of "
                             "{'role': ..., 'content': ...} with at least one entry")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) \
                or "content" not in message:
            raise TokenizerError(f"messages[{index}] is {message!r:.80}, expected a dictionary with "
                                 "'role' and 'content'")
