"""A request inside the engine: its checked settings, its answer so far, and the rows that it holds."""

import dataclasses

import numpy as np

from colora_ms.decoding.prompt import check_ids, encode_prompt
from colora_ms.errors import DecodingError, ServingError
from colora_ms.serving.bank import Lease
from colora_ms.serving.handle import Piece


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
    """One request, from the queue to its end. The engine's thread owns it.

    Attributes:
        tokens: what its rows of the cache have generated. After a failure of the graphs it begins anew, and these are
            fewer than the answer's until it has caught up with what was given already.
        doubtful: None, or, after a graph failed that it was in: tokens it has to reach alone to be cleared.
        doubts: how many graphs failed that it was in.
    """

    def __init__(self, ids, adapter, digest, settings, answer):
        self.ids = np.asarray(ids, np.int32)
        self.adapter = adapter
        self.digest = digest
        self.settings = settings
        self.answer = answer
        self.handle = None
        self.deadline = None
        self.cancelled = False
        self.passed_over = 0
        self.lease = None
        self.rows = [PromptRow(digest)] + ([PromptRow("", amateur=True)] if settings.contrast else [])
        self.tokens = []
        self.finish_reason = None
        self.doubtful = None
        self.doubts = 0
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
        if not self.settings.sampling.greedy:
            if self._uniforms is None:
                self._uniforms = self.settings.sampling.uniforms(self.settings.budget)
            part = self._uniforms[len(self.tokens):][:count]
            found[:len(part)] = part
        return found

    def take(self, ints, floats, count):
        """Append ``count`` steps: ints (steps, 3), floats (steps, 4). False if the logits of one were not finite.

        Raises:
            ServingError: begun anew, it made other tokens than before.
        """
        for token, favourite, valid, step in zip(*ints[:count].T.tolist(), floats[:count].tolist()):
            if self.answer.finish_reason is not None:
                break  # tokens behind a stop
            if valid == 0:
                return False
            place = len(self.tokens)
            self.tokens.append(token)
            if place >= len(self.answer.tokens):
                self.answer.take(token, favourite, valid, step)
            elif token != self.answer.tokens[place]:
                raise ServingError("after a failure of the engine the request made other tokens than before")
        return True

    def settle(self):
        """The :class:`Piece` of what is new; finds out whether the request ended."""
        self.finish_reason = self.answer.finish_reason
        return Piece(*self.answer.news())

    def restart(self):
        """Begin anew with the prompt; the answer stays, and what it holds is not given again."""
        self.tokens = []
        self.handle.usage.cached = 0
        for one in self.rows:
            one.filled = 0

    def completion(self):
        """The :class:`Completion` of a request that ended."""
        return self.answer.completion(len(self.ids), self.adapter, self.finish_reason)


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

