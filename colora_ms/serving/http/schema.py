"""What the body of a request may hold, and the engine's options that come of it.

The fields of a request's options are those of the records in :mod:`colora_ms.decoding.options`, by their names and
types; :mod:`colora_ms.serving.http.fields` has those of other names.
"""

from __future__ import annotations

import secrets
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type, Union

from pydantic import BaseModel, ConfigDict, create_model, model_validator

from colora_ms.decoding.fields import Record
from colora_ms.decoding.mix import mix_of
from colora_ms.decoding.options import Contrast, Options, Sampling
from colora_ms.models.detokenizer import special_texts
from colora_ms.serving.http import fields, forms
from colora_ms.serving.http.failures import RequestError
from colora_ms.serving.http.registry import Registry
from colora_ms.serving.http.settings import Settings

_STRICT = ConfigDict(extra="forbid", strict=True)


def _body(record: Type[Record]) -> Type[BaseModel]:
    """A model with the fields of a record of options, with their defaults."""
    known: Dict[str, Any] = {name: (one.kind, one.default) for name, one in record.known().items()}
    return create_model(f"{record.__name__}Body", __config__=_STRICT, __doc__=record.__doc__, **known)


ContrastBody = _body(Contrast)

_FORMS: Dict[str, Any] = {name: (Optional[kind], None) for name, (kind, _) in forms.FORMS.items()}
_OptionsBody: Any = create_model("_OptionsBody", __config__=_STRICT, **fields.plain_fields(), **_FORMS)


class StreamOptions(BaseModel):
    """``include_usage``: send the token counts in a last event. The others change nothing here: events are neither
    padded nor do they each carry counts."""

    model_config = _STRICT
    include_usage: Optional[bool] = False
    include_obfuscation: Optional[bool] = False
    continuous_usage_stats: Optional[bool] = False


class GenerationBody(_OptionsBody):
    """What all kinds of request share: OpenAI's fields, the options' among them."""

    model_config = _STRICT
    model: str
    stream: Optional[bool] = False
    skip_special_tokens: Optional[bool] = True
    contrast: Optional[ContrastBody] = None  # type: ignore[valid-type]
    mix: Optional[Dict[str, Any]] = None
    lora: Optional[List[Dict[str, Any]]] = None

    #: Fields that are not implemented, see :data:`colora_ms.serving.http.fields.NEUTRAL`.
    neutral: ClassVar[Dict[str, Tuple[Any, ...]]] = fields.NEUTRAL
    #: Fields that say how long the answer may be; the first that is given counts.
    lengths: ClassVar[Tuple[str, ...]] = ("max_tokens",)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        """Take out what asks for nothing, refuse what would be ignored."""
        if not isinstance(values, dict):
            return values
        return fields.kept_fields(values, list(cls.model_fields), cls.neutral)

    def most_tokens(self, settings: Settings) -> int:
        """Tokens that the answer may have; -1 asks for as many as there may be.

        Raises:
            RequestError: the number cannot be used.
        """
        for name in self.lengths:
            wanted = getattr(self, name)
            if wanted == -1:
                return settings.max_tokens
            if wanted is not None:
                wanted = fields.checked(name, Options, "max_new_tokens", wanted)
                if wanted > settings.max_tokens:
                    raise RequestError(f"{name}={wanted} is more than this server allows, {settings.max_tokens}", name)
                return wanted
        return min(settings.default_tokens, settings.max_tokens)

    def submission(self, settings: Settings, tokenizer: Any, registry: Registry) -> Dict[str, Any]:
        """Keyword arguments of ``Engine.submit`` without the prompt.

        Args:
            settings: the server's; tokenizer: the model's; registry: its adapters and mixes.

        Raises:
            RequestError: too many tokens are wanted, or two fields contradict each other.
            DecodingError: a value is out of range.
        """
        given = {name: getattr(self, name) for name in fields.plain_fields()}
        options = fields.options_of(given, Options, fields.OTHERWISE)
        shows = special_texts(tokenizer) if self.skip_special_tokens is False and hasattr(tokenizer, "backend") else ()
        most = self.most_tokens(settings)
        if options.get("min_tokens", 0) > most:
            raise RequestError(f"min_tokens={options['min_tokens']} is more than the answer may have, {most}",
                               "min_tokens")
        return {
            **options,
            **self._voices(settings, registry, options.get("adapter_scale")),
            "contrast": None if self.contrast is None else Contrast(**self.contrast.model_dump()),
            "sampling": Sampling.asked(**fields.options_of(given, Sampling, ("seed",))),
            "max_new_tokens": most,
            "timeout": settings.timeout,
            "show_special": tuple(sorted(shows)),
            "grammar": forms.grammar_asked({name: getattr(self, name) for name in forms.FORMS}),
        }

    def _voices(self, settings: Settings, registry: Registry, scale: Optional[float]) -> Dict[str, Any]:
        """The mix, the adapter and the factor on its scale that ``model``, ``mix`` and ``lora`` name."""
        named = None if self.model == settings.base_model else self.model
        mix = None if named is None else registry.mixes.get(named)
        if mix is not None:
            both = next((name for name in ("mix", "contrast", "lora") if getattr(self, name) is not None), None)
            if both is not None:
                raise RequestError(f"model={named!r:.60} is a mix, and {both} asks for another one; send one of them",
                                   both)
            return {"adapter": None, "mix": mix}
        found: Dict[str, Any] = {"adapter": named, "mix": None if self.mix is None else mix_of(self.mix)}
        asked = forms.one_adapter(self.lora, registry.names()) if self.lora else None
        if asked is None:
            return found
        adapter, factor = asked
        if named is not None and adapter != named:
            raise RequestError(f"model={named!r:.60} and lora={self.lora!r:.80} ask for different adapters; send one "
                               "of them", "lora")
        if scale is not None and scale != factor:
            raise RequestError(f"adapter_scale={scale} and lora={self.lora!r:.80} say the same thing differently",
                               "lora")
        return {**found, "adapter": adapter, "adapter_scale": factor}

    def first_seed(self) -> int:
        """The seed of a request's first answer; the others have the numbers behind it. Without one two equal requests
        are to differ, as everywhere with this API."""
        return secrets.randbits(63) if self.seed is None else self.seed


