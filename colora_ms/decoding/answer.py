"""What comes of generated tokens: text, tokens, records and the reason of the end, decided once for every caller.

An :class:`Answer` takes tokens one by one, so that nothing depends on how many a graph call made. It ends

* at an id that ends answers (end of sequence, ``stop_token_ids``, and the id of a special or added token that a stop
  string spells): the id is kept, its text is not shown;
* at a stop string: the text is cut before it, and tokens behind the one that completes it are dropped. Of several stop
  strings the one that begins first in the text counts, as ``str.find`` over the whole text would say: where a shorter
  one is complete inside a longer one that began before, what comes next decides;
* when its budget is used up, or its engine ends it (:meth:`Answer.end`): what was held back is shown then.

Text that may still become a stop string or another character is held back until that is known.
"""

from __future__ import annotations

from typing import Any, FrozenSet, Iterable, List, Optional, Sequence, Tuple

from colora_ms.decoding.completion import Completion, TokenLogprob, TokenRecord
from colora_ms.decoding.mix import MOST_VOICES
from colora_ms.decoding.options import Options
from colora_ms.models.detokenizer import stream_of


class Answer:
    """One answer in the making.

    Attributes:
        tokens, records, logprobs: what has been generated and kept; the latter stay empty where none are wanted.
        ends: ids that end it.
        finish_reason: "stop" or "length", or why it was ended; None while it goes on.

    Args:
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`, or anything with ``decode(ids)``.
        prompt: ids before the answer.
        options: :class:`colora_ms.decoding.options.Options`.
        eos: ids that end answers of this model.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], options: Options, eos: Iterable[int] = ()) -> None:
        self.options = options
        self.tokens: List[int] = []
        self.records: List[TokenRecord] = []
        self.logprobs: List[TokenLogprob] = []
        self.finish_reason: Optional[str] = None
        self.ends = options.ends(eos) | spelled_ids(tokenizer, options.stop)
        self._stream = stream_of(tokenizer, before=prompt, shown=options.show_special)
        self._shown: List[str] = []  # text that is certain
        self._held = ""  # text that may yet be cut
        self._length = 0  # characters of both
        self._reached: List[int] = []  # of each token: characters of the text up to it
        self._taken = (0, 0)  # parts of the text and tokens that news() gave already

    @property
    def text(self) -> str:
        """The text that is certain; of an ended answer all of it."""
        return "".join(self._shown)

    def take(self, token: int, favourite: int = -1, valid: int = 0, floats: Sequence[float] = (),
             tops: Sequence[int] = (), details: Sequence[float] = ()) -> None:
        """Take a token; nothing where the answer has ended.

        Args:
            token: its id; favourite, valid, floats: as in :class:`TokenRecord`, read where records are wanted.
            tops, details: as of ``kernels.token_details``, read where log-probabilities are wanted, or the rows' of a
                mix.
        """
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        if self.options.records:
            expert, amateur, score, best = floats
            self.records.append(TokenRecord(token, favourite, valid, expert, amateur, score, best,
                                            self._stream.peek(token), self._stream.peek(favourite),
                                            self._voices(details)))
        if self.options.logprobs is not None:
            listed = tuple((other, chance, self._stream.peek(other))
                           for other, chance in zip(tops[:self.options.logprobs], details[1:]) if other >= 0)
            self.logprobs.append(TokenLogprob(token, details[0], listed, self._stream.peek(token)))
        if token in self.ends:
            self._grow(self._stream.flush())
            self._finish("stop")
            return
        self._grow(self._stream.push(token))
        if len(self.tokens) >= self.options.max_new_tokens:
            self._grow(self._stream.flush())
            self._finish("length")
            return
        match, least = self._search()
        if match is not None and match[0] <= least:
            self._finish("stop")
        else:
            self._show(least)

    def end(self, reason: str) -> None:
        """End it as it is, with this finish_reason; nothing where it has ended."""
        if self.finish_reason is None:
            self._grow(self._stream.flush() if self.tokens else "")
            self._finish(reason)

    def _voices(self, details: Sequence[float]) -> Tuple[Tuple[str, float], ...]:
        mix = self.options.mix if self.options.rows_wanted else None
        return () if mix is None else tuple((voice.role, chance) for voice, chance
                                            in zip(mix.voices, details[-MOST_VOICES:]))

    def news(self) -> Tuple[str, Tuple[int, ...], Tuple[TokenRecord, ...], Tuple[TokenLogprob, ...]]:
        """(text, tokens, records, log-probabilities) that became certain since the last call."""
        parts, kept = self._taken
        match = self._search()[0] if self.finish_reason is None and self._held else None
        end = len(self.tokens) if match is None else self._token_at(match[1])  # those behind it may yet be cut
        self._taken = len(self._shown), end
        return ("".join(self._shown[parts:]), tuple(self.tokens[kept:end]), tuple(self.records[kept:end]),
                tuple(self.logprobs[kept:end]))

    def completion(self, prompt_tokens: int, adapter: Optional[str]) -> Completion:
        """The :class:`Completion` of an answer that ended."""
        return Completion(self.text, tuple(self.tokens), prompt_tokens, self.finish_reason or "", adapter,
                          tuple(self.records), tuple(self.logprobs))

    def _grow(self, text: str) -> None:
        self._held += text
        self._length += len(text)
        if len(self._reached) < len(self.tokens):
            self._reached.append(self._length)
        elif self._reached:
            self._reached[-1] = self._length

    def _show(self, count: int) -> None:
        """Make the first characters of the held text certain."""
        if count:
            self._shown.append(self._held[:count])
            self._held = self._held[count:]

    def _finish(self, reason: str) -> None:
        """End it; a stop string in the held text comes first."""
        match = self._search()[0]
        if match is not None:
            reason = "stop"
            count = self._token_at(match[1])
            del self.tokens[count:], self.records[count:], self.logprobs[count:]
            self._held = self._held[:match[0]]
        self._show(len(self._held))
        self.finish_reason = reason

    def _token_at(self, place: int) -> int:
        """How many tokens reach a place of the held text."""
        wanted = self._length - len(self._held) + place
        count = len(self._reached)
        while count > 1 and self._reached[count - 2] >= wanted:
            count -= 1
        return count

    def _search(self) -> Tuple[Optional[Tuple[int, int]], int]:
        """((begin, end) of the stop string that begins first, or None; where the first one may be beginning) in the
        held text. Of those that begin together the shortest counts."""
        held, match, least = self._held, None, len(self._held)
        for stop in self.options.stop:
            at = held.find(stop)
            if at >= 0 and (match is None or (at, at + len(stop)) < match):
                match = at, at + len(stop)
            for place in range(max(0, len(held) - len(stop) + 1), least):
                if held[place] == stop[0] and stop.startswith(held[place:]):
                    least = place
                    break
        return match, least


def spelled_ids(tokenizer: Any, stop: Sequence[str]) -> FrozenSet[int]:
    """The ids of special and added tokens that a stop string spells: text leaves special tokens out, so that the string
    alone would never be met."""
    backend = getattr(tokenizer, "backend", None)
    if not stop or backend is None:
        return frozenset()
    known = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    named = [token for token in tokenizer.special_tokens.values() if isinstance(token, str)]
    known.update((token, backend.token_to_id(token)) for token in named)
    return frozenset(known[one] for one in stop if one in known)
