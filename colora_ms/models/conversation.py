"""Where chat templates differ in what they can read, decided once for training, decoding and serving.

``render`` stands for a function that renders messages with a template and raises ``TokenizerError`` where the
template refuses them. What it returns may be the text, or a tuple whose first entry is the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable

from colora_ms.errors import TokenizerError

Render = Callable[[Sequence[Mapping]], Any]


def writes_developer(render: Render) -> bool:
    """Whether a template writes a developer's message; those that leave it out or refuse it know it as system."""
    try:
        return "be#brief" in text_of(render([{"role": "developer", "content": "be#brief"},
                                             {"role": "user", "content": "?"}]))
    except Exception:  # of a foreign tokenizer it may be any
        return False


def as_system(messages: Sequence[Mapping], render: Render) -> list[dict]:
    """The messages, a developer's as the system's where the template does not write a developer's."""
    made = [dict(item) for item in messages]
    named = [item for item in made if item.get("role") == "developer"]
    if named and not writes_developer(render):
        for item in named:
            item["role"] = "system"
    return made


def render_absent(messages: Sequence[Mapping], render: Render) -> Any:
    """What ``render`` makes of messages of which some have the content ``None``, as OpenAI's without a text have.

    Where a template would fail on that, or write the word None, it is given an empty text.

    Raises:
        TokenizerError: the template refuses the messages.
    """
    if all(item.get("content") is not None for item in messages):
        return render(messages)
    empty = render([{**item, "content": "" if item.get("content") is None else item["content"]} for item in messages])
    try:
        absent = render(messages)
    except TokenizerError:
        return empty
    return empty if text_of(absent).count("None") > text_of(empty).count("None") else absent


def text_of(rendered: Any) -> str:
    """The text of what a ``render`` returned."""
    return rendered[0] if isinstance(rendered, tuple) else rendered
