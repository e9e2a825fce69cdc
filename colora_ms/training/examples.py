"""What training and evaluation work on: one question with its answer, one document, or a pair of answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from colora_ms.errors import DataError
from colora_ms.models.messages import clean_messages, clean_tools, short


@dataclasses.dataclass(frozen=True)
class Example:
    """A question and the answer that the model should learn to give, or a document.

    Exactly one of ``prompt``, ``messages`` and ``text`` is set.

    Attributes:
        completion: the answer (str), its last message's text if there are ``answer`` messages; "" for a document and
            for an answer that only calls tools.
        prompt: the question as plain text.
        messages: the question as a conversation, a tuple of messages that ends before the answer; see
            ``messages.clean_messages``, which all of them have gone through.
        id: a name that is unique within its data set.
        meta: whatever else the source knew about the item.
        answer: the answer as messages, where it is more than a text: a tuple that begins and ends with an
            assistant's message; ``None`` if ``completion`` says it all.
        tools: what the answer may call, a tuple as the chat template reads it.
        text: a document, all of which is learned.
    """

    completion: str = ""
    prompt: str | None = None
    messages: tuple | None = None
    id: str = ""
    meta: dict = dataclasses.field(default_factory=dict)
    answer: tuple | None = None
    tools: tuple = ()
    text: str | None = None

    def __post_init__(self) -> None:
        try:
            self._check()
        except DataError as error:
            raise DataError(f"example {self.id or '(no id)'}: {error}") from None

    def _check(self) -> None:
        if sum(item is not None for item in (self.prompt, self.messages, self.text)) != 1:
            raise DataError("exactly one of prompt, messages and text must be given")
        if self.text is not None:
            _check_text(self.text, "text")
            if self.completion or self.answer or self.tools:
                raise DataError("a text has no question, and so no answer and no tools")
            return
        object.__setattr__(self, "tools", clean_tools(self.tools))
        if self.answer is not None:
            answer = _answer(self.answer)
            if self.completion and self.completion != answer[-1]["content"]:
                raise DataError(f"the completion is {short(self.completion)}, but the answer's last message says "
                                f"{short(answer[-1]['content'])}")
            object.__setattr__(self, "answer", answer)
            object.__setattr__(self, "completion", answer[-1]["content"] or "")
        if self.answer is None or not self.answer[-1].get("tool_calls"):
            _check_text(self.completion, "completion")
        if self.prompt is not None:
            _check_text(self.prompt, "prompt")
            return
        if not isinstance(self.messages, (list, tuple)) or not self.messages:
            raise DataError(f"messages is {short(self.messages)}, expected a list with at least one user message")
        object.__setattr__(self, "messages", clean_messages(self.messages))
        if self.messages[-1]["role"] == "assistant":
            raise DataError("two assistant messages stand at the end of the conversation, expected one")

    @property
    def conversation(self) -> tuple[dict, ...]:
        """The question as a tuple of messages; a plain prompt is a user's message."""
        return ({"role": "user", "content": self.prompt},) if self.messages is None else self.messages

    @property
    def reply(self) -> tuple[dict, ...]:
        """The answer as a tuple of messages."""
        return ({"role": "assistant", "content": self.completion},) if self.answer is None else self.answer

    @property
    def question(self) -> str:
        """A string that is equal for two examples exactly if they ask the same."""
        if self.text is not None:
            return self.text
        return _asked(self.conversation)

    def asked(self, loss: str = "last") -> list[str]:
        """The questions that the example teaches to answer, as strings like ``question``.

        Args:
            loss: with ``"all"`` also those that earlier assistant's messages answer.
        """
        if self.text is not None or loss != "all":
            return [self.question]
        said = self.conversation
        return [_asked(said[:end]) for end in range(1, len(said)) if said[end]["role"] == "assistant"] + [self.question]


@dataclasses.dataclass(frozen=True)
class Preference:
    """A question with a better and a worse answer.

    Exactly one of ``prompt`` and ``messages`` is set. The answers are texts, or tuples of messages that begin and end
    with an assistant's message.

    Attributes:
        chosen, rejected: the better and the worse answer.
        prompt, messages, id, meta, tools: as in ``Example``.
        chosen_example, rejected_example: the question with one of the answers as ``Example``; their ids are
            ``<id>#chosen`` and ``<id>#rejected``.
    """

    chosen: str | tuple
    rejected: str | tuple
    prompt: str | None = None
    messages: tuple | None = None
    id: str = ""
    meta: dict = dataclasses.field(default_factory=dict)
    tools: tuple = ()
    chosen_example: Example = dataclasses.field(init=False, repr=False, compare=False)
    rejected_example: Example = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        made = {}
        for side in ("chosen", "rejected"):
            value = getattr(self, side)
            part = {"completion": value} if isinstance(value, str) or value is None else {"answer": value}
            try:
                made[side] = Example(**part, prompt=self.prompt, messages=self.messages, id=f"{self.id}#{side}",
                                     meta=self.meta, tools=self.tools)
            except DataError as error:
                text = str(error).removeprefix(f"example {self.id}#{side}: ").replace("the completion",
                                                                                     f"the answer {side}")
                raise DataError(f"pair {self.id or '(no id)'}: {text}") from None
            object.__setattr__(self, f"{side}_example", made[side])
            if made[side].answer is not None:
                object.__setattr__(self, side, made[side].answer)
        object.__setattr__(self, "messages", made["chosen"].messages)
        object.__setattr__(self, "tools", made["chosen"].tools)

    @property
    def question(self) -> str:
        """A string that is equal for two pairs exactly if they ask the same."""
        return self.chosen_example.question

    def asked(self, loss: str = "last") -> list[str]:
        """``Example.asked`` of the question."""
        return self.chosen_example.asked(loss)


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"the {what} is {short(value)}, expected a text that is not empty")


def _answer(messages: object) -> tuple[dict, ...]:
    """The checked messages of an answer."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"the answer is {short(messages)}, expected a list of messages")
    messages = clean_messages(messages, "answer")
    for place, item in (("begin", messages[0]), ("end", messages[-1])):
        if item["role"] != "assistant":
            raise DataError(f"the answer must {place} with an assistant's message; found the role {item['role']!r}")
    return messages


def _asked(messages: Sequence[dict]) -> str:
    """The question of a conversation as a string."""
    if len(messages) == 1 and messages[0]["role"] == "user" and set(messages[0]) <= {"role", "content", "weight"}:
        return messages[0]["content"]
    rest = ("name", "reasoning_content", "tool_calls", "tool_call_id")
    return json.dumps([[item["role"], item["content"], *({key: item[key]} for key in rest if key in item)]
                       for item in messages], ensure_ascii=False)
