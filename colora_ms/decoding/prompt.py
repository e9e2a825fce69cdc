"""Between text and ids: what the batch decoder and the serving engine share."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from colora_ms.decoding.values import is_whole, sequence, shown
from colora_ms.errors import DecodingError
from colora_ms.models.conversation import as_system, render_absent
from colora_ms.models.turn_ends import turn_ends


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Chat messages, and what the chat template is told beside them.

    Attributes:
        messages: ``{"role": …, "content": …}`` each, see ``models.chat_template.render``.
        tools: what the answer may call, as the template reads it; None: nothing.
        variables: further names for the template, such as ``enable_thinking``.
        opens: end with the opening of the assistant's turn.
        goes_on: end behind the text of the last message, which the answer continues; then ``opens`` must be False.
    """

    messages: Sequence[Mapping]
    tools: Optional[Sequence[Mapping]] = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    opens: bool = True
    goes_on: bool = False

    def text(self, tokenizer: Any) -> str:
        """The prompt as the template writes it.

        Raises:
            TokenizerError: there is no template, or it refuses the messages.
        """
        told: Dict[str, Any] = {} if self.tools is None else {"tools": [dict(one) for one in self.tools]}
        if self.goes_on:
            told["continue_final_message"] = True

        def render(messages: Sequence[Mapping], opens: bool = self.opens, **more: Any) -> str:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=opens, **self.variables, **more)

        messages = as_system(self.messages, lambda given: render(given, False))
        return render_absent(messages, lambda given: render(given, **told))

    def encode(self, tokenizer: Any) -> List[int]:
        """Its token ids; the template writes the begin token itself."""
        return tokenizer.encode(self.text(tokenizer), add_special_tokens=False)


def encode_prompt(tokenizer: Any, prompt: Any) -> List[int]:
    """Token ids of a prompt: a string, token ids, chat messages (``{"role": …, "content": …}``), or a
    :class:`Conversation`.

    An empty one is the begin token alone, where the tokenizer has one.

    Raises:
        DecodingError: it is none of these.
    """
    if isinstance(prompt, Conversation):
        return prompt.encode(tokenizer)
    if not isinstance(prompt, str):
        given, prompt = prompt, sequence(prompt)
        if prompt is None:
            raise DecodingError(f"the prompt is {shown(given)}; expected a string, token ids or chat messages")
        if prompt and isinstance(prompt[0], dict):
            return Conversation(prompt).encode(tokenizer)
        wrong = [one for one in prompt if not is_whole(one)]
        if wrong:
            raise DecodingError(f"the prompt holds {shown(wrong[0])}, which is no token id")
    if not len(prompt):
        begin = getattr(tokenizer, "bos_token_id", None)
        return [] if begin is None else [begin]
    return tokenizer.encode(prompt) if isinstance(prompt, str) else [int(one) for one in prompt]


def check_ids(ids: Sequence[int], vocabulary: int, name: str) -> None:
    """Refuse a prompt (called ``name`` in the message) without tokens, or with ids outside the vocabulary.

    Raises:
        DecodingError: says which.
    """
    if not ids:
        raise DecodingError(f"{name} is empty, and this model has no begin token; give at least one token")
    bad = [i for i in ids if not 0 <= i < vocabulary]
    if bad:
        raise DecodingError(f"{name} holds token id {shown(bad[0])}, outside the vocabulary 0..{vocabulary - 1}")


def ending_ids(decoder: Any, tokenizer: Any) -> Tuple[int, ...]:
    """Ids that end an answer, see :func:`colora_ms.models.turn_ends.turn_ends`."""
    return tuple(end.id for end in turn_ends(decoder.config, tokenizer))
