"""How a question becomes the text in front of the answer; the same in training and evaluation.

``TextTemplate("Question: {prompt}\\nAnswer: {completion}")`` is plain text;
``ChatTemplate(tokenizer)`` uses the chat template that comes with the model.  Both have

    prompt(example) -> str        what the model reads
    answer(example) -> str        what it should write (without the end-of-text token)
    renderings(example, loss)     the whole texts that training reads, and which parts of them are learned
    request(example)              the prompt in the form to hand to a Generator
    digest -> str                 changes when the prompt of any example would change
    adds_special_tokens -> bool   whether the tokenizer still has to add a beginning-of-text token
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from colora_ms.errors import ConfigError, DataError, TokenizerError, near
from colora_ms.models.conversation import as_system, render_absent
from colora_ms.training.turns import learned_turns, renderings_of, unlearned_notes

if TYPE_CHECKING:
    from colora_ms.models.tokenizer import Tokenizer
    from colora_ms.training.examples import Example

DEFAULT_TEXT = "{prompt}\nAnswer: {completion}"

#: How many examples are rendered a second time to see whether the template writes a field at all.
_TRIES = 50


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A text to train on.

    Attributes:
        text: prompt and answer, or a whole conversation.
        spans: (begin, end) characters of the parts that carry a loss, in order.
        closed: whether the end-of-text token follows, as a part of the last span.
    """

    text: str
    spans: tuple
    closed: bool = False


class TextTemplate:
    """A plain text with the fields ``{prompt}`` and ``{completion}``; anything else is literal.

    Blanks between the last word and ``{completion}`` go to the answer: "Answer: 42" is read as
    the prompt "Answer:" and the answer " 42", because tokenizers join a blank with the word after
    it, and a prompt that ends with a blank makes a model stumble.

    Args:
        text: the template. It must hold ``{prompt}`` once and end with ``{completion}``.

    Raises:
        ConfigError: a field is missing, unknown or doubled.
    """

    adds_special_tokens = True
    unwritten, unlearned, parted = (), {}, 0

    def __init__(self, text: str = DEFAULT_TEXT) -> None:
        if not isinstance(text, str):
            raise ConfigError(f"the prompt template is {text!r}, expected a text")
        fields = re.findall(r"\{([A-Za-z_]\w*)\}", text)
        for name in fields:
            if name not in ("prompt", "completion"):
                raise ConfigError(f"the prompt template has the field {{{name}}}; it may hold "
                                  f"{{prompt}} and {{completion}}."
                                  f"{near(name, ['prompt', 'completion'])}")
        if fields.count("prompt") != 1 or fields.count("completion") != 1 \
                or not text.endswith("{completion}"):
            raise ConfigError(f"the prompt template {text!r} must hold {{prompt}} once and end "
                              "with {completion}, like 'Question: {prompt}\\nAnswer: {completion}'")
        head = text[:-len("{completion}")]
        self.text = text
        self._head = head.rstrip(" ")
        self._blanks = head[len(self._head):]
        self.digest = hashlib.sha256(b"text\0" + text.encode()).hexdigest()[:16]

    def prompt(self, example: Example) -> str:
        """The text in front of the answer."""
        asked = _messages(example)
        if len(asked) != 1:
            raise DataError(f"example {example.id}: a plain prompt template cannot render a "
                            f"conversation of {len(asked)} messages; use the model's "
                            "chat template (template: chat)")
        _refuse_parts(example, asked)
        return self._head.replace("{prompt}", example.question)

    def request(self, example: Example) -> str:
        """The prompt as text: the generator adds a beginning-of-text token if the model has one."""
        return self.prompt(example)

    def answer(self, example: Example) -> str:
        """The text of the answer, with the blanks that belong to it."""
        return self._blanks + example.completion

    def renderings(self, example: Example, loss: str = "last") -> list[Rendering]:
        """The texts to train on as a list of ``Rendering``: one, or none if the answer carries no loss.

        Raises:
            DataError: the example has parts that a plain text has no place for.
        """
        _refuse_parts(example, example.reply, "" if len(example.reply) == 1 else
                      f"an answer of {len(example.reply)} messages")
        prompt = self.prompt(example)
        text = prompt + self.answer(example)
        learned = example.reply[0].get("weight", 1)
        return [Rendering(text, ((len(prompt), len(text)),), closed=True)] if learned else []


