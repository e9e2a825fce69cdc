"""Between text and ids: what the batch decoder and the serving engine share."""

from colora_ms.errors import DecodingError
from colora_ms.models.turn_ends import turn_ends


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: a string, token ids, or chat messages (``{"role": …, "content": …}``)."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) if prompt else []
    prompt = list(prompt)
    if prompt and isinstance(prompt[0], dict):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    return [int(i) for i in prompt]


def check_ids(ids, vocabulary, name):
    """Refuse a prompt (called ``name`` in the message) without tokens, or with ids outside the vocabulary.

    Raises:
        DecodingError: says which.
    """
    if not ids:
        raise DecodingError(f"{name} is empty; give at least one token")
    bad = [i for i in ids if not 0 <= i < vocabulary]
    if bad:
        raise DecodingError(f"{name} holds token id {bad[0]}, outside the vocabulary 0..{vocabulary - 1}")


def find_stop(text, stop):
    """Where the first of the stop strings begins in a text, -1 without one."""
    return min((p for p in (text.find(s) for s in stop) if p >= 0), default=-1)


def ending_ids(decoder, tokenizer):
    """Ids that end an answer, see :func:`colora_ms.models.turn_ends.turn_ends`."""
    return tuple(end.id for end in turn_ends(decoder.config, tokenizer))


def printable(text, stop):
    """``text`` without a tail that may still become a stop string or another character."""
    text = text.rstrip("\ufffd")
    held = max((size for s in stop for size in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:size])), default=0)
    return text[:len(text) - held]
