"""One request, as ``Generator.generate`` and ``Engine.submit`` make it, and the same request while it is answered.

A :class:`Request` is what was asked and does not change: prompt ids, rows, options. It has one row, or those of its mix
(:mod:`colora_ms.decoding.mix`; a contrast has two); each row has a role, an adapter or none, the adapter's strength, a
weight, and perhaps a prompt of its own. A :class:`Running` request is one that has begun: where its rows
stand, the tokens that they made, and the :class:`colora_ms.decoding.answer.Answer` that comes of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Callable, Iterable, List, Optional, Sequence, Tuple

import numpy as np

import mindspore as ms

from colora_ms.decoding.adjusting import Adjusting
from colora_ms.decoding.answer import Answer
from colora_ms.decoding.mix import OWN
from colora_ms.decoding.options import Options
from colora_ms.decoding.prompt import check_ids, encode_prompt
from colora_ms.decoding.values import shown
from colora_ms.errors import AdapterError, CheckpointError, ColoraError, DecodingError
from colora_ms.kernels import backend
from colora_ms.models.paged_cache import BLOCK

#: Roles of the rows of a contrast, and of a request without a mix: the one whose tokens are answered, and the one whose
#: preference a contrast takes off.
EXPERT, AMATEUR = "expert", "amateur"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a request.

    Attributes:
        role: what it is called in records.
        adapter: the adapter's name; None: the base model.
        scale: factor on the adapter's scale.
        weight: in the mix; a contrast has its own.
        ids: (tokens,) int32, its prompt; None: the request's.
    """

    role: str = EXPERT
    adapter: Optional[str] = None
    scale: float = 1.0
    weight: float = 1.0
    ids: Optional[np.ndarray] = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model and its cache can take.

    Attributes:
        vocabulary: ids of the model.
        length: tokens that a prompt and its answer may have together.
        blocks: of the cache, for all rows of a request together; None: there is room for every request.
        block: positions of each of them.
        place: what holds them, for messages; hint: how to get more.
    """

    vocabulary: int
    length: int
    place: str = "the context"
    hint: str = ""
    blocks: Optional[int] = None
    block: int = BLOCK

    def of(self, rows: int) -> int:
        """Tokens that a prompt and its answer may have together in a request of this many rows."""
        return self.length if self.blocks is None else min(self.length, self.blocks // rows * self.block)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What is asked.

    Attributes:
        ids: (tokens,) int32, the prompt.
        rows: :class:`Row`, the leading one first; all get the same new tokens.
        options: :class:`colora_ms.decoding.options.Options`, its budget cut to the room behind the longest prompt.
        vocabulary: tokens of the model.
    """

    ids: np.ndarray
    rows: Tuple[Row, ...]
    options: Options
    vocabulary: int = 0

    @classmethod
    def of(cls, tokenizer: Any, prompt: Any, adapter: Optional[str], options: Options, limits: Limits,
           name: str = "the prompt") -> Request:
        """The request for a prompt.

        Args:
            prompt: a string, token ids, or chat messages.
            adapter: the adapter's name; None: the base model.
            name: what messages call the prompt.

        Raises:
            DecodingError: the prompt, or that of a row, is empty, too long or holds unknown ids, a stop id is unknown,
                or a mix wants an adapter where none is asked for, or has one of its own beside it.
            TokenizerError: the chat template refuses the messages, or the text cannot be encoded.
        """
        if options.contrast is not None and adapter is None:
            raise DecodingError("a contrast compares an adapter with the base model, so it needs adapter=…")

        def encoded(one: Any, what: str) -> np.ndarray:
            found = encode_prompt(tokenizer, one)
            check_ids(found, limits.vocabulary, what)
            return np.array(found, np.int32)

        ids = encoded(prompt, name)
        rows = rows_of(options, adapter, lambda one, role: encoded(one, f"the prompt of the voice {role!r}"))
        length = limits.of(len(rows))
        longest = max(len(ids if row.ids is None else row.ids) for row in rows)
        if longest + 1 > length:
            raise DecodingError(f"{name} has {longest} tokens; {limits.place} holds {length}, and at least one "
                                f"is needed for the answer{limits.hint}")
        return cls(ids, rows, options.fitting(limits.vocabulary, length - longest), limits.vocabulary)

    @property
    def adapter(self) -> Optional[str]:
        """The leading row's adapter."""
        return self.rows[0].adapter

    @property
    def copies(self) -> bool:
        """Whether its steps look at the prompt's ids."""
        mix = self.options.mixture
        return mix is not None and mix.skip_copies

    def prompt(self, number: int) -> np.ndarray:
        """(tokens,) int32: the prompt of one of its rows."""
        ids = self.rows[number].ids
        return self.ids if ids is None else ids


def rows_of(options: Options, adapter: Optional[str], encoded: Callable[[Any, str], np.ndarray]) -> Tuple[Row, ...]:
    """The rows that options ask for.

    Args:
        adapter: the request's adapter.
        encoded: (prompt, role) -> ids of a voice's own prompt.

    Raises:
        DecodingError: a mix names all its adapters and there is another one beside it, or has a place for the request's
            but none is asked for where the strength of one matters.
    """
    mix = options.mixture
    if adapter is None and options.adapter_scale != 1.0:
        raise DecodingError(f"adapter_scale={options.adapter_scale:g} is a factor on the scale of the request's "
                            "adapter, so it needs adapter=…" + ("" if mix is None else "; a mix's voices have scale=…"))
    if mix is None:
        return (Row(EXPERT, adapter, options.adapter_scale),)
    if adapter is not None and not mix.needs_adapter:
        raise DecodingError(f"adapter={shown(adapter)} is given beside a mix that names all its adapters "
                            f"({mix.label}); leave one of them out")
    rows = []
    for voice in mix.voices:
        own = voice.adapter == OWN
        name = adapter if own else voice.adapter
        scale = 1.0 if name is None else voice.scale * (options.adapter_scale if own else 1.0)
        ids = None if voice.prompt is None else encoded(voice.prompt, voice.role)
        rows.append(Row(voice.role, name, scale, voice.weight, ids))
    return tuple(rows)


