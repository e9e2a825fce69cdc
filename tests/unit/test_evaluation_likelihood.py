"""Perplexity with a stride and multiple choice, against direct computation on a Markov chain."""

import numpy as np
import pytest

from colora_ms.errors import ConfigError, DataError
from colora_ms.evaluation.likelihood import ChoiceItem, multiple_choice, perplexity

VOCAB = 7


class Chain:
    """p(next | previous two tokens); the second one back is 0 where the window does not reach."""

    def __init__(self, seed=0):
        logits = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB, VOCAB))
        self.table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.calls = []

    def token_logprobs(self, sequences):
        self.calls.append([len(sequence) for sequence in sequences])
        return [[self.table[ids[t - 1] if t else 0, ids[t], ids[t + 1]]
                 for t in range(len(ids) - 1)] for ids in sequences]


def text(length, seed=1):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@pytest.mark.parametrize("length, window, stride", [(50, 10, 5), (50, 10, 1), (53, 10, 9), (8, 10, 5),
                                                    (10, 10, 3), (11, 10, 9), (2, 2, 1), (30, 7, 4)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_but_the_first_counts_once(length, window, stride, batch_size):
    chain, ids = Chain(), text(length)
    result = perplexity(chain, ids, window, stride, batch_size)
    # Direct: the window that scores position t is the first one that reaches it.
    total = 0.0
    for position in range(1, length):
        begin = next(b for b in range(0, length, stride) if b + window > position)
        total -= chain.token_logprobs([ids[begin:position + 1]])[0][-1]
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(total / (length - 1), rel=1e-12)
    assert result.perplexity == pytest.approx(np.exp(result.loss))


def test_uniform_model_has_the_vocabulary_as_perplexity():
    class Uniform:
        def token_logprobs(self, sequences):
            return [np.full(len(ids) - 1, -np.log(VOCAB)) for ids in sequences]
    assert perplexity(Uniform(), text(99), 16).perplexity == pytest.approx(VOCAB)


def test_perplexity_refuses():
    for window, stride in [(1, 1), (10, 10), (10, 0), (10, 11)]:
        with pytest.raises(ConfigError, match="1 <= stride < window"):
            perplexity(Chain(), text(20), window, stride)
    with pytest.raises(DataError, match="at least two tokens"):
        perplexity(Chain(), [1], 10)

    class Broken(Chain):
        def token_logprobs(self, sequences):
            return [row[1:] for row in super().token_logprobs(sequences)]
    with pytest.raises(DataError, match=r"has 10 tokens.*shape \(8,\)"):
        perplexity(Broken(), text(20), 10)

    class Nan(Chain):
        def token_logprobs(self, sequences):
            return [np.full(len(ids) - 1, np.nan) for ids in sequences]
    with pytest.raises(DataError, match="NaN"):
        perplexity(Nan(), text(20), 10)


class Digits:
    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [int(letter) for letter in text if letter.isdigit()]


@pytest.mark.parametrize("normalise", ["none", "token", "byte"])
def test_multiple_choice_takes_the_likeliest(normalise):
    chain, random = Chain(3), np.random.default_rng(5)
    items, want = [], []
    for number in range(20):
        context = "".join(map(str, random.integers(0, VOCAB, 4)))
        choices = tuple("".join(map(str, random.integers(0, VOCAB, random.integers(1, 5)))) + "x" * number
                        for _ in range(3))
        items.append(ChoiceItem(str(number), context, choices, number % 3))
        scores = []
        for choice in choices:
            ids = Digits().encode(context) + Digits().encode(choice, False)
            count = len(Digits().encode(choice, False))
            total = sum(chain.table[ids[t - 2], ids[t - 1], ids[t]]
                        for t in range(len(ids) - count, len(ids)))
            scores.append(total / {"none": 1, "token": count, "byte": len(choice)}[normalise])
        want.append(scores)
    result = multiple_choice(chain, Digits(), items, normalise, batch_size=7)
    for item, scores, row in zip(items, want, result.items):
        assert row["scores"] == pytest.approx(scores)
        assert row["chosen"] == int(np.argmax(scores))
        assert row["correct"] == (row["chosen"] == item.answer)
    assert result.accuracy == sum(result.outcomes.values()) / 20


def test_multiple_choice_refuses():
    good = ChoiceItem("a", "1", ("2", "3"), 0)
    with pytest.raises(ConfigError, match="Did you mean 'token'"):
        multiple_choice(Chain(), Digits(), [good], "tokens")
    for item in (ChoiceItem("a", "1", ("2",), 0), ChoiceItem("a", "1", ("2", "3"), 2),
                 ChoiceItem("a", "1", ("2", "3"), "1"), ChoiceItem("a", "1", ("2", "x"), 0)):
        with pytest.raises(DataError, match="item a"):
            multiple_choice(Chain(), Digits(), [item])
    with pytest.raises(DataError, match="no multiple-choice items"):
        multiple_choice(Chain(), Digits(), [])
