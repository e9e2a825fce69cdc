"""Problems that the package makes itself: nothing is downloaded, and no other package is needed."""

from __future__ import annotations

import random

from colora_ms.errors import DataError
from colora_ms.training.examples import Example

#: Most terms of a sum: 9^12 questions still are a number that ``random`` draws from exactly.
MOST_TERMS = 12


def running_totals(size: int, seed: int, terms: int = 4) -> list[Example]:
    """Sums of digits, answered by their running totals: ``7+4+6+1=`` and ``11,17,18``.

    The last total is the sum. A small model cannot add four digits at once, but it can add one digit to what it has
    just written, so that this is learned in minutes.

    Args:
        size: number of problems, all different; at most 9^terms.
        seed: which ones they are, and their order. Sets of other seeds share questions: name the test as
            ``data.held_out``.
        terms: digits from 1 to 9 in a sum, from 2 to 12.

    Returns:
        List of ``Example`` called ``sum-<seed>-<number>``; ``meta`` holds ``terms`` and the bare ``answer``.

    Raises:
        DataError: a value of another type or outside its range.
    """
    for name, value, least, most in (("terms", terms, 2, MOST_TERMS), ("seed", seed, 0, 2 ** 63 - 1)):
        _check(name, value, least, most)
    _check("size", size, 1, 9 ** terms)
    examples = []
    for number, place in enumerate(random.Random(seed).sample(range(9 ** terms), size)):
        digits = [1 + place // 9 ** power % 9 for power in range(terms)]
        totals = [str(sum(digits[:count])) for count in range(2, terms + 1)]
        examples.append(Example(prompt="+".join(map(str, digits)) + "=", completion=",".join(totals),
                                id=f"sum-{seed}-{number}", meta={"terms": terms, "answer": totals[-1]}))
    return examples


def _check(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise DataError(f"a running_totals source has the {name} {value!r:.40}, expected a whole number from {least} "
                        f"to {most}")