def row_key(content: str, row: Row) -> str:
    """Who computes a row's keys and values: its adapter's content ("" without one) and its strength."""
    return content if not content or row.scale == 1.0 else f"{content} x {row.scale!r}"


def refuse_strengths(rows: Iterable[Row]) -> None:
    """Refuse rows with a strength other than 1, where steps are not one operator of the CPU library.

    Raises:
        DecodingError: there is one; the message says which, where, and what works.
    """
    for row in rows:
        if row.scale != 1.0:
            raise DecodingError(
                f"adapter {row.adapter!r:.80} at {row.scale:g} times its scale (adapter_scale, or a voice's scale): on "
                f"{ms.get_context('device_target')} with the {backend()!r} kernels this model's steps have one scale "
                "an adapter, not one a row. What works is an adapter with the strength in it: "
                f"add_weighted_adapter([{row.adapter!r:.80}], [{row.scale:g}], 'another name', 'cat') of its handle, "
                "and save(); or the strength times lora_alpha in a copy of its adapter_config.json")


class Running:
    """A request that is being answered.

    Attributes:
        request: :class:`Request`; answer: its :class:`colora_ms.decoding.answer.Answer`.
        slots: the adapter slot of each row, -1 for the base model.
        keys: who computes each row's keys and values: rows of equal keys may share them. "" is the base model. See
            :func:`row_key`.
        salt: rows of other salts share nothing.
        tokens: what its rows have generated.
        adjusting: :class:`colora_ms.decoding.adjusting.Adjusting`, what it does to its logits.
        cached: prompt tokens of all its rows that were in the cache already.

    Args:
        tokenizer: for the answer's text; eos: ids that end answers of this model.
    """

    def __init__(self, request: Request, tokenizer: Any, eos: Iterable[int], slots: Sequence[int] = (),
                 keys: Sequence[str] = (), salt: str = "") -> None:
        self.request = request
        self.answer = Answer(tokenizer, request.ids.tolist(), request.options, eos)
        self.slots: Sequence[int] = slots
        self.keys: Sequence[str] = keys
        self.salt = salt
        self.tokens: List[int] = []
        self.cached = 0
        self.adjusting = Adjusting(request.ids, request.options, self.answer.ends, tokenizer, request.vocabulary)
        self._uniforms: Optional[np.ndarray] = None

    def prompt(self, number: int) -> np.ndarray:
        """(tokens,) int32: the prompt of one of its rows."""
        return self.request.prompt(number)

    @property
    def one_step(self) -> bool:
        """Whether Python has to see each token before the next one is made."""
        return self.request.options.grammar is not None

    @property
    def left(self) -> int:
        """Tokens that its rows may still make."""
        return self.request.options.max_new_tokens - len(self.tokens)

    def uniforms(self, count: int) -> np.ndarray:
        """(count,) float32: the random numbers of the next tokens; zeros for a greedy request and past its budget."""
        found = np.zeros(count, np.float32)
        options = self.request.options
        if not options.sampling.greedy:
            if self._uniforms is None:
                self._uniforms = options.sampling.uniforms(options.max_new_tokens)
            part = self._uniforms[len(self.tokens):][:count]
            found[:len(part)] = part
        return found

    def take(self, ints: np.ndarray, floats: np.ndarray, count: int, tops: np.ndarray, details: np.ndarray) -> None:
        """Take ``count`` steps: ints (steps, 3), floats (steps, 4), as ``kernels.contrastive_select`` gives them, tops
        (steps, 20), details (steps, 29) as ``kernels.token_details`` does.

        Raises:
            ColoraError: the logits of one were not finite, or a grammar cannot go on.
        """
        options = self.request.options
        asked = options.logprobs is not None or options.rows_wanted
        more = zip(tops[:count].tolist(), details[:count].tolist()) if asked else itertools.repeat(((), ()))
        steps = zip(ints[:count].tolist(), floats[:count].tolist(), more)
        for (token, favourite, valid), step, (best, chances) in steps:
            if self.answer.finish_reason is not None:
                break  # tokens behind a stop
            if valid == 0:
                raise not_finite(self.request)
            self.tokens.append(token)
            self.answer.take(token, favourite, valid, step, best, chances)
            if self.answer.finish_reason is None:
                self.adjusting.take(token)


def not_finite(request: Request) -> ColoraError:
    """The error of a request whose scores are infinite or not a number."""
    mix = request.options.mixture
    if mix is not None and mix.beta > 1e6:
        return DecodingError(f"beta={mix.beta:g} makes the scores of the contrast infinite; 0.5 is a usual value")
    if request.options.grammar is not None or request.options.min_tokens:
        return DecodingError("no token is left that grammar and min_tokens allow, or the logits are not finite")
    if mix is not None and mix.by != "contrast":
        return DecodingError(f"the scores of the mix ({mix.label}) are infinite or not a number: a weight is too "
                             "large, or a model's logits are not finite")
    if request.adapter is None:
        return CheckpointError("the base model's logits are not finite; its weights are damaged")
    return AdapterError(f"adapter {request.adapter!r} makes the model's logits infinite or not a number; its values "
                        "are too large: train it again with a smaller step")
