"""Logits of the decoder against Hugging Face transformers' float32 (tests/goldens), with and without the cache."""

import numpy as np
import pytest

import rules

TINY = ["llama", "llama_bias", "llama_linear", "llama_yarn", "qwen2", "qwen3"]
TOLERANCE = 2e-4


def tensor(values):
    from mindspore import Tensor

    return Tensor(np.asarray(values, np.int32))


def full_logits(decoder, ids):
    """Logits (rows, tokens, vocab) of equal-length rows without adapters."""
    from colora_ms import runtime

    ids = np.asarray(ids, np.int32)
    rows = ids.shape[0]
    lengths, slots = np.full(rows, ids.shape[1]), np.full(rows, -1)
    return runtime.run(decoder, tensor(ids), tensor(lengths), tensor(slots)).asnumpy()


def cached_logits(decoder, ids, prefill):
    """The same through the key/value cache: a prefill of ``prefill`` tokens, then one token at a time."""
    from colora_ms.decoding.stepwise import Stepper

    ids = np.asarray(ids, np.int32)
    rows, length = ids.shape
    stepper = Stepper(decoder, rows, length)
    return {start + count - 1: stepper.append(ids[:, start:start + count])
            for start, count in [(0, prefill), *((place, 1) for place in range(prefill, length))]}


@pytest.fixture(scope="module", params=TINY)
def tiny(request, mindspore, goldens):
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(goldens / "tiny" / request.param)
    return Decoder(checkpoint.config, checkpoint.tensors), np.load(goldens / "tiny" / request.param / "logits.npz")


def test_full_forward_equals_transformers(tiny):
    decoder, golden = tiny
    logits = full_logits(decoder, golden["ids"])
    assert np.abs(logits[:, golden["positions"]] - golden["logits"]).max() <= TOLERANCE
    assert (logits.argmax(-1) == golden["argmax"]).mean() > 0.99


def test_incremental_decode_equals_full_forward(tiny):
    decoder, golden = tiny
    full = full_logits(decoder, golden["ids"])
    for position, logits in cached_logits(decoder, golden["ids"], prefill=17).items():
        assert np.abs(logits - full[:, position]).max() <= TOLERANCE


def test_greedy_equals_transformers(tiny, word_tokenizer, agree):
    from colora_ms.decoding import Generator

    decoder, golden = tiny
    generator = Generator(decoder, word_tokenizer)
    count = golden["greedy_ids"].shape[1]
    answers = generator.generate([list(map(int, row)) for row in golden["ids"][:, :8]], max_new_tokens=count,
                                 ignore_eos=True)
    for answer, ids, margins in zip(answers, golden["greedy_ids"], golden["greedy_margin"]):
        assert agree(answer.tokens, ids, margins) >= 4


def test_smollm2_logits_equal_transformers(smollm2, goldens):
    decoder, _ = smollm2
    golden = np.load(goldens / "smollm2.npz")
    for i in range(2):
        logits = full_logits(decoder, golden[f"ids{i}"][None])[0]
        chosen = logits[golden[f"positions{i}"]][:, golden["columns"]]
        assert np.abs(chosen - golden[f"logits{i}"]).max() <= TOLERANCE
        assert (logits.argmax(-1) == golden[f"argmax{i}"]).all()


def test_smollm2_greedy_equals_transformers(smollm2, goldens, agree):
    from colora_ms.decoding import Generator

    decoder, tokenizer = smollm2
    golden = np.load(goldens / "smollm2.npz")
    prompts = [list(map(int, golden[f"greedy_prompt{i}"])) for i in range(4)]
    assert prompts == [tokenizer.encode(text) for text in rules.GREEDY_PROMPTS]
    answers = Generator(decoder, tokenizer).generate(prompts, max_new_tokens=32, ignore_eos=True)
    for i, answer in enumerate(answers):
        assert agree(answer.tokens, golden[f"greedy_ids{i}"], golden[f"greedy_margin{i}"]) >= 16