class ChatTemplate:
    """The model's own chat template, with the answer as the assistant's turn.

    Args:
        tokenizer: has ``apply_chat_template(messages, add_generation_prompt=True, tools=...) -> str``, and
            ``marks_generation`` and ``return_spans`` as ``models.tokenizer.Tokenizer`` if the template may have
            ``{% generation %}`` blocks.
        system: a system message put in front of examples that have none; ``None`` leaves the
            template's own default.

    Attributes:
        unwritten: fields that some conversations have, such as ``reasoning_content``, and that the template has written
            in none of those rendered so far.
        unlearned: names of what such conversations have and the loss leaves out (see ``turns.unlearned_notes``).
        parted: how many examples were rendered whose answer does not stand behind the very prompt that ``prompt``
            gives, because the template opens the assistant's turn with more than it writes in front of an answer.
    """

    adds_special_tokens = False  # a chat template writes the beginning-of-text token itself

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        if system is not None and not isinstance(system, str):
            raise ConfigError(f"the system message is {system!r}, expected a text")
        self._tokenizer = tokenizer
        self._system = system
        self.parted = 0
        self._tried: dict[str, Any] = {}
        self._written: set[str] = set()
        self._dropped: dict[str, None] = {}
        self._seen, self.unlearned = set(), {}
        probe = self.render(self._said([{"role": "user", "content": "?"}]), generation=True)
        self.digest = hashlib.sha256(b"chat\0" + probe.encode()).hexdigest()[:16]

    @property
    def unwritten(self) -> tuple[str, ...]:
        """Names of such fields, and of messages whose text the template has left out."""
        return tuple(name for name in self._tried if name not in self._written) + tuple(self._dropped)

    def prompt(self, example: Example) -> str:
        """The rendered conversation up to where the assistant starts to speak."""
        return self.render(self._said(_messages(example)), getattr(example, "tools", ()), generation=True)

    def request(self, example: Example) -> list[int]:
        """The prompt as token ids, because the rendered text holds all special tokens already."""
        return list(self._tokenizer.encode(self.prompt(example), add_special_tokens=False))

    def answer(self, example: Example) -> str:
        """What the template writes behind the prompt: the answer and the end of its turn."""
        asked = self._said(_messages(example))
        text, spans = renderings_of(_Renderer(self, example), [*asked, *example.reply], [len(asked)], example.id)[0]
        return text[spans[0][0]:]

    def renderings(self, example: Example, loss: str = "last") -> list[Rendering]:
        """The texts to train on as a list of ``Rendering``.

        There is one with all turns that are learned, or one a turn where the template writes earlier turns differently
        once others follow; see ``turns``.

        Args:
            loss: ``"last"`` learns the answer, ``"all"`` every assistant's turn. Turns of weight 0 carry no loss.

        Raises:
            DataError: the template refuses the conversation, or what it writes cannot be told apart.
        """
        asked = self._said(_messages(example))
        said = [*asked, *example.reply]
        render = _Renderer(self, example)
        begin = len(asked) if loss == "last" else 0
        turns = learned_turns(said, begin, render.marked)
        self.unlearned.update(dict.fromkeys(unlearned_notes(said, begin, turns)))
        self._watch(said, example.tools)
        made = [Rendering(text, tuple(spans)) for text, spans in renderings_of(render, said, turns, example.id)]
        self._watch_contents(said, example.tools, [one.text for one in made])
        self.parted += bool(made and render.parted)
        return made

    def marks_generation(self, tools: Sequence[dict] = ()) -> bool:
        """Whether the model's template says with ``{% generation %}`` blocks what the assistant writes."""
        marks = getattr(self._tokenizer, "marks_generation", None)
        return marks is not None and marks(list(tools) or None)

    def _said(self, messages: Sequence[dict]) -> list[dict]:
        """The messages with the recipe's system message, developers' messages in a form that the template writes."""
        messages = [dict(item) for item in messages]
        if self._system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self._system})
        return as_system(messages, lambda given: self._tokenizer.apply_chat_template(given,
                                                                                     add_generation_prompt=False))

    def render(self, messages: Sequence[dict], tools: Sequence[dict] = (), generation: bool = False,
               spans: bool = False) -> Any:
        """The text of a conversation, or (text, spans) with ``spans``.

        An assistant's message without a text is given as ``None``, as OpenAI's are; where a template would fail on
        that, or write the word None, it is given as an empty text.
        """
        messages = [{key: value for key, value in item.items() if key != "weight"} for item in messages]
        options: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        if spans:
            options["return_spans"] = True
        try:
            return render_absent(messages, lambda given: self._tokenizer.apply_chat_template(
                given, add_generation_prompt=generation, **options))
        except TokenizerError as error:
            raise DataError(str(error)) from None

    def _watch(self, messages: Sequence[dict], tools: Sequence[dict]) -> None:
        """Note whether the template writes the fields that these messages have."""
        found = {name for item in messages for name in ("reasoning_content", "tool_calls", "name")
                 if name in item and (name != "name" or item["role"] != "tool")}
        for name in sorted(found) + (["tools"] if tools else []):
            if name in self._written or self._tried.get(name, 0) >= _TRIES:
                continue
            self._tried[name] = self._tried.get(name, 0) + 1
            without = [{key: value for key, value in item.items() if key != name} for item in messages]
            try:
                same = self.render(messages, tools) == self.render(without, () if name == "tools" else tools)
            except DataError:
                same = False  # it fails without the field, so it reads it
            if not same:
                self._written.add(name)

    def _watch_contents(self, messages: Sequence[dict], tools: Sequence[dict], texts: Any) -> None:
        """Note messages whose text the template leaves out; it is looked for first, and probed where it is not
        found."""
        for k, item in enumerate(messages):
            content = (item["content"] or "").strip()
            beside = " beside tool_calls" if item.get("tool_calls") else ""
            kind = f"the text of a message of role {item['role']!r}{beside}"
            if not content or kind in self._dropped:
                continue
            if kind in self._seen and any(content in text for text in texts):
                continue
            changed = [*messages[:k], {**item, "content": item["content"] + " #7q"}, *messages[k + 1:]]
            try:
                if self.render(changed, tools) == self.render(messages, tools):
                    self._dropped[kind] = None
                else:
                    self._seen.add(kind)
            except DataError:
                self._seen.add(kind)