class AnswersBody(GenerationBody):
    """What both kinds of request share that may ask for several answers: ``n`` of the ``best_of`` that are computed."""

    max_tokens: Optional[int] = None
    stream_options: Optional[StreamOptions] = None
    n: Optional[int] = None

    def copies(self) -> Tuple[int, int]:
        """(answers to be given, answers to be computed) of each prompt.

        Raises:
            RequestError: they cannot be.
        """
        wanted = 1 if self.n is None else self.n
        best = getattr(self, "best_of", None)
        computed = wanted if best is None else best
        if wanted < 1:
            raise RequestError(f"n={wanted} is not a number of answers, at least 1", "n")
        if computed < wanted:
            raise RequestError(f"best_of={computed} is less than n={wanted}", "best_of")
        if computed > wanted and self.stream:
            raise RequestError(f"best_of={computed}: which answers are the best is known at the end, so they cannot be "
                               "streamed", "best_of", "unsupported_parameter")
        return wanted, computed

    def top(self) -> Optional[int]:
        """Tokens that are listed beside each token with their log-probabilities; None: none are asked for, not even the
        token's own.

        Raises:
            RequestError: the number cannot be used.
        """
        raise NotImplementedError

    def counts(self) -> bool:
        """Whether a stream ends with token counts.

        Raises:
            RequestError: there is no stream.
        """
        if self.stream_options is None:
            return False
        if not self.stream:
            raise RequestError("stream_options is only for \"stream\": true", "stream_options")
        return bool(self.stream_options.include_usage)


class CompletionBody(AnswersBody):
    """POST /v1/completions; ``echo``: the prompt's text stands before the answer's."""

    prompt: Union[str, List[int], List[str], List[List[int]]]
    echo: Optional[bool] = False
    best_of: Optional[int] = None
    logprobs: Optional[Union[bool, int]] = None

    def top(self) -> Optional[int]:
        """As the base class."""
        if self.logprobs is True:
            raise RequestError("logprobs=True: here it is a number, of the tokens that are listed beside each token",
                               "logprobs")
        return None if self.logprobs is None or self.logprobs is False else \
            fields.checked("logprobs", Options, "logprobs", self.logprobs)

    def submission(self, settings: Settings, tokenizer: Any, registry: Registry) -> Dict[str, Any]:
        """As the base class; a prompt's own log-probabilities are those of one row, without what changes an answer."""
        options = super().submission(settings, tokenizer, registry)
        if self.echo and self.top() is not None:
            for name, wanted in (("contrast", self.contrast), ("mix", options.get("mix") is not None),
                                 ("adapter_scale", options.get("adapter_scale", 1.0) != 1.0)):
                if wanted:
                    raise RequestError("echo with logprobs: a prompt's log-probabilities cannot be given together "
                                       f"with {name}", "echo", "unsupported_parameter")
        return options

    def prompts(self, settings: Settings) -> List[Any]:
        """A list of strings and lists of ids.

        Raises:
            RequestError: there are too many.
        """
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]
        if len(self.prompt) > settings.most_prompts:
            raise RequestError(f"{len(self.prompt)} prompts in one request; this server takes {settings.most_prompts}",
                               "prompt")
        return list(self.prompt)


class ConversationBody(BaseModel):
    """The part of a chat's body that makes the prompt."""

    model_config = _STRICT
    messages: List[Dict]
    tools: Optional[List[Dict]] = None
    chat_template_kwargs: Optional[Dict[str, Any]] = None
    add_generation_prompt: Optional[bool] = None
    continue_final_message: Optional[bool] = False


class ChatBody(AnswersBody, ConversationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: Optional[int] = None
    tool_choice: Optional[Union[str, Dict[str, Any]]] = None
    parallel_tool_calls: Optional[bool] = None
    reasoning_effort: Optional[str] = None
    logprobs: Optional[bool] = None
    top_logprobs: Optional[int] = None

    lengths: ClassVar[Tuple[str, ...]] = ("max_completion_tokens", "max_tokens")

    def top(self) -> Optional[int]:
        """As the base class."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs={self.top_logprobs} is only for \"logprobs\": true", "top_logprobs")
        return fields.checked("top_logprobs", Options, "logprobs", self.top_logprobs or 0) if self.logprobs else None
