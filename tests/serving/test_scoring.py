"""Log-probabilities of given tokens: against float64 over the decoder's own logits, with and without adapters, while
requests run."""

import numpy as np
import pytest

from colora_ms.errors import DecodingError, UnknownAdapterError
from colora_ms.serving.scoring import MOST_TOP, Scorer


def expected(engine, ids, adapter):
    """(own, best) in float64 from the logits of the whole sequence."""
    from mindspore import Tensor

    def logits():
        lease = None if adapter is None else engine.bank.lease(engine.bank.resolve(adapter))
        try:
            found = engine.decoder(Tensor(np.array([ids], np.int32)), Tensor(np.array([len(ids)], np.int32)),
                                   Tensor(np.array([-1 if lease is None else lease.slot], np.int32)))
            return found.asnumpy()[0].astype(np.float64)
        finally:
            if lease is not None:
                engine.bank.release(lease)

    values = engine.call(logits)
    logprobs = values - np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1, keepdims=True)) \
        - values.max(-1, keepdims=True)
    return logprobs[np.arange(len(ids) - 1), ids[1:]], np.sort(logprobs, -1)[:-1, ::-1][:, :MOST_TOP]


@pytest.mark.parametrize("length", [2, 33, 66, 90])
@pytest.mark.parametrize("adapter", [None, "a2"])
def test_scores_are_the_models(engine, length, adapter):
    ids = np.random.default_rng(length).integers(3, 97, length).tolist()
    running = engine.submit([5, 6, 7], adapter="a0", max_new_tokens=60, ignore_eos=True)
    found = Scorer(engine).score(ids, adapter)
    own, best = expected(engine, ids, adapter)
    assert np.isnan(found.logprobs[0]) and found.logprobs.shape == (length,)
    np.testing.assert_allclose(found.logprobs[1:], own, atol=2e-4)
    np.testing.assert_allclose(found.top_logprobs[1:], best, atol=2e-4)
    assert (np.diff(found.top_logprobs[1:]) <= 0).all()
    assert len(running.result(60).tokens) == 60


def test_a_greedy_answer_takes_the_most_likely_tokens(engine):
    done = engine.submit([5, 6, 7], adapter="a1", max_new_tokens=30, ignore_eos=True).result(60)
    found = Scorer(engine).score([5, 6, 7, *done.tokens], "a1")
    assert found.top_ids[3:, 0].tolist() == list(done.tokens)
    np.testing.assert_array_equal(found.logprobs[3:], found.top_logprobs[3:, 0])


def test_bounds(engine, monkeypatch):
    scorer = Scorer(engine)
    assert np.isnan(scorer.score([5]).logprobs).all()
    with pytest.raises(DecodingError, match="context is"):
        scorer.score([5] * (engine.decoder.max_positions + 2))
    with pytest.raises(UnknownAdapterError):
        scorer.score([5, 6], "nobody")
    monkeypatch.setattr(engine, "split", True)  # its other workers would not know of the call
    with pytest.raises(DecodingError, match="split over workers"):
        scorer.score([5, 6])


def test_it_waits_for_a_slot(engine):
    running = [engine.submit([5], adapter=f"a{place}", max_new_tokens=80, ignore_eos=True) for place in range(3)]
    next(running[-1].pieces(60))
    assert np.isfinite(Scorer(engine).score([5, 6, 7], "a5").logprobs[1:]).all()
    assert engine.stats()["bank"]["pinned"] <= 3
    for handle in running:
        handle.result(60)
    assert engine.stats()["bank"]["pinned"] == 0
