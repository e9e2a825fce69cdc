"""What the body of a request may hold, and the engine's options that come of it.

The fields of a request's options are those of the records in :mod:`colora_ms.decoding.options`, by their names and
types.
"""

from __future__ import annotations

import secrets
from typing import Any, Dict, List, Optional, Tuple, Type, Union

from pydantic import BaseModel, ConfigDict, create_model, model_validator

from colora_ms.decoding.fields import Record
from colora_ms.decoding.options import Contrast, Options, Sampling
from colora_ms.errors import near
from colora_ms.serving.http.failures import RequestError
from colora_ms.serving.http.settings import Settings

_STRICT = ConfigDict(extra="forbid", strict=True)

#: Options whose fields have another form here, or that the server decides.
_OTHERWISE = ("contrast", "sampling", "max_new_tokens", "seed", "timeout", "mix", "adapter_scale", "presence_penalty",
              "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "logprobs", "grammar")
_PLAIN = {name: one for name, one in Options.known().items() if name not in _OTHERWISE}

#: OpenAI's fields that are not implemented, with the values that ask for nothing.
NEUTRAL = {
    "n": (None, 1), "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0), "logit_bias": (None, {}), "logprobs": (None, False), "top_logprobs": (None,),
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "function_call": (None, "none"), "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
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


def _body(record: Type[Record]) -> Type[BaseModel]:
    """A model with the fields of a record of options, with their defaults."""
    fields: Dict[str, Any] = {name: (one.kind, one.default) for name, one in record.known().items()}
    return create_model(f"{record.__name__}Body", __config__=_STRICT, __doc__=record.__doc__, **fields)


ContrastBody = _body(Contrast)

#: Fields of the options that may be null, which asks for the default.
_FIELDS: Dict[str, Any] = {name: (Optional[one.kind], None) for name, one in {**Sampling.known(), **_PLAIN}.items()}
_OptionsBody: Any = create_model("_OptionsBody", __config__=_STRICT, **_FIELDS)


class StreamOptions(BaseModel):
    """``include_usage``: send the token counts in a last event."""

    model_config = _STRICT
    include_usage: Optional[bool] = False


class GenerationBody(_OptionsBody):
    """What both kinds of request share: OpenAI's fields, the options' among them."""

    model_config = _STRICT
    model: str
    max_tokens: Optional[int] = None
    stream: Optional[bool] = False
    stream_options: Optional[StreamOptions] = None
    contrast: Optional[ContrastBody] = None  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
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
                hint = near(name, [*cls.model_fields, *NEUTRAL])
                raise RequestError(f"unknown field {name!r:.80}.{hint}", str(name)[:80], "unknown_parameter")
        return kept

    def wanted_tokens(self) -> Tuple[Optional[int], str]:
        """(number of tokens or None, name of the field that says it)."""
        return self.max_tokens, "max_tokens"

    def submission(self, settings: Settings) -> Dict[str, Any]:
        """Keyword arguments of ``Engine.submit`` without the prompt.

        Args:
            settings: the server's.

        Raises:
            RequestError: too many tokens are wanted.
            DecodingError: a value is out of range.
        """
        tokens, field = self.wanted_tokens()
        if tokens is not None and tokens > settings.max_tokens:
            raise RequestError(f"{field}={tokens} is more than this server allows, {settings.max_tokens}", field)
        given = {name: getattr(self, name) for name in Sampling.known() if getattr(self, name) is not None}
        # Without a seed two equal requests are to differ, as everywhere with this API.
        given["seed"] = secrets.randbits(63) if self.seed is None else self.seed % (1 << 64)
        return {
            "adapter": None if self.model == settings.base_model else self.model,
            "contrast": None if self.contrast is None else Contrast(**self.contrast.model_dump()),
            "sampling": Sampling.asked(**given),
            "max_new_tokens": min(settings.default_tokens, settings.max_tokens) if tokens is None else tokens,
            "timeout": settings.timeout,
            **{name: getattr(self, name) or one.default for name, one in _PLAIN.items()},
        }


class CompletionBody(GenerationBody):
    """POST /v1/completions; ``echo``: the prompt's text stands before the answer's."""

    prompt: Union[str, List[int], List[str], List[List[int]]]
    echo: Optional[bool] = False

    def prompts(self) -> List[Any]:
        """A list of strings and lists of ids."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: List[Dict]
    max_completion_tokens: Optional[int] = None

    def wanted_tokens(self) -> Tuple[Optional[int], str]:
        """As the base class; ``max_completion_tokens`` counts first."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    def conversation(self) -> List[Dict[str, str]]:
        """The messages with text as their content.

        Raises:
            RequestError: a message holds something else than text.
        """
        if not self.messages:
            raise RequestError("messages is empty; send at least one {\"role\": \"user\", \"content\": ...}",
                               "messages")
        return [_message(i, message) for i, message in enumerate(self.messages)]


def _message(index: int, message: Dict[str, Any]) -> Dict[str, str]:
    where = f"messages[{index}]"
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, [], ""):
            raise RequestError(f"{where} has {name!r:.40}, which this server cannot use; it takes role and content",
                               where)
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
