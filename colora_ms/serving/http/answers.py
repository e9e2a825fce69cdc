"""Answers in OpenAI's form: objects, server-sent events, token counts, and the records of the contrast."""

import json
import time
import uuid


class Answers:
    """Builds what one request gets.

    Args:
        chat: whether it came to /v1/chat/completions.
        model: the name that it asked for.
        records: whether its choices carry records.
        echo: texts of the prompts, to stand before the answers'; None: they do not.
    """

    def __init__(self, chat, model, records, echo=None):
        self.chat = chat
        self.records = records
        self.echo = echo
        prefix = "chatcmpl-" if chat else "cmpl-"
        self._head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, completions):
        """The object of an answer that is not streamed."""
        choices = []
        for index, one in enumerate(completions):
            text = {"text": self._before(index) + one.text}
            if self.chat:
                text = {"message": {"role": "assistant", "content": one.text}}
            choices.append(self._choice(index, text, one.finish_reason, one.records))
        return {**self._head, "object": "chat.completion" if self.chat else "text_completion", "choices": choices,
                "usage": usage(completions)}

    def opening(self, index):
        """The first event of a choice; None if it needs none."""
        if self.chat:
            return self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])
        return self._event([self._choice(index, {"text": self._before(index)})]) if self._before(index) else None

    def _before(self, index):
        return "" if self.echo is None else self.echo[index]

    def piece(self, index, piece):
        """The event of a :class:`colora_ms.serving.Piece`; None if it would be empty."""
        if not piece.text and not (self.records and piece.records):
            return None
        text = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return self._event([self._choice(index, text, None, piece.records)])

    def ending(self, index, completion):
        """The event that says why a choice ended."""
        text = {"delta": {}} if self.chat else {"text": ""}
        return self._event([self._choice(index, text, completion.finish_reason)])

    def counts(self, completions):
        """The event with the token counts."""
        return self._event([], usage=usage(completions))

    def _event(self, choices, **more):
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self._head, "object": kind, "choices": choices, **more})

    def _choice(self, index, text, reason=None, records=()):
        found = {"index": index, **text, "logprobs": None, "finish_reason": reason}
        if self.records:
            found["records"] = [{**vars(one), "changed": one.changed} for one in records]
        return found


def event(content):
    """A server-sent event as bytes."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


#: Ends every stream.
DONE = b"data: [DONE]\n\n"


def usage(completions):
    """OpenAI's token counts of a request."""
    prompt = sum(one.prompt_tokens for one in completions)
    generated = sum(len(one.tokens) for one in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

