"""Log-probabilities in the two forms of OpenAI's API, and the choice of the best answers by them."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional, Sequence, Tuple

from colora_ms.decoding.completion import Completion, TokenLogprob
from colora_ms.models.detokenizer import special_texts, stream_of
from colora_ms.serving.scoring import Scores


@dataclasses.dataclass(frozen=True)
class Place:
    """One token: its text, its log-probability (None: nothing is known of a prompt's first), and the best tokens there
    with theirs."""

    text: str
    logprob: Optional[float]
    best: Tuple[Tuple[str, float], ...] = ()


class Places:
    """Names tokens for one tokenizer: by the text that they bring where they stand, special ones by their names."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend", None)
        self._special = special_texts(tokenizer) if self._backend is not None else frozenset()

    def answer(self, made: Sequence[TokenLogprob]) -> List[Place]:
        """The places of an answer's tokens."""
        return [Place(self._name(one.token, one.text), one.logprob,
                      tuple((self._name(token, text), value) for token, value, text in one.tops)) for one in made]

    def prompt(self, ids: Sequence[int], scores: Scores, top: int) -> List[Place]:
        """The places of a prompt's tokens."""
        stream = stream_of(self._tokenizer)
        found = []
        for place, token in enumerate(ids):
            best = [] if place == 0 else \
                list(zip(scores.top_ids[place, :top].tolist(), scores.top_logprobs[place, :top].tolist()))
            found.append(Place(self._name(token, stream.peek(token)),
                               None if place == 0 else float(scores.logprobs[place]),
                               tuple((self._name(other, stream.peek(other)), value) for other, value in best)))
            stream.push(token)
        return found

    def _name(self, token: int, text: str) -> str:
        if text or self._backend is None:
            return text
        name = self._backend.id_to_token(token)
        return name if name in self._special else ""


def completion_lists(places: Sequence[Place], top: int, offset: int = 0) -> Dict[str, List[Any]]:
    """The lists of /v1/completions: texts, log-probabilities, the best tokens of each place with the one that stands
    there, and where each text begins, counted from ``offset``."""
    found: Dict[str, List[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in places:
        found["tokens"].append(one.text)
        found["token_logprobs"].append(one.logprob)
        names: Dict[str, float] = {}
        for text, value in ((one.text, one.logprob), *one.best):
            if value is not None:
                names[text] = max(value, names.get(text, value))
        found["top_logprobs"].append(names if top and one.logprob is not None else None)
        found["text_offset"].append(offset)
        offset += len(one.text)
    return found


def chat_content(places: Sequence[Place]) -> Dict[str, Any]:
    """The object of /v1/chat/completions."""
    return {"content": [{**_entry(one.text, one.logprob), "top_logprobs": [_entry(*other) for other in one.best]}
                        for one in places], "refusal": None}


def _entry(text: str, logprob: Optional[float]) -> Dict[str, Any]:
    """A token of a chat; bytes are not told of a part of a character."""
    whole: Optional[List[int]] = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": logprob, "bytes": whole}


def best_places(completions: Sequence[Completion], copies: int, wanted: int) -> List[int]:
    """Places of the ``wanted`` best answers of each prompt, which has ``copies``, by their log-probability a token."""
    def mean(place: int) -> float:
        made = completions[place].logprobs
        return sum(one.logprob for one in made) / len(made) if made else 0.0

    kept: List[int] = []
    for begin in range(0, len(completions), copies):
        kept += sorted(range(begin, begin + copies), key=mean, reverse=True)[:wanted]
    return kept
