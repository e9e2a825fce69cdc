"""Answers in OpenAI's form: objects, server-sent events, token counts, and the records of the contrast."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Dict, Iterable, List, Optional, Sequence

from colora_ms.decoding.completion import Completion, TokenRecord
from colora_ms.serving.handle import Piece


class Answers:
    """Builds what one request gets.

    Args:
        chat: whether it came to /v1/chat/completions.
        model: the name that it asked for.
        records: whether its choices carry records.
        echo: texts of the prompts, to stand before the answers'; None: they do not.
    """

    def __init__(self, chat: bool, model: str, records: bool, echo: Optional[List[str]] = None) -> None:
        self.chat = chat
        self.records = records
        self.echo = echo
        prefix = "chatcmpl-" if chat else "cmpl-"
        self._head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, completions: Sequence[Completion]) -> Dict[str, Any]:
        """The object of an answer that is not streamed."""
        choices = []
        for index, one in enumerate(completions):
            text: Dict[str, Any] = {"text": self._before(index) + one.text}
            if self.chat:
                text = {"message": {"role": "assistant", "content": one.text}}
            choices.append(self._choice(index, text, one.finish_reason, one.records))
        return {**self._head, "object": "chat.completion" if self.chat else "text_completion", "choices": choices,
                "usage": usage(completions)}

    def opening(self, index: int) -> Optional[bytes]:
        """The first event of a choice; None if it needs none."""
        if self.chat:
            return self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])
        return self._event([self._choice(index, {"text": self._before(index)})]) if self._before(index) else None

    def _before(self, index: int) -> str:
        return "" if self.echo is None else self.echo[index]

    def piece(self, index: int, piece: Piece) -> Optional[bytes]:
        """The event of a :class:`colora_ms.serving.Piece`; None if it would be empty."""
        if not piece.text and not (self.records and piece.records):
            return None
        text = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return self._event([self._choice(index, text, None, piece.records)])

    def ending(self, index: int, completion: Completion) -> bytes:
        """The event that says why a choice ended."""
        text = {"delta": {}} if self.chat else {"text": ""}
        return self._event([self._choice(index, text, completion.finish_reason)])

    def counts(self, completions: Iterable[Completion]) -> bytes:
        """The event with the token counts."""
        return self._event([], usage=usage(completions))

    def _event(self, choices: List[Dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self._head, "object": kind, "choices": choices, **more})

    def _choice(self, index: int, text: Dict[str, Any], reason: Optional[str] = None,
                records: Sequence[TokenRecord] = ()) -> Dict[str, Any]:
        found: Dict[str, Any] = {"index": index, **text, "logprobs": None, "finish_reason": reason}
        if self.records:
            found["records"] = [{**vars(one), "changed": one.changed} for one in records]
        return found


def event(content: Any) -> bytes:
    """A server-sent event as bytes."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


#: Ends every stream.
DONE = b"data: [DONE]\n\n"


def usage(completions: Iterable[Completion]) -> Dict[str, int]:
    """OpenAI's token counts of a request."""
    completions = list(completions)
    prompt = sum(one.prompt_tokens for one in completions)
    generated = sum(len(one.tokens) for one in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

