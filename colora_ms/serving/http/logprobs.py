"""Log-probabilities in the two forms of OpenAI's API, and the choice of the best answers by them."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional, Sequence, Tuple

from colora_ms.models.detokenizer import special_texts, stream_of
from colora_ms.serving.scoring import Scores


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of one prompt with one answer.

    Attributes:
        tokenizer: the model's; ids: prompt and answer; prompt: how many of them are the prompt's.
        scores: of all ids.
    """

    tokenizer: Any
    ids: Sequence[int]
    prompt: int
    scores: Scores

    @property
    def mean(self) -> float:
        """The answer's log-probability a token; of an answer without tokens 0."""
        found = self.scores.logprobs[self.prompt:]
        return float(found.mean()) if len(found) else 0.0

    def completion(self, top: int, echo: bool) -> Dict[str, List[Any]]:
        """The lists of /v1/completions: texts, log-probabilities, the ``top`` best tokens of each place with the one
        that stands there, and where each text begins. With ``echo`` the prompt's come first; nothing is known of its
        first token."""
        found: Dict[str, List[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = 0
        for place, text, best in self._places(0 if echo else self.prompt, top):
            known = place > 0
            own = float(self.scores.logprobs[place])
            found["tokens"].append(text)
            found["token_logprobs"].append(own if known else None)
            names: Dict[str, float] = {text: own}
            for _, other, value in best:
                names[other] = max(value, names.get(other, value))
            found["top_logprobs"].append(names if known and top else None)
            found["text_offset"].append(offset)
            offset += len(text)
        return found

    def chat(self, top: int) -> Dict[str, Any]:
        """The object of /v1/chat/completions."""
        content = []
        for place, text, best in self._places(self.prompt, top):
            content.append({**_entry(text, float(self.scores.logprobs[place])),
                            "top_logprobs": [_entry(other, value) for _, other, value in best]})
        return {"content": content, "refusal": None}

    def _places(self, begin: int, top: int) -> List[Tuple[int, str, List[Tuple[int, str, float]]]]:
        """(place, text that the token brings there, [(id, text that it would bring, log-probability)]) of each place;
        special tokens by their names."""
        backend = getattr(self.tokenizer, "backend", None)
        shown = special_texts(self.tokenizer) if backend is not None else ()
        stream = stream_of(self.tokenizer, before=self.ids[:begin], shown=shown)
        found = []
        for place in range(begin, len(self.ids)):
            best = []
            if place and top:
                best = [(int(one), stream.peek(int(one)), float(value)) for one, value in
                        zip(self.scores.top_ids[place, :top], self.scores.top_logprobs[place, :top])]
            text = stream.peek(self.ids[place])
            stream.push(self.ids[place])
            found.append((place, text, best))
        return found


def _entry(text: str, logprob: float) -> Dict[str, Any]:
    """A token of a chat; bytes are not told of a part of a character."""
    whole: Optional[List[int]] = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": logprob, "bytes": whole}


def best_of(scored: Sequence[Scored], copies: int, wanted: int) -> List[int]:
    """Places of the ``wanted`` best answers of each prompt, which has ``copies``, by their log-probability a token."""
    kept: List[int] = []
    for begin in range(0, len(scored), copies):
        order = sorted(range(begin, begin + copies), key=lambda place: -scored[place].mean)
        kept += order[:wanted]
    return kept
