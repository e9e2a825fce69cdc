"""What an evaluation asks of what it measures: anything with these methods will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Union

import numpy as np

#: A prompt as text, or as the token ids of a rendered chat.
Prompt = Union[str, Sequence[int]]


class Question(Protocol):
    """An item that a generator answers, ``training.examples.Example`` or ``benchmarks.Problem``.

    Attributes:
        id: a name that is unique within its set.
        completion: the right answer.
    """

    @property
    def id(self) -> str:
        """See the class."""

    @property
    def completion(self) -> str:
        """See the class."""


class Answer(Protocol):
    """What a generator gives for a prompt.

    Attributes:
        text: the answer.
        tokens: its ids, up to the one that ended it.
        records: details of each of these tokens; may be empty.
    """

    @property
    def text(self) -> str:
        """See the class."""

    @property
    def tokens(self) -> Sequence[int]:
        """See the class."""

    @property
    def records(self) -> Sequence[Any]:
        """See the class."""


class TextGenerator(Protocol):
    """``decoding.Generator``, say."""

    @property
    def generate(self) -> Callable[..., list]:
        """``generate(prompts, **options)``: one :class:`Answer` a :data:`Prompt`, in order."""


class TokenScorer(Protocol):
    """``decoder_scorer.DecoderScorer``, say."""

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For n ids an array of n - 1 numbers: number t is log p(ids[t + 1] | ids[0..t])."""


class PromptTemplate(Protocol):
    """A template of ``training.templates``, or ``benchmarks.FewShotTemplate``.

    Attributes:
        digest: names what the template writes, for the setup of a results file.
    """

    digest: str

    def request(self, example: Any) -> Any:
        """The :data:`Prompt` that asks an example."""
