"""One request, as ``Generator.generate`` and ``Engine.submit`` make it, and the same request while it is answered.

A :class:`Request` is what was asked and does not change: prompt ids, rows, options. It has one row, or two with a
contrast; each row has a role, and an adapter or none. A :class:`Running` request is one that has begun: where its rows
stand, the tokens that they made, and the :class:`colora_ms.decoding.answer.Answer` that comes of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from colora_ms.decoding.answer import Answer
from colora_ms.decoding.options import Options
from colora_ms.decoding.prompt import check_ids, encode_prompt
from colora_ms.errors import AdapterError, CheckpointError, ColoraError, DecodingError
from colora_ms.models.paged_cache import BLOCK

#: Roles of a row: the one whose tokens are answered, and the one whose preference a contrast takes off.
EXPERT, AMATEUR = "expert", "amateur"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a request.

    Attributes:
        role: :data:`EXPERT` or :data:`AMATEUR`.
        adapter: the adapter's name; None: the base model.
    """

    role: str = EXPERT
    adapter: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model and its cache can take.

    Attributes:
        vocabulary: ids of the model.
        length: tokens that a prompt and its answer may have together.
        blocks: of the cache, for all rows of a request together; None: there is room for every request.
        place: what holds them, for messages; hint: how to get more.
    """

    vocabulary: int
    length: int
    place: str = "the context"
    hint: str = ""
    blocks: Optional[int] = None

    def of(self, rows: int) -> int:
        """Tokens that a prompt and its answer may have together in a request of this many rows."""
        return self.length if self.blocks is None else min(self.length, self.blocks // rows * BLOCK)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What is asked.

    Attributes:
        ids: (tokens,) int32, the prompt.
        rows: :class:`Row`, the leading one first; all see the same tokens.
        options: :class:`colora_ms.decoding.options.Options`, its budget cut to the room behind the prompt.
    """

    ids: np.ndarray
    rows: Tuple[Row, ...]
    options: Options

    @classmethod
    def of(cls, tokenizer: Any, prompt: Any, adapter: Optional[str], options: Options, limits: Limits,
           name: str = "the prompt") -> Request:
        """The request for a prompt.

        Args:
            prompt: a string, token ids, or chat messages.
            adapter: the adapter's name; None: the base model.
            name: what messages call the prompt.

        Raises:
            DecodingError: the prompt is empty, too long or holds unknown ids, a stop id is unknown, or a contrast has
                no adapter.
            TokenizerError: the chat template refuses the messages, or the text cannot be encoded.
        """
        if options.contrast is not None and adapter is None:
            raise DecodingError("a contrast compares an adapter with the base model, so it needs adapter=…")
        ids = encode_prompt(tokenizer, prompt)
        check_ids(ids, limits.vocabulary, name)
        rows = (Row(EXPERT, adapter),) + ((Row(AMATEUR),) if options.contrast is not None else ())
        length = limits.of(len(rows))
        if len(ids) + 1 > length:
            raise DecodingError(f"{name} has {len(ids)} tokens; {limits.place} holds {length}, and at least one "
                                f"is needed for the answer{limits.hint}")
        return cls(np.array(ids, np.int32), rows, options.fitting(limits.vocabulary, length - len(ids)))

    @property
    def adapter(self) -> Optional[str]:
        """The leading row's adapter."""
        return self.rows[0].adapter

    @property
    def copies(self) -> bool:
        """Whether its steps look at the prompt's ids."""
        return self.options.contrast is not None and self.options.contrast.skip_copies


class Running:
    """A request that is being answered.

    Attributes:
        request: :class:`Request`; answer: its :class:`colora_ms.decoding.answer.Answer`.
        slots: the adapter slot of each row, -1 for the base model.
        keys: who computes each row's keys and values: rows of equal keys may share them. "" is the base model.
        salt: rows of other salts share nothing.
        tokens: what its rows have generated.
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
        self._uniforms: Optional[np.ndarray] = None

    def prompt(self, number: int) -> np.ndarray:
        """(tokens,) int32: the prompt of one of its rows."""
        return self.request.ids

    @property
    def one_step(self) -> bool:
        """Whether Python has to see each token before the next one is made."""
        return False

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

    def take(self, ints: np.ndarray, floats: np.ndarray, count: int) -> None:
        """Take ``count`` steps: ints (steps, 3), floats (steps, 4), as ``kernels.contrastive_select`` gives them.

        Raises:
            ColoraError: the logits of one were not finite.
        """
        for token, favourite, valid, step in zip(*ints[:count].T.tolist(), floats[:count].tolist()):
            if self.answer.finish_reason is not None:
                break  # tokens behind a stop
            if valid == 0:
                raise not_finite(self.request)
            self.tokens.append(token)
            self.answer.take(token, favourite, valid, step)


def not_finite(request: Request) -> ColoraError:
    """The error of a request whose scores are infinite or not a number."""
    contrast = request.options.contrast
    if contrast is not None and contrast.beta > 1e6:
        return DecodingError(f"beta={contrast.beta:g} makes the scores of the contrast infinite; 0.5 is a usual value")
    if request.adapter is None:
        return CheckpointError("the base model's logits are not finite; its weights are damaged")
    return AdapterError(f"adapter {request.adapter!r} makes the model's logits infinite or not a number; its values "
                        "are too large: train it again with a smaller step")
