"""Between text and ids: what the batch decoder and the serving engine share."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

from colora_ms.decoding.values import is_whole, sequence, shown
from colora_ms.errors import DecodingError
from colora_ms.models.turn_ends import turn_ends


def encode_prompt(tokenizer: Any, prompt: Any) -> List[int]:
    """Token ids of a prompt: a string, token ids, or chat messages (``{"role": …, "content": …}``).

    An empty one is the begin token alone, where the tokenizer has one.

    Raises:
        DecodingError: it is none of these.
    """
    if not isinstance(prompt, str):
        given, prompt = prompt, sequence(prompt)
        if prompt is None:
            raise DecodingError(f"the prompt is {shown(given)}; expected a string, token ids or chat messages")
        if prompt and isinstance(prompt[0], dict):
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
            return tokenizer.encode(text, add_special_tokens=False)
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
