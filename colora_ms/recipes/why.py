"""Why a contrast chose another token than the adapter alone: the scores of both tokens, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colora_ms.decoding.completion import TokenRecord

if TYPE_CHECKING:
    from colora_ms.decoding import Contrast, Generator


@dataclasses.dataclass(frozen=True)
class Change:
    """One token that a contrast changed.

    Attributes:
        item: position of the answer.
        before: the text of the answer up to there.
        chosen: record of the token that the contrast chose.
        favourite: record of the token that the adapter alone would have chosen at the same place.
    """

    item: int
    before: str
    chosen: TokenRecord
    favourite: TokenRecord


def changed_tokens(generator: Generator, prompts: Sequence[str | list[int]], answers: Sequence[Sequence[TokenRecord]],
                   adapter: str, contrast: Contrast, count: int = 3, batch: int = 8,
                   contrasts: int = 2) -> list[Change]:
    """The first changed token of up to ``count`` answers, with the scores of the token that it replaced.

    A record holds the scores of the chosen token. Those of the adapter's favourite come from a second look: the same
    prompt and answer up to that place, with alpha 1, which leaves the favourite alone in the cut.

    Args:
        generator: the one that gave the answers.
        prompts: texts or ids.
        answers: the records of each prompt's answer.
        adapter: the adapter's name.
        contrast: the contrast of the answers, of the form "fixed".
        count: changes wanted.
        batch: requests of the second look, filled up with repetitions, so that a graph of this size is used again.
        contrasts: how many of them are contrastive.
    """
    found = []
    for item, records in enumerate(answers):
        place = next((place for place, record in enumerate(records) if record.changed), None)
        if place is not None and len(found) < count:
            found.append((item, place))
    if not found:
        return []
    begun = [[*generator.encode(prompts[item]), *(record.token for record in answers[item][:place])]
             for item, place in found]
    look, again = dataclasses.replace(contrast, alpha=1.0), []
    for start in range(0, len(begun), contrasts):
        part = begun[start:start + contrasts]
        filled = (part * contrasts)[:contrasts] + part[:1] * (batch - contrasts)
        found_again = generator.generate(filled, adapter=adapter, max_new_tokens=1, records=True,
                                         contrast=[look] * contrasts + [None] * (batch - contrasts))
        again += found_again[:len(part)]
    return [Change(item, "".join(record.text for record in answers[item][:place]), answers[item][place],
                   second.records[0])
            for (item, place), second in zip(found, again)]


def explain(change: Change, prompt: str, contrast: Contrast) -> str:
    """A paragraph for people: both tokens, what adapter and base gave them, and what came of it."""
    old, new, beta = change.favourite, change.chosen, contrast.beta
    lines = [f"  {prompt}{change.before}|   {old.text!r} became {new.text!r}",
             f"    {'logit of':12} {'adapter':>9} {'base':>9} {'score':>9}"]
    lines += [f"    {record.text!r:12} {record.expert:9.2f} {record.amateur:9.2f} {record.score:9.2f}"
              for record in (old, new)]
    ahead, liked = old.expert - new.expert, old.amateur - new.amateur
    return "\n".join([*lines, f"    the adapter puts {old.text!r} ahead by {ahead:.2f}, the base by {liked:.2f}; "
                              f"{1 + beta:g} x {ahead:.2f} < {beta:g} x {liked:.2f}, so {new.text!r} wins"])
