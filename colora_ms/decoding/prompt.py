"""Between text and ids: what the batch decoder and the serving engine share."""


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: a string, token ids, or chat messages (``{"role": …, "content": …}``)."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) if prompt else []
    prompt = list(prompt)
    if prompt and isinstance(prompt[0], dict):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    return [int(i) for i in prompt]


def ending_ids(decoder, tokenizer):
    """Ids that end an answer: the model config's and the tokenizer's."""
    extra = tokenizer.eos_token_id
    return tuple(dict.fromkeys([*decoder.config.eos_token_ids, *([] if extra is None else [extra])]))


def printable(text, stop):
    """``text`` without a tail that may still become a stop string or another character."""
    text = text.rstrip("\ufffd")
    held = max((size for s in stop for size in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:size])), default=0)
    return text[:len(text) - held]
