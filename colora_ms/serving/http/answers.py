"""Answers in OpenAI's form: objects, server-sent events, token counts, and the records of the contrast."""

import json
import time
import uuid


class Answers:
    """Builds what one request gets.

    Args:
        chat: whether it came to /v1/chat/completions.
        model: the name that it asked for.
        tokenizer: for the text of single tokens.
        records: whether its choices carry records.
    """

    def __init__(self, chat, model, tokenizer, records):
        self.chat = chat
        self.tokenizer = tokenizer
        self.records = records
        prefix = "chatcmpl-" if chat else "cmpl-"
        self._head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, completions):
        """The object of an answer that is not streamed."""
        choices = []
        for index, one in enumerate(completions):
            text = {"message": {"role": "assistant", "content": one.text}} if self.chat else {"text": one.text}
            choices.append(self._choice(index, text, one.finish_reason, one.records))
        return {**self._head, "object": "chat.completion" if self.chat else "text_completion", "choices": choices,
                "usage": usage(completions)}

    def opening(self, index):
        """The first event of a choice; None if it needs none."""
        return self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}})]) if self.chat else None

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
            found["records"] = [record_entry(one, self.tokenizer) for one in records]
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


def record_entry(record, tokenizer):
    """A TokenRecord for JSON: its numbers, whether the contrast changed the choice, and the text of both tokens."""
    return {**vars(record), "changed": record.changed, "text": tokenizer.decode([record.token]),
            "favourite_text": tokenizer.decode([record.favourite])}
