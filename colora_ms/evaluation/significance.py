"""Confidence interval of an accuracy and the paired test between two decoders."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from colora_ms.errors import ConfigError, DataError


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, 1927).

    With p = correct/total and z the normal quantile of (1 + confidence)/2:

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Returns:
        ``(low, high)``, both in [0, 1]; ``(0.0, 1.0)`` for ``total == 0``.

    Raises:
        ConfigError: not 0 <= correct <= total, or confidence outside (0, 1).
    """
    if not 0 <= correct <= total:
        raise ConfigError(f"{correct} correct of {total} is impossible")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, expected a number between 0 and 1")
    if total == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    p = correct / total
    middle = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the exact bound is 0 or 1; rounding must not put it beyond.
    low = 0.0 if correct == 0 else max(0.0, (middle - spread) / scale)
    high = 1.0 if correct == total else min(1.0, (middle + spread) / scale)
    return low, high


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """Two decoders on the same items.

    Attributes:
        both, first_only, second_only, neither: number of items that these got right.
        p_value: exact two-sided McNemar test of "both are equally good".
    """

    both: int
    first_only: int
    second_only: int
    neither: int
    p_value: float

    @property
    def difference(self) -> float:
        """Accuracy of the second minus accuracy of the first."""
        total = self.both + self.first_only + self.second_only + self.neither
        return (self.second_only - self.first_only) / total

    def summary(self) -> str:
        """One line: fixed, broken, p."""
        return (f"{self.second_only} fixed, {self.first_only} broken, "
                f"p = {self.p_value:.3g} (exact McNemar)")


def mcnemar(first: Any, second: Any) -> PairedTest:
    """Exact McNemar test (McNemar, 1947; binomial form).

    Among the n items that exactly one decoder got right, the number that the first got right is
    binomial(n, 1/2) if both are equally good:  p = min(1, 2 P(X <= min(b, c))).

    Args:
        first, second: ``{item id: was it right}``, or two lists of bool in the same order.

    Returns:
        PairedTest; p is 1 where the two never differ.

    Raises:
        DataError: there are no items, or the two do not cover the same ones (names some).
    """
    if not isinstance(first, dict) or not isinstance(second, dict):
        if isinstance(first, dict) or isinstance(second, dict):
            raise DataError("a paired test needs two dictionaries or two lists")
        if len(first) != len(second):
            raise DataError(f"a paired test needs the same items: {len(first)} and {len(second)} "
                            "outcomes are given")
        first, second = dict(enumerate(first)), dict(enumerate(second))
    if first.keys() != second.keys():
        missing = sorted(map(str, first.keys() ^ second.keys()))
        raise DataError(f"a paired test needs the same items; {len(missing)} stand in one result "
                        f"only, for example {', '.join(missing[:3])}")
    if not first:
        raise DataError("a paired test needs at least one item")
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for key, right in first.items():
        counts[bool(right), bool(second[key])] += 1
    b, c = counts[True, False], counts[False, True]
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    # Integers of any size divide exactly; the power is never turned into a float by itself.
    p_value = 1.0 if b == c else min(1.0, 2 * tail / 2 ** (b + c))
    return PairedTest(counts[True, True], b, c, counts[False, False], p_value)


@dataclasses.dataclass(frozen=True)
class BestOfMany:
    """The best of several decoders against one baseline on the same items.

    Attributes:
        best: index of the decoder with the highest gain (the first one of equals).
        gain: items that it fixes minus items that it breaks.
        p_value: probability of such a gain of the *best* one if none differs from the baseline.
    """

    best: int
    gain: int
    p_value: float


def best_of_many(baseline: Mapping[str, bool], others: Sequence[Mapping[str, bool]], rounds: int = 20000,
                 seed: int = 0) -> BestOfMany:
    """Paired test of a choice among several decoders: is the best one better, though it was picked?

    Picking the best of many and then testing it alone finds gains where there are none. Here the
    statistic is the maximum of all gains, and its distribution comes from flipping the sign of each
    item's differences, of all decoders together (Westfall and Young's single-step method, 1993), so
    that both the number of decoders and their likeness are accounted for. One-sided. With at most
    14 items that any decoder changes all sign patterns are counted, otherwise ``rounds`` random
    ones; for one decoder the exact count is the one-sided McNemar test.

    Args:
        baseline: ``{item id: was it right}``.
        others: list of such dictionaries for the same items.
        rounds, seed: number and seed of the random sign patterns.

    Returns:
        BestOfMany.

    Raises:
        DataError: nothing to compare, or the items differ.
    """
    if not baseline or not others:
        raise DataError("choosing among decoders needs items and at least one decoder")
    if any(other.keys() != baseline.keys() for other in others):
        raise DataError("choosing among decoders needs the same items for all of them")
    gains = np.array([[int(other[key]) - int(right) for other in others]
                      for key, right in baseline.items()])
    total = gains.sum(0)
    best = int(total.argmax())
    gains = gains[np.abs(gains).sum(1) > 0]
    if len(gains) == 0:
        return BestOfMany(best, 0, 1.0)
    if len(gains) <= 14:
        patterns = (np.arange(2 ** len(gains))[:, None] >> np.arange(len(gains))) & 1
        reached = (((2 * patterns - 1) @ gains).max(1) >= total[best]).mean()
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], size=(rounds, len(gains)))
        # The pattern that was observed is one of those that count.
        reached = (1 + ((signs @ gains).max(1) >= total[best]).sum()) / (1 + rounds)
    return BestOfMany(best, int(total[best]), float(reached))
