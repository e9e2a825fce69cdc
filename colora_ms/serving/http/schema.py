"""What the body of a request may hold, and the engine's settings that come of it."""

import secrets
from typing import Dict, List, Optional, Union

from pydantic import BaseModel, ConfigDict, model_validator

from colora_ms.decoding import Contrast, Sampling
from colora_ms.errors import near
from colora_ms.serving.http.failures import RequestError

#: OpenAI's fields that are not implemented, with the values that ask for nothing.
NEUTRAL = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0), "logit_bias": (None, {}), "logprobs": (None, False), "top_logprobs": (None,),
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []), "function_call": (None, "none"),
    "parallel_tool_calls": (None, True, False), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,), "reasoning_effort": (None, "none"),
}
#: OpenAI's fields that do not change an answer.
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

_HINTS = {
    "n": "this server gives one answer a request (n=1); send the request again, with another seed, for another answer",
    "best_of": "this server gives one answer a request (best_of=1)",
    "logprobs": "the server has logits, not log-probabilities; \"records\": true returns for each token the expert's "
                "favourite, the chosen token and both scores",
}


class ContrastBody(BaseModel):
    """A contrast; see :class:`colora_ms.decoding.Contrast`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    alpha: float = 0.1
    beta: float = 0.5
    adapt: str = "fixed"
    skip_copies: bool = False


class StreamOptions(BaseModel):
    """``include_usage``: send the token counts in a last event."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: Optional[bool] = False


class GenerationBody(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: Optional[int] = None
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    top_k: Optional[int] = None
    seed: Optional[int] = None
    stop: Optional[Union[str, List[str]]] = None
    stop_token_ids: Optional[List[int]] = None
    stream: Optional[bool] = False
    stream_options: Optional[StreamOptions] = None
    contrast: Optional[ContrastBody] = None
    records: Optional[bool] = False
    priority: Optional[int] = 0
    ignore_eos: Optional[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values):
        """Take out what asks for nothing, refuse what would be ignored."""
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NEUTRAL:
                if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in NEUTRAL[name]):
                    hint = _HINTS.get(name, "this server does not implement it; leave it out")
                    raise RequestError(f"{name}={value!r:.80}: {hint}", name, "unsupported_parameter")
            elif name not in HARMLESS:
                raise RequestError(f"unknown field {name!r:.80}.{near(name, [*cls.model_fields, *NEUTRAL])}", str(name)[:80],
                                   "unknown_parameter")
        return kept

    def wanted_tokens(self):
        """(number of tokens or None, name of the field that says it)."""
        return self.max_tokens, "max_tokens"

    def submission(self, settings):
        """Keyword arguments of ``Engine.submit`` without the prompt.

        Args:
            settings: :class:`colora_ms.serving.http.settings.Settings`.

        Raises:
            RequestError: too many tokens are wanted.
            DecodingError: a value is out of range.
        """
        tokens, field = self.wanted_tokens()
        if tokens is not None and tokens > settings.max_tokens:
            raise RequestError(f"{field}={tokens} is more than this server allows, {settings.max_tokens}", field)
        # Without a seed two equal requests are to differ, as everywhere with this API.
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 64)
        return {
            "adapter": None if self.model == settings.base_model else self.model,
            "contrast": None if self.contrast is None else Contrast(**self.contrast.model_dump()),
            "sampling": Sampling.asked(self.temperature or 0.0, self.top_k or 0, 1.0 if self.top_p is None else self.top_p,
                                       seed),
            "max_new_tokens": min(settings.default_tokens, settings.max_tokens) if tokens is None else tokens,
            "stop": self.stop or (), "stop_token_ids": self.stop_token_ids or (), "priority": self.priority or 0,
            "timeout": settings.timeout,
            "records": bool(self.records), "ignore_eos": bool(self.ignore_eos),
        }


class CompletionBody(GenerationBody):
    """POST /v1/completions; ``echo``: the prompt's text stands before the answer's."""

    prompt: Union[str, List[int], List[str], List[List[int]]]
    echo: Optional[bool] = False

    def prompts(self):
        """A list of strings and lists of ids."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: List[Dict]
    max_completion_tokens: Optional[int] = None

    def wanted_tokens(self):
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    def conversation(self):
        """The messages with text as their content.

        Raises:
            RequestError: a message holds something else than text.
        """
        if not self.messages:
            raise RequestError("messages is empty; send at least one {\"role\": \"user\", \"content\": ...}", "messages")
        return [_message(i, message) for i, message in enumerate(self.messages)]


def _message(index, message):
    where = f"messages[{index}]"
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, [], ""):
            raise RequestError(f"{where} has {name!r:.40}, which this server cannot use; it takes role and content", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role is {role!r:.40}, expected \"system\", \"user\" or \"assistant\"", where)
    if isinstance(content, list):
        other = [part for part in content if not isinstance(part, dict) or part.get("type") != "text"
                 or not isinstance(part.get("text"), str)]
        if other:
            raise RequestError(f"{where}.content holds {other[0]!r:.60}; this model reads text only", where)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content is {content!r:.40}, expected text", where)
    return {"role": role, "content": content}
