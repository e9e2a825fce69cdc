"""POST /tokenize and /detokenize, with vLLM's and llama-server's fields."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional

from pydantic import BaseModel, ConfigDict

from colora_ms.models.detokenizer import stream_of
from colora_ms.serving.engine import Engine
from colora_ms.serving.http.conversation import checked_tools, conversation
from colora_ms.serving.http.failures import RequestError
from colora_ms.serving.http.schema import ConversationBody


class TokenizeBody(ConversationBody):
    """A text (``prompt``, llama-server's ``content``) or a chat (``messages``)."""

    model: Optional[str] = None
    messages: Optional[List[Dict]] = None  # type: ignore[assignment]
    prompt: Optional[str] = None
    content: Optional[str] = None
    add_special_tokens: Optional[bool] = None
    add_special: Optional[bool] = None
    parse_special: Optional[bool] = True
    return_token_strs: Optional[bool] = False
    with_pieces: Optional[bool] = False


class DetokenizeBody(BaseModel):
    """Ids."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tokens: List[int]
    model: Optional[str] = None


def tokenize(engine: Engine, body: TokenizeBody) -> Dict[str, Any]:
    """The ids of a text, or of a chat as its template writes it.

    vLLM's begin token is on unless ``add_special_tokens`` is false (of a chat: off), llama-server's (``content``) off
    unless ``add_special`` is true.

    Raises:
        RequestError: not exactly one text or chat.
    """
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise RequestError("send one of prompt (a text), content (llama-server's name of it) and messages (a chat)",
                           "prompt")
    if body.parse_special is False:
        raise RequestError("parse_special=False: this server reads special tokens that a text spells, as prompts do",
                           "parse_special", "unsupported_parameter")
    tokenizer = engine.tokenizer
    text = body.prompt if body.content is None else body.content
    begins = given == ["prompt"] if body.add_special_tokens is None else body.add_special_tokens
    if body.content is not None and body.add_special is not None:
        begins = body.add_special
    if text is None:
        asked = conversation(body, tokenizer)
        if body.tools:
            asked = dataclasses.replace(asked, tools=checked_tools(tuple(body.tools)))
        text = asked.text(tokenizer)
    ids = [int(one) for one in tokenizer.encode(text, add_special_tokens=begins)]
    texts = _texts(tokenizer, ids) if body.return_token_strs or body.with_pieces else None
    if body.content is not None:
        return {"tokens": ids if texts is None or not body.with_pieces else
                [{"id": one, "piece": piece} for one, piece in zip(ids, texts)]}
    return {"count": len(ids), "max_model_len": engine.max_length, "tokens": ids,
            "token_strs": texts if body.return_token_strs else None}


def _texts(tokenizer: Any, ids: List[int]) -> List[str]:
    backend = getattr(tokenizer, "backend", None)
    return [tokenizer.decode([one]) if backend is None else backend.id_to_token(one) or "" for one in ids]


def detokenize(engine: Engine, body: DetokenizeBody) -> Dict[str, Any]:
    """The text of ids, special tokens included, under vLLM's and llama-server's names.

    Raises:
        RequestError: an id is outside the vocabulary.
    """
    size = engine.decoder.config.vocab_size
    wrong = [one for one in body.tokens if not 0 <= one < size]
    if wrong:
        raise RequestError(f"tokens holds {wrong[0]!r:.40}, which is no token id of the vocabulary, 0..{size - 1}",
                           "tokens")
    text = engine.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return {"prompt": text, "content": text}


def tokenizer_info(tokenizer: Any) -> Dict[str, Any]:
    """GET /tokenizer_info, as vLLM has it: the special tokens by their names, and the chat template."""
    named = dict(getattr(tokenizer, "special_tokens", {}))
    return {**{name: named.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}, **named,
            "chat_template": getattr(tokenizer, "chat_template", None)}


def shown(tokenizer: Any, prompt: Any) -> str:
    """A prompt's text: as it came, or what its ids give; a character that the answer completes is the answer's."""
    if isinstance(prompt, str):
        return prompt
    stream = stream_of(tokenizer)
    return "".join([stream.push(one) for one in prompt])
