"""A request inside the engine: its checked settings, what has been generated, and the rows that it holds."""

import dataclasses
import math
import numbers

import numpy as np

from colora_ms.decoding.completion import Completion, TokenRecord
from colora_ms.decoding.contrast import Contrast, Sampling
from colora_ms.decoding.prompt import check_ids, encode_prompt, find_stop, printable
from colora_ms.errors import DecodingError
from colora_ms.serving.bank import Lease
from colora_ms.serving.handle import Piece

#: Stop strings of a request, and characters of each, at most.
MOST_STOPS, LONGEST_STOP = 16, 256


@dataclasses.dataclass
class PromptRow:
    """One row of a request: the expert's, or the amateur's.

    Attributes:
        key: whose keys and values it computes (the adapter content's digest, "" for the base model).
        amateur: whether it carries the base model's side of a contrast.
        row: its :class:`colora_ms.serving.prefix_cache.Row`, None before its prompt was begun.
        filled: prompt tokens whose keys and values are in the cache.
    """

    key: str
    amateur: bool = False
    row: object = None
    filled: int = 0


class Request:
    """One request, from the queue to its end. The engine's thread owns it."""

    def __init__(self, ids, adapter, digest, settings):
        self.ids = np.asarray(ids, np.int32)
        self.adapter = adapter
        self.digest = digest
        self.settings = settings
        self.handle = None
        self.deadline = None
        self.cancelled = False
        self.passed_over = 0
        self.lease = None
        self.rows = [PromptRow(digest)] + ([PromptRow("", amateur=True)] if settings.contrast else [])
        self.tokens = []
        self.records = []
        self.shown = ""
        self.finish_reason = None
        self._uniforms = None

    @property
    def slot(self):
        """Slot of the expert's row; -1 for the base model."""
        return (self.lease or Lease()).slot

    @property
    def to_fill(self):
        """Prompt tokens that must be in the cache before the loop; the last one goes through the loop itself."""
        return len(self.ids) - 1

    @property
    def prompt_done(self):
        """Whether all rows have their prompt in the cache."""
        return all(one.row is not None and one.filled == self.to_fill for one in self.rows)

    @property
    def last(self):
        """(last token, its position): what the next step reads."""
        return int(self.tokens[-1] if self.tokens else self.ids[-1]), len(self.ids) + len(self.tokens) - 1

    @property
    def left(self):
        """Tokens that it may still take."""
        return self.settings.budget - len(self.tokens)

    def uniforms(self, count):
        """(count,) float32: the random numbers of the next tokens; zeros for a greedy request and past its budget."""
        found = np.zeros(count, np.float32)
        if self.settings.sampling.temperature > 0:
            if self._uniforms is None:
                self._uniforms = self.settings.sampling.uniforms(self.settings.budget)
            part = self._uniforms[len(self.tokens):][:count]
            found[:len(part)] = part
        return found

    def take(self, ints, floats, count):
        """Append ``count`` steps: ints (steps, 3), floats (steps, 4). False if the logits of one were not finite."""
        for step in range(int(count)):
            token, favourite, valid = (int(v) for v in ints[step])
            if valid == 0:
                return False
            self.tokens.append(token)
            if self.settings.records:
                self.records.append(TokenRecord(token, favourite, valid, *(float(v) for v in floats[step])))
        return True

    def settle(self, tokenizer, eos, before):
        """Decode, cut at a stop string, find out whether it ended; returns the :class:`Piece` of the tokens since
        ``before`` (how many there were)."""
        eos = () if self.settings.ignore_eos else eos
        ended = bool(self.tokens) and self.tokens[-1] in eos
        text = tokenizer.decode(self.tokens[:-1] if ended else self.tokens)
        cut = find_stop(text, self.settings.stop)
        if cut >= 0:
            # Tokens behind the stop string depend on where the chunk ended, so they go.
            count = len(self.tokens)
            while count > before + 1 and find_stop(tokenizer.decode(self.tokens[:count - 1]), self.settings.stop) >= 0:
                count -= 1
            del self.tokens[count:], self.records[count:]
            text, ended = text[:cut], True
        if ended:
            self.finish_reason = "stop"
        elif self.left <= 0:
            self.finish_reason = "length"
        shown = text if self.finish_reason else printable(text, self.settings.stop)
        new = ""
        if len(shown) > len(self.shown):
            new, self.shown = shown[len(self.shown):], shown
        return Piece(new, tuple(self.tokens[before:]), tuple(self.records[before:]))

    def completion(self):
        """The :class:`Completion` of a request that ended."""
        return Completion(self.shown, tuple(self.tokens), len(self.ids), self.finish_reason, self.adapter,
                          tuple(self.records))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Checked settings of a request; ``budget`` is max_new_tokens, cut to what the cache holds."""

    contrast: Contrast
    sampling: Sampling
    budget: int
    stop: tuple
    priority: int
    timeout: float
    records: bool
    ignore_eos: bool

    @property
    def rows(self):
        """Rows of the batch that the request takes."""
        return 1 if self.contrast is None else 2

    def within(self, room):
        """The settings with a budget of at most ``room`` tokens."""
        return dataclasses.replace(self, budget=min(self.budget, room))


def check_settings(adapter, contrast, sampling, max_new_tokens, stop, seed, priority, timeout, records, ignore_eos):
    """Check the arguments of ``Engine.submit``.

    Raises:
        DecodingError: a value cannot be used.
    """
    if contrast is not None and not isinstance(contrast, Contrast):
        raise DecodingError(f"contrast={contrast!r} is not a Contrast(alpha, beta)")
    if contrast is not None and adapter is None:
        raise DecodingError("a contrast compares an adapter with the base model, so it needs adapter=…")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise DecodingError(f"sampling={sampling!r} is not a Sampling(temperature, top_k, top_p, seed)")
    sampling = sampling or Sampling()
    if seed is not None:
        sampling = dataclasses.replace(sampling, seed=seed)
    if not _is_whole(max_new_tokens) or max_new_tokens < 1:
        raise DecodingError(f"max_new_tokens={max_new_tokens!r} is not a whole number >= 1")
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stop) > MOST_STOPS or any(not isinstance(s, str) or not 0 < len(s) <= LONGEST_STOP for s in stop):
        raise DecodingError(f"stop={stop!r:.200}: at most {MOST_STOPS} stop strings of 1 to {LONGEST_STOP} characters")
    if not _is_whole(priority):
        raise DecodingError(f"priority={priority!r} is not a whole number; larger ones go first, 0 is usual")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, numbers.Real)
                                or not math.isfinite(timeout) or timeout <= 0):
        raise DecodingError(f"timeout={timeout!r} is not a number of seconds > 0")
    return Settings(contrast, sampling, int(max_new_tokens), stop, int(priority), timeout, bool(records), bool(ignore_eos))


def check_prompt(tokenizer, prompt, vocabulary, max_length):
    """Token ids of a prompt that fits the cache.

    Raises:
        DecodingError: it is empty, too long, or holds ids outside the vocabulary.
        TokenizerError: the chat template refuses the messages, or the text cannot be encoded.
    """
    ids = encode_prompt(tokenizer, prompt)
    check_ids(ids, vocabulary, "the prompt")
    if len(ids) + 1 > max_length:
        raise DecodingError(f"the prompt has {len(ids)} tokens; the engine's cache holds {max_length}, and at least one is "
                            "needed for the answer: shorten it, or make the engine with a larger max_length")
    return ids


def _is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
