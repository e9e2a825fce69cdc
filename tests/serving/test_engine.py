"""The engine: the same tokens as the batch decoder, alone and in any mix; streams, limits, and ends of all kinds."""

import numpy as np
import pytest

from colora_ms.decoding import Contrast, Generator, Sampling
from tests.serving.conftest import adapter_tensors, write_adapter

RANDOM = np.random.default_rng(11)
PROMPTS = [RANDOM.integers(3, 97, n).tolist() for n in (1, 2, 5, 17, 30, 44, 3, 26)]


def tokens(handle):
    return handle.result(60).tokens


@pytest.fixture(scope="module")
def generator(engine, adapter_folder, tiny_decoder, word_tokenizer):
    from colora_ms.adapters import load_adapters

    decoder = tiny_decoder()
    handle = load_adapters(decoder, {f"a{i}": adapter_folder / f"a{i}" for i in range(6)})
    return Generator(decoder, word_tokenizer, handle, max_rows=8)


MIX = [
    dict(adapter=None),
    dict(adapter="a0"),
    dict(adapter="a1", contrast=Contrast(0.1, 0.5)),
    dict(adapter="a2", sampling=Sampling(1.0, seed=5)),
    dict(adapter="a3", contrast=Contrast(0.2, 1.0), sampling=Sampling(0.8, top_k=20, seed=9)),
    dict(adapter="a0", contrast=Contrast(0.05, 0.3)),
    dict(adapter=None, sampling=Sampling(1.2, top_p=0.9, seed=1)),
    dict(adapter="a4", contrast=Contrast(0.1, 0.8, adapt="entropy", skip_copies=True)),
]


@pytest.fixture(scope="module")
def alone(engine):
    """Tokens of every request of the mix, each run when no other one was there."""
    return [tokens(engine.submit(prompt, max_new_tokens=12, **settings)) for prompt, settings in zip(PROMPTS, MIX)]


def test_equals_the_batch_decoder(alone, generator):
    for prompt, settings, found in zip(PROMPTS, MIX, alone):
        assert generator.generate(prompt, max_new_tokens=12, **settings)[0].tokens == found


def test_any_mix_gives_the_same_tokens(engine, alone):
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(MIX) * 2) % len(MIX)
        handles = [(i, engine.submit(PROMPTS[i], max_new_tokens=12, **MIX[i])) for i in order]
        for i, handle in handles:
            assert tokens(handle) == alone[i]


def test_bfloat16_slots_answer_like_float32_slots_with_the_rounded_adapter(tiny_decoder, word_tokenizer, tmp_path):
    from colora_ms.models.safetensors_file import bfloat16_to_float32, float32_to_bfloat16
    from colora_ms.serving import AdapterBank, Engine

    values = {name: adapter_tensors(i, 4) for i, name in enumerate(("one", "two"))}
    for name, tensors in values.items():
        write_adapter(tmp_path / "full" / name, 0, tensors=tensors)
        write_adapter(tmp_path / "rounded" / name, 0, tensors={
            key: bfloat16_to_float32(float32_to_bfloat16(value)) for key, value in tensors.items()})
    found = {}
    for folder, kind in (("full", "bfloat16"), ("rounded", "float32"), ("full", "float32")):
        bank = AdapterBank(decoder := tiny_decoder(), tmp_path / folder, max_loaded=2, max_rank=4, adapter_format=kind)
        with Engine(decoder, word_tokenizer, bank, rows=4, max_length=96, chunk=4, prompt_chunk=24) as engine:
            handles = [engine.submit(prompt, adapter=name, contrast=contrast, max_new_tokens=12, records=True)
                       for prompt, name, contrast in zip(PROMPTS[:6], ("one", "two") * 3,
                                                         (None,) * 4 + (Contrast(0.1, 0.5),) * 2)]
            found[folder, kind] = [(answer.tokens, [record.score for record in answer.records])
                                   for answer in (handle.result(60) for handle in handles)]
    assert found["full", "bfloat16"] == found["rounded", "float32"]
    assert found["full", "bfloat16"] != found["full", "float32"]


def test_more_adapters_than_slots_are_paged(engine, alone):
    before = engine.stats()["bank"]
    for i in (0, 1, 2, 3, 7, 1):
        assert tokens(engine.submit(PROMPTS[i], max_new_tokens=12, **MIX[i])) == alone[i]
    after = engine.stats()["bank"]
    assert after["evictions"] > before["evictions"] and after["loaded"] == 3 and after["pinned"] == 0
