"""What a request does to its logits, from token to token: the entries and the mask that the step takes of it."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Optional

import numpy as np

from colora_ms.decoding.grammar import Matcher
from colora_ms.decoding.options import Options
from colora_ms.kernels.options import ENDS, IN_PROMPT


class Adjusting:
    """Penalties, bias, ends that may not come yet, and a grammar along one answer.

    Args:
        prompt: (tokens,) int32, for the repetition penalty.
        options: :class:`colora_ms.decoding.options.Options`; ends: ids that end the answer.
        tokenizer: for a grammar; vocabulary: tokens of the model.

    Raises:
        DecodingError: there is a grammar that cannot be used.
    """

    def __init__(self, prompt: np.ndarray, options: Options, ends: Iterable[int], tokenizer: Any,
                 vocabulary: int) -> None:
        self.options = options
        self.matcher: Optional[Matcher] = None
        if options.grammar is not None:
            self.matcher = Matcher(options.grammar, tokenizer, vocabulary, ends)
        self._mask = None if self.matcher is None else self.matcher.mask()
        self._times: Dict[int, int] = {}
        self._made = 0
        known = sorted(one for one in ends if 0 <= one < vocabulary) if options.min_tokens else []
        seen = prompt if options.repetition_penalty != 1 else prompt[:0]
        bias = dict(options.logit_bias)
        self._tokens = np.unique(np.concatenate((seen, np.array([*known, *bias], np.int32)))).astype(np.int32)
        self._flags = np.isin(self._tokens, seen) * IN_PROMPT + np.isin(self._tokens, known) * ENDS
        self._known = frozenset(self._tokens.tolist())
        self._bias = np.array([bias.get(int(token), 0.0) for token in self._tokens], np.float32)

    @property
    def any(self) -> bool:
        """Whether the request adjusts its logits at all."""
        return self.matcher is not None or self.options.penalised or len(self._tokens) > 0

    @property
    def min_tokens(self) -> int:
        """Tokens that are still to come before one may end the answer."""
        return max(self.options.min_tokens - self._made, 0)

    def take(self, token: int) -> None:
        """Follow a token of the answer.

        Raises:
            DecodingError: the grammar does not have it.
        """
        self._made += 1
        if self.options.penalised:
            self._times[token] = self._times.get(token, 0) + 1
        if self.matcher is not None:
            self.matcher.take([token])
            self._mask = self.matcher.mask()

    def extras(self) -> Dict[str, Optional[np.ndarray]]:
        """"entries" (n, 3) int32, "bias" (n,) float32 and "mask" (words,) int32 or None, see
        :mod:`colora_ms.kernels.options`."""
        more = [token for token in self._times if token not in self._known]
        tokens = np.concatenate((self._tokens, np.array(more, np.int32)))
        times = np.array([self._times.get(token, 0) for token in tokens.tolist()], np.int32)
        pad = np.zeros(len(more))
        order = np.argsort(tokens)
        entries = np.stack((tokens, times, np.concatenate((self._flags, pad)).astype(np.int32)), 1)[order]
        return {"entries": np.ascontiguousarray(entries, np.int32),
                "bias": np.concatenate((self._bias, pad)).astype(np.float32)[order],
                "mask": self._mask}
