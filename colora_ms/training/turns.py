"""Which characters of a rendered conversation the assistant has written, its end of turn included.

Where the chat template has ``{% generation %}`` blocks, they say it. Otherwise the conversation is rendered up to each
turn: ``render(messages[:k + 1])`` must begin with the prompt of turn k, ``render(messages[:k])`` with the generation
prompt, and the whole must begin with it. Templates that write earlier turns differently once others follow (they drop
the reasoning, say) break the latter: then each turn is an example of its own, rendered as when it is the last one.

A turn ends with what the template writes behind it. White space behind that (ChatML's newline behind ``<|im_end|>``) is
read, but carries no loss: it is not generated.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from colora_ms.errors import DataError


def learned_turns(messages: Sequence[dict], begin: int, marked: bool = False) -> list[int]:
    """Indices from ``begin`` on of the assistant's messages that carry a loss.

    A message of weight 0 carries none, nor does one that says nothing (to learn it would be to learn silence), nor one
    that opens a conversation: nothing asks for it. Generation blocks (``marked``) hold that one, too, as in
    transformers.
    """
    return [k for k in range(begin if marked else max(begin, 1), len(messages))
            if messages[k]["role"] == "assistant" and messages[k].get("weight", 1) and says_something(messages[k])]


def says_something(message: dict) -> bool:
    """Whether an assistant's message has a text, a call or a thought."""
    return bool((message["content"] or "").strip() or message.get("tool_calls")
                or (message.get("reasoning_content") or "").strip())


def unlearned_notes(messages: Sequence[dict], begin: int, learned: Sequence[int]) -> list[str]:
    """Names of what these messages have and the loss leaves out without anybody's asking, for a warning."""
    found = []
    for k, item in enumerate(messages):
        if item["role"] != "assistant" or k in learned or item.get("weight", 1) == 0:
            continue
        if k >= begin and not says_something(item):
            found.append("an assistant's message that says nothing")
        elif k >= begin:
            found.append("an assistant's message that opens a conversation")
        elif item.get("weight") == 1:
            found.append("an earlier assistant's message of weight 1 (data.loss: all learns it)")
    return found


def renderings_of(render: Any, messages: Sequence[dict], turns: Sequence[int],
                  name: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """The texts to train on.

    Args:
        render: ``function(messages, generation=False, spans=False)``: the text, with the opening of the assistant's
            turn if ``generation``, and with ``spans`` the pair (text, [(begin, end)]) of the generation blocks. Its
            attribute ``marked`` tells whether the template has such blocks; ``parted`` is set if a turn does not begin
            with the generation prompt.
        messages: a whole conversation.
        turns: indices of the assistant's messages that are learned, rising.
        name: of the example, for errors.

    Returns:
        List of ``(text, [(begin, end)])`` in characters; ``[]`` if nothing is learned.

    Raises:
        DataError: the template refuses the messages, or it cannot be told where a turn begins.
    """
    if not turns:
        return []
    try:
        if render.marked:
            found = _marked(render, messages, turns)
            return [found] if found[1] else []
        text = render(messages)
        spans = [_span(render, messages, k, text) for k in turns]
        whole = [span for span in spans if span is not None]
        if len(whole) == len(spans):
            return [(text, whole)]
        alone = [(k, render(messages[:k + 1])) for k in turns]
        made = [(k, text, _span(render, messages[:k + 1], k, text)) for k, text in alone]
    except DataError as error:
        raise DataError(f"example {name}: {error}") from None
    texts = []
    for k, text, span in made:
        if span is None:
            raise DataError(f"example {name}: the chat template writes the conversation before message {k} differently "
                            "once the answer follows, so that nobody can tell where the answer begins")
        texts.append((text, [span]))
    return texts


def _marked(render: Any, messages: Sequence[dict], turns: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """(text, spans) by generation blocks."""
    text, spans = render(messages, spans=True)
    said = [k for k, item in enumerate(messages) if item["role"] == "assistant"]
    if turns == said:
        return text, spans
    if len(spans) == len(said):
        return text, [span for k, span in zip(said, spans) if k in turns]
    # More or fewer blocks than turns: those of turn k are there with message k, and not before it.
    counts = [len(render(messages[:k], spans=True)[1]) if k else 0 for k in range(len(messages))] + [len(spans)]
    return text, [span for k in turns for span in spans[counts[k]:counts[k + 1]]]


def _span(render: Any, messages: Sequence[dict], k: int, text: str) -> tuple[int, int] | None:
    """(begin, end) of turn k in ``text``; None if the text does not begin with the conversation up to it."""
    upto = text if k == len(messages) - 1 else render(messages[:k + 1])
    if not text.startswith(upto):
        return None
    head = render(messages[:k], generation=True)
    if upto.startswith(head):
        begin = len(head)
    else:
        # A generation prompt that also opens a thought: the turn begins where both part.
        if not upto.startswith(render(messages[:k])):
            return None
        begin, render.parted = len(os.path.commonprefix([head, upto])), True
    turn = upto[begin:].rstrip()
    content = (messages[k]["content"] or "").strip()
    if content and turn.endswith(content) and not messages[k].get("tool_calls"):
        return begin, len(upto)  # nothing but white space ends the turn
    return begin, begin + len(turn)
