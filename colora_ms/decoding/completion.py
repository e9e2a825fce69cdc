"""What a finished request returns."""

from __future__ import annotations

import dataclasses
from typing import Optional, Tuple


@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """What happened at one generated token.

    Attributes:
        token: the id that was chosen.
        favourite: the id with the expert's highest logit.
        valid: size of the expert's alpha-cut (the whole vocabulary without a contrast).
        expert: the expert's logit of the chosen token.
        amateur: the amateur's logit of it (0 without a contrast).
        score: its contrastive score (the expert's logit without a contrast).
        best: the expert's highest logit.
        text: the text that the token brought at its place; "" of a special token, U+FFFD of a part of a character.
        favourite_text: the text that the favourite would have brought there.
        voices: (role, log-probability of the chosen token) of each row of a mix, but of a contrast.
    """

    token: int
    favourite: int
    valid: int
    expert: float
    amateur: float
    score: float
    best: float
    text: str = ""
    favourite_text: str = ""
    voices: Tuple[Tuple[str, float], ...] = ()

    @property
    def changed(self) -> bool:
        """Whether another token than the expert's favourite was chosen."""
        return self.token != self.favourite


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one generated token: of the mixture of the request's rows, after penalties, bias and grammar
    and before temperature, over the tokens of the cut.

    Attributes:
        token: the id that was chosen; logprob: its log-probability.
        tops: (id, log-probability, text that it would have brought there) of the best tokens, as many as were asked
            for.
        text: the text that the chosen token brought at its place.
    """

    token: int
    logprob: float
    tops: Tuple[Tuple[int, float, str], ...] = ()
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated answer.

    Attributes:
        text: what appears behind the prompt, cut before a stop string, without special tokens.
        tokens: the ids that were generated, up to the one that ended the answer: an end-of-sequence or stop id, or the
            token that completed a stop string.
        prompt_tokens: how many tokens the prompt had.
        finish_reason: "stop" (end of sequence, stop string or stop id) or "length"; of the engine also "cancelled" or
            "timeout".
        adapter: the adapter's name, or None for the base model.
        records: a :class:`TokenRecord` a token where they were asked for, else ().
        logprobs: a :class:`TokenLogprob` a token where they were asked for, else ().
    """

    text: str
    tokens: Tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    adapter: Optional[str] = None
    records: Tuple[TokenRecord, ...] = ()
    logprobs: Tuple[TokenLogprob, ...] = ()

    @property
    def changed_share(self) -> float:
        """Share of the tokens where the contrast chose another token than the expert's favourite."""
        return sum(r.changed for r in self.records) / len(self.records) if self.records else 0.0


def changes(completion: Completion) -> str:
    """The tokens where another one than the expert's favourite was chosen, a line each."""
    changed = [(i, r) for i, r in enumerate(completion.records) if r.changed]
    lines = [f"  the contrast changed {len(changed)} of {len(completion.records)} tokens"]
    for i, r in changed:
        voices = "".join(f", {role} {chance:.2f}" for role, chance in r.voices)
        second = voices or f", base {r.amateur:.2f}"
        lines.append(
            f"  token {i:3d}: {r.favourite_text!r} -> {r.text!r}   "
            f"expert {r.best:.2f} -> {r.expert:.2f}{second}, score {r.score:.2f}, {r.valid} in the cut")
    return "\n".join(lines)