class _Renderer:
    """``render`` of a ``ChatTemplate`` with the tools of an example, as ``turns`` needs it."""

    def __init__(self, template: ChatTemplate, example: Example) -> None:
        self._template, self._tools = template, getattr(example, "tools", ())
        self.marked, self.parted = template.marks_generation(self._tools), False

    def __call__(self, messages: Sequence[dict], generation: bool = False, spans: bool = False) -> Any:
        return self._template.render(messages, self._tools, generation, spans)


def _messages(example: Example) -> tuple[dict, ...]:
    """An example's question as messages.

    Raises:
        DataError: it is a document.
    """
    if example.messages is not None:
        return example.messages
    if example.prompt is None:
        raise DataError(f"example {example.id}: a plain text has no question, so there is nothing to answer")
    return ({"role": "user", "content": example.prompt},)


def _refuse_parts(example: Example, messages: Sequence[dict], what: str = "") -> None:
    """Refuse what a plain text has no place for."""
    parts = {key for item in messages for key in item} - {"role", "content", "weight"}
    if getattr(example, "tools", ()):
        parts.add("tools")
    if messages[0]["role"] not in ("user", "assistant"):
        parts.add(f"a {messages[0]['role']} message alone")
    what = what or ", ".join(sorted(parts))
    if what:
        raise DataError(f"example {example.id}: a plain prompt template cannot render {what}; use the model's chat "
                        "template (template: chat)")


def make_template(spec: str, tokenizer: Any, system: str | None = None) -> TextTemplate | ChatTemplate:
    """The template that a recipe asks for.

    Args:
        spec: ``"chat"``, or a text with ``{prompt}`` and ``{completion}``.
        tokenizer: needed for ``"chat"``.
        system: system message, only for ``"chat"``.

    Raises:
        ConfigError: the text is no template, or ``system`` is given together with a plain text.
    """
    if spec == "chat":
        return ChatTemplate(tokenizer, system)
    if system is not None:
        raise ConfigError("a system message needs the chat template (template: chat)")
    return TextTemplate(spec)
