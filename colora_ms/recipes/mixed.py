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
    """What :func:`answer_mixed` measured.

    Attributes:
        asked: the requests; completions: their answers in one batch.
        different: positions of the requests whose tokens were others when they were asked alone.
        alone: median seconds of all requests one after another.
        together: of one batch.
        speedup: median of the ratios of each repeat. Compiling is not in them.
    """

    asked: tuple[Asked, ...]
    completions: tuple[Completion, ...]
    different: tuple[int, ...]
    alone: float
    together: float
    speedup: float


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


def ask(generator: Generator, asked: Sequence[Asked], max_new_tokens: int, records: bool = False) -> list[Completion]:
    """The answers of requests as one batch."""
    return generator.generate([one.prompt for one in asked], adapter=[one.adapter for one in asked],
                              contrast=[one.contrast for one in asked], max_new_tokens=max_new_tokens, records=records)


def answer_mixed(generator: Generator, asked: Sequence[Asked], max_new_tokens: int, repeats: int = 3) -> MixedBatch:
    """Answer requests one after another and as one batch, compare the tokens and the times.

    Args:
        generator: has the adapters.
        asked: the requests.
        max_new_tokens: of each answer.
        repeats: of the measurement; each asks both ways, in turns. Before it, every request is answered once both ways,
            so that no graph is compiled while the time is taken.
    """
    singly = [ask(generator, [one], max_new_tokens)[0] for one in asked]
    jointly = ask(generator, asked, max_new_tokens)
    alone, together = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        for one in asked:
            ask(generator, [one], max_new_tokens)
        between = time.perf_counter()
        ask(generator, asked, max_new_tokens)
        alone.append(between - began)
        together.append(time.perf_counter() - between)
    return MixedBatch(
        asked=tuple(asked), completions=tuple(jointly),
        different=tuple(i for i, (one, other) in enumerate(zip(singly, jointly)) if one.tokens != other.tokens),
        alone=statistics.median(alone), together=statistics.median(together),
        speedup=statistics.median(a / b for a, b in zip(alone, together)))
