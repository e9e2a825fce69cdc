"""Answers in OpenAI's form: objects, server-sent events, token counts, calls, and the records of the contrast.

A subclass of :class:`Answers` for each kind of request: :class:`ChatAnswers`, :class:`CompletionAnswers`, and
:class:`colora_ms.serving.http.responses.ResponseAnswers`. What is streamed joins to what is given as a whole.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Dict, List, Optional, Sequence

from colora_ms.decoding.completion import Completion, TokenLogprob, TokenRecord
from colora_ms.serving.handle import Piece
from colora_ms.serving.http.calls import Call, CallReader, Part
from colora_ms.serving.http.conversation import Toolbox
from colora_ms.serving.http.logprobs import Place, Places, best_places, chat_content, completion_lists

#: Ends every stream of chunks.
DONE = b"data: [DONE]\n\n"


class Answers:
    """Builds what one request gets.

    Args:
        model: the name that it asked for.
        copies: answers that are computed of each prompt; wanted: the best of them, that are given.
        counts: whether a stream ends with token counts.
        top: log-probabilities of so many best tokens beside each token's own; None: none at all.

    Attributes:
        prompts: the places of each prompt's tokens, where their log-probabilities are wanted.
    """

    #: Whether the prompts' own log-probabilities are wanted.
    scores_prompts = False

    def __init__(self, model: str, copies: int = 1, wanted: Optional[int] = None, counts: bool = False,
                 top: Optional[int] = None) -> None:
        self.model = model
        self.copies = copies
        self.wanted = copies if wanted is None else wanted
        self.counts = counts
        self.top = top
        self.created = int(time.time())
        self.prompts: List[List[Place]] = []

    def whole(self, completions: Sequence[Completion]) -> Dict[str, Any]:
        """The object of an answer that is not streamed."""
        raise NotImplementedError

    def opening(self, index: int) -> bytes:
        """The first events of a choice."""
        raise NotImplementedError

    def piece(self, index: int, piece: Piece) -> bytes:
        """The events of a :class:`colora_ms.serving.Piece`; none if they would be empty."""
        raise NotImplementedError

    def ending(self, index: int, completion: Completion) -> bytes:
        """The events that end a choice."""
        raise NotImplementedError

    def closing(self, completions: Sequence[Completion]) -> bytes:
        """The last events of a stream."""
        raise NotImplementedError

    def failure(self, error: Dict[str, Any]) -> bytes:
        """The event of an error in a stream."""
        return event(error)


class _Chunked(Answers):
    """What chat and completions have in common.

    Args:
        tokenizer: the model's, which names tokens.
        records: whether its choices carry records.
    """

    kind = chunk = prefix = ""

    def __init__(self, model: str, tokenizer: Any, records: bool = False, **more: Any) -> None:
        super().__init__(model, **more)
        self.records = records
        self.places = Places(tokenizer)
        self._head = {"id": self.prefix + uuid.uuid4().hex, "created": self.created, "model": model}

    def whole(self, completions: Sequence[Completion]) -> Dict[str, Any]:
        """The object of an answer that is not streamed."""
        kept = list(range(len(completions)))
        if self.wanted < self.copies:
            kept = best_places(completions, self.copies, self.wanted)
        choices = [self._whole(index, completions[place]) for index, place in enumerate(kept)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage(completions, self.copies)}

    def closing(self, completions: Sequence[Completion]) -> bytes:
        """Token counts, where they are wanted, and the end."""
        counts = self._event([], usage=usage(completions, self.copies)) if self.counts else b""
        return counts + DONE

    def _whole(self, index: int, completion: Completion) -> Dict[str, Any]:
        raise NotImplementedError

    def _event(self, choices: List[Dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "object": self.chunk, "choices": choices, **more})

    def _choice(self, index: int, text: Dict[str, Any], reason: Optional[str] = None,
                records: Sequence[TokenRecord] = (), logprobs: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        found: Dict[str, Any] = {"index": index, **text, "logprobs": logprobs, "finish_reason": reason}
        if self.records:
            found["records"] = [{**vars(one), "changed": one.changed} for one in records]
        return found


class CompletionAnswers(_Chunked):
    """Of /v1/completions.

    Args:
        echo: texts of the prompts, to stand before the answers'; None: they do not.
    """

    kind = chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(self, model: str, tokenizer: Any, echo: Optional[List[str]] = None, **more: Any) -> None:
        super().__init__(model, tokenizer, **more)
        self._echo = echo
        self.scores_prompts = echo is not None and self.top is not None
        self._offsets: Dict[int, int] = {}  # of a stream: characters of the texts of the tokens that were given

    def _before(self, index: int) -> str:
        return "" if self._echo is None else self._echo[index // self.wanted]

    def _logprobs(self, places: Sequence[Place], offset: int = 0) -> Optional[Dict[str, Any]]:
        return None if self.top is None else completion_lists(places, self.top, offset)

    def _prompt(self, index: int) -> List[Place]:
        return self.prompts[index // self.wanted] if self.scores_prompts else []

    def _whole(self, index: int, completion: Completion) -> Dict[str, Any]:
        text = {"text": self._before(index) + completion.text}
        places = [*self._prompt(index), *self.places.answer(completion.logprobs)]
        return self._choice(index, text, completion.finish_reason, completion.records, self._logprobs(places))

    def opening(self, index: int) -> bytes:
        """The prompt's text, where it is wanted."""
        if not self._before(index):
            return b""
        text = {"text": self._before(index)}
        return self._event([self._choice(index, text, logprobs=self._given(index, self._prompt(index)))])

    def piece(self, index: int, piece: Piece) -> bytes:
        """New text, new records, new log-probabilities."""
        if not piece.text and not (self.records and piece.records) and not piece.logprobs:
            return b""
        logprobs = self._given(index, self.places.answer(piece.logprobs))
        return self._event([self._choice(index, {"text": piece.text}, None, piece.records, logprobs)])

    def _given(self, index: int, places: Sequence[Place]) -> Optional[Dict[str, Any]]:
        """The lists of a part of a stream."""
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(one.text) for one in places)
        return self._logprobs(places, offset)

    def ending(self, index: int, completion: Completion) -> bytes:
        """The reason of the end."""
        return self._event([self._choice(index, {"text": ""}, completion.finish_reason)])


