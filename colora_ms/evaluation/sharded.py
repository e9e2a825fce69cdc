"""A generator and a scorer that split their work over the workers of a job (see ``colora_ms.distributed.workers``).

Every worker calls with the same arguments and gets the same, whole results, so that an evaluation runs on
all of them as it does on one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from colora_ms.decoding.options import PER_PROMPT
from colora_ms.errors import ColoraError, DataError, DecodingError

if TYPE_CHECKING:
    from colora_ms.distributed.workers import Workers
    from colora_ms.evaluation.interfaces import TextGenerator, TokenScorer


class ShardedGenerator:
    """``generate`` with the prompts split over the workers; the completions come back in order.

    Args:
        generator: has ``generate(prompts, **options)``, as ``Generator`` and its like.
        team: ``Workers``.
    """

    def __init__(self, generator: TextGenerator, team: Workers) -> None:
        self.generator, self.team = generator, team

    def generate(self, prompts: Sequence[Any], **options: Any) -> list:
        """Completions of all prompts, in order, on every worker.

        Args:
            prompts: list of prompts.
            options: of the generator's ``generate``, without ``on_text``.

        Raises:
            DecodingError: what the first worker that refused its prompts says, on every worker.
        """
        mine = self.team.split(prompts)
        options = {key: self.team.split(value) if key in PER_PROMPT and isinstance(value, (list, tuple)) else value
                   for key, value in options.items()}
        return _together(self.team, DecodingError, ColoraError, lambda: self.generator.generate(mine, **options) if mine else [])


class ShardedScorer:
    """``token_logprobs`` with the sequences split over the workers; the arrays come back in order.

    Args:
        scorer: see the head of ``likelihood``.
        team: ``Workers``.
    """

    def __init__(self, scorer: TokenScorer, team: Workers) -> None:
        self.scorer, self.team = scorer, team

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities of all sequences, in order, on every worker.

        Raises:
            DataError: what the first worker that refused a sequence says, on every worker. The number of the
                sequence counts those of that worker.
        """
        mine = self.team.split(sequences)
        return _together(self.team, DataError, DataError, lambda: self.scorer.token_logprobs(mine) if mine else [])


def _together(team: Workers, kind: type[ColoraError], expected: type[ColoraError], work: Callable[[], list]) -> list:
    """The joined results of ``work()`` on all workers; an ``expected`` error of one is raised by all, as a ``kind``."""
    results, refusal = [], None
    try:
        results = list(work())
    except expected as error:
        refusal = str(error)
    refusals = [text for text in team.gather(refusal) if text is not None]
    if refusals:
        # The others must not wait in the next call for a worker that has given up.
        raise kind(refusals[0])
    return team.join(results)
