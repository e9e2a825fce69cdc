"""The decoder as the model behind perplexity: its token log-probabilities against its own logits."""

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor

from colora_ms.errors import DataError
from colora_ms.evaluation.decoder_scorer import DecoderScorer
from colora_ms.evaluation.likelihood import perplexity
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder

ms.set_context(mode=ms.GRAPH_MODE)


def tiny_decoder(**options):
    config = DecoderConfig(model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=24,
                           num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                           head_dim=8, max_position_embeddings=32)
    return Decoder(config, **options)


@pytest.mark.parametrize("options", [{}, {"weight_format": "int8"}])
def test_token_logprobs_equal_the_log_softmax_of_the_logits(options):
    net = tiny_decoder(**options)
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 50, length).tolist() for length in (2, 9, 33, 17, 5)]
    scorer = DecoderScorer(net, rows=2, multiple=16)
    assert scorer.losses.fused
    rows = scorer.token_logprobs(sequences)
    for ids, row in zip(sequences, rows):
        padded = np.zeros((1, 32), np.int32)
        padded[0, :len(ids) - 1] = ids[:-1]
        logits = net(Tensor(padded), Tensor(np.array([len(ids) - 1], np.int32)),
                     Tensor(np.array([-1], np.int32))).asnumpy()[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = [log_p[t, ids[t + 1]] for t in range(len(ids) - 1)]
        np.testing.assert_allclose(row, want, atol=2e-5)
    text = random.integers(0, 50, 60).tolist()
    assert perplexity(scorer, text, 16, 8, batch_size=2).tokens == 59


def test_sequences_that_do_not_fit_are_named():
    scorer = DecoderScorer(tiny_decoder())
    for bad, word in [([1], "has 1 tokens"), ([1] * 34, "has 34 tokens"), ([1, 50], "id 50"),
                      ([1, -2], "id -2")]:
        with pytest.raises(DataError, match=f"sequence 1.*{word}"):
            scorer.token_logprobs([[1, 2], bad])