class ChatAnswers(_Chunked):
    """Of /v1/chat/completions.

    Args:
        box: the tools that may be called; None: the whole answer is text.
    """

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, model: str, tokenizer: Any, box: Optional[Toolbox] = None, **more: Any) -> None:
        super().__init__(model, tokenizer, **more)
        self._box = box
        self._streams: Dict[int, AnswerParts] = {}

    def _whole(self, index: int, completion: Completion) -> Dict[str, Any]:
        parts = AnswerParts(self._box)
        found = [*parts.push(completion.text), *parts.end()]
        text = "".join(part for part in found if isinstance(part, str))
        calls = [_call(part) for part in found if isinstance(part, Call)]
        message: Dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        if calls:
            message["tool_calls"] = calls
        return self._choice(index, {"message": message}, parts.reason(completion), completion.records,
                            self._logprobs(completion.logprobs))

    def _logprobs(self, made: Sequence[TokenLogprob]) -> Optional[Dict[str, Any]]:
        return None if self.top is None else chat_content(self.places.answer(made))

    def opening(self, index: int) -> bytes:
        """Who speaks."""
        self._streams[index] = AnswerParts(self._box)
        return self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])

    def piece(self, index: int, piece: Piece) -> bytes:
        """New text, new calls, new records, new log-probabilities."""
        return self._parts(index, self._streams[index].push(piece.text), piece.records, piece.logprobs)

    def ending(self, index: int, completion: Completion) -> bytes:
        """What was held back, and the reason of the end."""
        stream = self._streams[index]
        rest = self._parts(index, stream.end())
        return rest + self._event([self._choice(index, {"delta": {}}, stream.reason(completion))])

    def _parts(self, index: int, parts: List[Part], records: Sequence[TokenRecord] = (),
               made: Sequence[TokenLogprob] = ()) -> bytes:
        """An event a part; records and log-probabilities stand in the first."""
        stream = self._streams[index]
        deltas: List[Dict[str, Any]] = []
        for part in parts:
            if isinstance(part, Call):
                deltas.append({"tool_calls": [{"index": stream.numbers[part.id], **_call(part)}]})
            else:
                deltas.append({"content": part})
        if not deltas and (self.records and records or made):
            deltas.append({})
        choices = [self._choice(index, {"delta": delta}, None, () if place else records,
                                None if place or not made else self._logprobs(made))
                   for place, delta in enumerate(deltas)]
        return b"".join(self._event([choice]) for choice in choices)


class AnswerParts:
    """The text of one answer as text and calls.

    Attributes:
        numbers: {id of a call: its place among the calls}.

    Args:
        box: the tools that may be called; None: all is text.
    """

    def __init__(self, box: Optional[Toolbox]) -> None:
        self._reader: Optional[CallReader] = None if box is None else box.reader()
        self.numbers: Dict[str, int] = {}

    def push(self, text: str) -> List[Part]:
        """Parts that are certain with this text."""
        return self._counted(self._reader.push(text) if self._reader is not None else [text] if text else [])

    def end(self) -> List[Part]:
        """The last parts."""
        return self._counted(self._reader.end() if self._reader is not None else [])

    def reason(self, completion: Completion) -> str:
        """The reason of the end: calls that are whole are one, however the text behind them ended."""
        ended = completion.finish_reason in ("stop", "length")
        return "tool_calls" if self.numbers and ended else completion.finish_reason

    def _counted(self, parts: List[Part]) -> List[Part]:
        for part in parts:
            if isinstance(part, Call):
                self.numbers.setdefault(part.id, len(self.numbers))
        return parts


def _call(call: Call) -> Dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def event(content: Any, name: Optional[str] = None) -> bytes:
    """A server-sent event as bytes."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


def usage(completions: Sequence[Completion], copies: int = 1) -> Dict[str, int]:
    """OpenAI's token counts of a request; a prompt counts once, however many answers it has."""
    prompt = sum(one.prompt_tokens for one in completions[::copies])
    generated = sum(len(one.tokens) for one in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
