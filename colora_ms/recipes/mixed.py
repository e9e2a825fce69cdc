"""Eight requests on a base model, an adapter, a second strength of it and contrasts: one by one, then as one batch."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colora_ms.decoding.completion import Completion

if TYPE_CHECKING:
    from colora_ms.decoding import Contrast, Generator


@dataclasses.dataclass(frozen=True)
class Asked:
    """One of the requests: who answers (``label``, for people), the prompt, the adapter's name or None, the contrast or
    None."""

    label: str
    prompt: str | list[int]
    adapter: str | None = None
    contrast: Contrast | None = None


@dataclasses.dataclass(frozen=True)
class MixedBatch:
    """What :func:`answer_mixed` measured; compiling is in none of the times.

    Attributes:
        asked: the requests.
        completions: their answers in one batch.
        different: positions of the requests whose tokens were others when they were asked alone.
        alone: median seconds of each request by itself.
        together: median seconds of the batch.
        speedup: median over the repeats of the seconds one after another over those of the batch.
    """

    asked: tuple[Asked, ...]
    completions: tuple[Completion, ...]
    different: tuple[int, ...]
    alone: tuple[float, ...]
    together: float
    speedup: float

    def tokens_per_second(self, adapter: str | None, contrast: bool) -> float:
        """Tokens a second of the requests on an adapter (None: the base), with or without a contrast, one by one."""
        places = [i for i, one in enumerate(self.asked)
                  if one.adapter == adapter and (one.contrast is not None) == contrast]
        return sum(len(self.completions[i].tokens) for i in places) / sum(self.alone[i] for i in places)


def eight(prompts: Sequence[str | list[int]], adapter: str, weaker: str,
          contrasts: Sequence[Contrast]) -> tuple[Asked, ...]:
    """Two prompts, each asked four times: the base, the adapter, its second strength, and a contrast of the adapter.

    Args:
        prompts: two, texts or ids.
        adapter: name of the adapter; weaker: name of its copy at another strength.
        contrasts: two, one for each prompt.
    """
    return tuple(asked for prompt, contrast in zip(prompts, contrasts) for asked in (
        Asked("base", prompt), Asked(adapter, prompt, adapter), Asked(weaker, prompt, weaker),
        Asked(f"{adapter}, contrast {contrast.alpha:g} {contrast.beta:g}", prompt, adapter, contrast)))


def ask(generator: Generator, asked: Sequence[Asked], max_new_tokens: int, stop: Sequence[str] = (),
        records: bool = False) -> list[Completion]:
    """The answers of requests as one batch."""
    return generator.generate([one.prompt for one in asked], adapter=[one.adapter for one in asked],
                              contrast=[one.contrast for one in asked], max_new_tokens=max_new_tokens, stop=list(stop),
                              records=records)


def answer_mixed(generator: Generator, asked: Sequence[Asked], max_new_tokens: int, stop: Sequence[str] = (),
                 repeats: int = 3) -> MixedBatch:
    """Answer requests one after another and as one batch, compare the tokens and the times.

    Args:
        generator: has the adapters.
        asked: the requests.
        max_new_tokens: of each answer.
        stop: texts that end an answer.
        repeats: of the measurement; each asks both ways, in turns. Before it, every request is answered once both ways,
            so that no graph is compiled while the time is taken.
    """
    # The batch first: its cache is the largest, and a larger cache brings new graphs.
    jointly = ask(generator, asked, max_new_tokens, stop)
    singly = [ask(generator, [one], max_new_tokens, stop)[0] for one in asked]
    alone: list[list[float]] = []
    together: list[float] = []
    for _ in range(repeats):
        alone.append([_seconds(generator, [one], max_new_tokens, stop) for one in asked])
        together.append(_seconds(generator, asked, max_new_tokens, stop))
    return MixedBatch(
        asked=tuple(asked), completions=tuple(jointly),
        different=tuple(i for i, (one, other) in enumerate(zip(singly, jointly)) if one.tokens != other.tokens),
        alone=tuple(statistics.median(times) for times in zip(*alone)), together=statistics.median(together),
        speedup=statistics.median(sum(times) / batch for times, batch in zip(alone, together)))


def _seconds(generator: Generator, asked: Sequence[Asked], max_new_tokens: int, stop: Sequence[str]) -> float:
    began = time.perf_counter()
    ask(generator, asked, max_new_tokens, stop)
    return time.perf_counter() - began


class Answered:
    """Answers that are there already, handed out in their order: a generator for ``evaluation.evaluate``."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self._left = iter(completions)

    def generate(self, prompts: Sequence, **options: object) -> list[Completion]:
        """The next answers, one for each prompt."""
        return [next(self._left) for _ in prompts]
