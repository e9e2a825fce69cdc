"""How a question becomes the text in front of the answer; the same in training and evaluation.

``TextTemplate("Question: {prompt}\\nAnswer: {completion}")`` is plain text;
``ChatTemplate(tokenizer)`` uses the chat template that comes with the model.  Both have

    prompt(example) -> str        what the model reads
    answer(example) -> str        what it should write (without the end-of-text token)
    request(example)              the prompt in the form to hand to a Generator
    digest -> str                 changes when the prompt of any example would change
    adds_special_tokens -> bool   whether the tokenizer still has to add a beginning-of-text token
"""

import hashlib
import re

from colora_ms.errors import ConfigError, DataError, near

DEFAULT_TEXT = "{prompt}\nAnswer: {completion}"


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

    def __init__(self, text=DEFAULT_TEXT):
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

    def prompt(self, example):
        """The text in front of the answer."""
        if example.prompt is None and len(example.messages) != 1:
            raise DataError(f"example {example.id}: a plain prompt template cannot render a "
                            f"conversation of {len(example.messages)} messages; use the model's "
                            "chat template (template: chat)")
        return self._head.replace("{prompt}", example.question)

    def request(self, example):
        """The prompt as text: the generator adds a beginning-of-text token if the model has one."""
        return self.prompt(example)

    def answer(self, example):
        """The text of the answer, with the blanks that belong to it."""
        return self._blanks + example.completion


class ChatTemplate:
    """The model's own chat template, with the answer as the assistant's turn.

    Args:
        tokenizer: has ``apply_chat_template(messages, add_generation_prompt=True) -> str``.
        system: a system message put in front of examples that have none; ``None`` leaves the
            template's own default.
    """

    adds_special_tokens = False  # a chat template writes the beginning-of-text token itself

    def __init__(self, tokenizer, system=None):
        if system is not None and not isinstance(system, str):
            raise ConfigError(f"the system message is {system!r}, expected a text")
        self._tokenizer = tokenizer
        self._system = system
        probe = self._render([{"role": "user", "content": "?"}])
        self.digest = hashlib.sha256(b"chat\0" + probe.encode()).hexdigest()[:16]

    def prompt(self, example):
        """The rendered conversation up to where the assistant starts to speak."""
        messages = example.messages
        if messages is None:
            messages = ({"role": "user", "content": example.prompt},)
        return self._render([dict(item) for item in messages])

    def request(self, example):
        """The prompt as token ids, because the rendered text holds all special tokens already."""
        return list(self._tokenizer.encode(self.prompt(example), add_special_tokens=False))

    def answer(self, example):
        """The text of the answer."""
        return example.completion

    def _render(self, messages):
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}] + messages
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def make_template(spec, tokenizer, system=None):
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
