"""Few blocks, shared prefixes, and requests that are computed again: over the real step, to the last bit."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mindspore as ms

from colora_ms.decoding import Contrast, Generator, Sampling
from colora_ms.errors import ConfigError, DecodingError
from colora_ms.models.paged_cache import BLOCK, block_bytes
from colora_ms.serving import AdapterBank, Engine

PREFIX = np.random.default_rng(3).integers(3, 97, 60).tolist()
KINDS = [dict(adapter=None), dict(adapter="a0"), dict(adapter="a1", contrast=Contrast(0.1, 0.5)),
         dict(adapter="a2", sampling=Sampling(1.0, seed=5)),
         dict(adapter="a0", contrast=Contrast(0.2, 1.0, adapt="divergence", skip_copies=True))]


def made(tiny_decoder, word_tokenizer, adapter_folder, blocks, **more):
    decoder = tiny_decoder()
    bank = AdapterBank(decoder, adapter_folder, max_loaded=3, max_rank=6)
    size = blocks * block_bytes(decoder.config, more.get("cache_dtype", ms.float32))
    return Engine(decoder, word_tokenizer, bank, **{"rows": 6, "chunk": 4, "prompt_chunk": 24, "cache_bytes": size,
                                                    **more})


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def engines(request, tiny_decoder, word_tokenizer, adapter_folder):
    """(roomy, tight): two engines over equal models, one with a fifth of the blocks that six rows may want."""
    dtype = getattr(ms, request.param)
    found = [made(tiny_decoder, word_tokenizer, adapter_folder, 200, cache_dtype=dtype),
             made(tiny_decoder, word_tokenizer, adapter_folder, 17, cache_dtype=dtype, ahead=1)]
    yield found
    for engine in found:
        engine.close()


def wanted(kind, prompt, budget):
    return dict(prompt=prompt, max_new_tokens=budget, ignore_eos=True, records=True, **KINDS[kind])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.builds(lambda kind, shared, tail, budget: wanted(kind, PREFIX[:shared] + tail, budget),
                                st.integers(0, len(KINDS) - 1), st.sampled_from([0, 20, 48, 60]),
                                st.lists(st.integers(3, 96), min_size=1, max_size=8), st.integers(1, 40)),
                      min_size=3, max_size=9))
def test_answers_under_pressure_are_those_of_a_request_alone(engines, asked):
    roomy, tight = engines
    alone = []
    for one in asked:
        roomy.call(roomy._core.clear)
        alone.append(roomy.submit(**one).result(60))
    for engine in engines:
        handles = [engine.submit(**one) for one in asked]
        for handle, answer in zip(handles, alone):
            found = handle.result(60)
            assert found.tokens == answer.tokens and found.records == answer.records and found.text == answer.text
    assert tight.stats()["failures"] == roomy.stats()["failures"] == 0
    assert tight.stats()["blocks_used"] == 0 and tight.stats()["bank"]["pinned"] == 0


def test_the_pressure_was_real(engines):
    roomy, tight = engines
    asked = [wanted(0, [7 + i] * 20, 60) for i in range(6)]
    alone = [roomy.submit(**one).result(60) for one in asked]
    before = tight.stats()["preemptions"]
    handles = [tight.submit(**one) for one in asked]
    assert [handle.result(60) for handle in handles] == alone
    assert tight.stats()["preemptions"] > before and tight.stats()["evicted_blocks"] > 0
    assert roomy.stats()["preemptions"] == 0
    usage = handles[-1].usage
    assert (usage.prompt, usage.generated) == (20, 60)


def test_what_does_not_fit_the_cache_is_refused_by_name(engines, tiny_decoder, word_tokenizer, adapter_folder):
    tight = engines[1]
    assert len(tight.submit([5] * 100, max_new_tokens=60, ignore_eos=True).result(60).tokens) == 28  # the model's 128
    pair = dict(adapter="a0", contrast=Contrast(), max_new_tokens=60, ignore_eos=True)
    assert len(tight.submit([5] * 100, **pair).result(60).tokens) == 28  # eight blocks for each row of seventeen
    few = made(tiny_decoder, word_tokenizer, adapter_folder, 5)
    with few:
        assert len(few.submit([5] * 70, max_new_tokens=60, ignore_eos=True).result(60).tokens) == 5 * BLOCK - 70
        with pytest.raises(DecodingError, match="32 tokens; the engine's cache holds 32, .* cache_bytes"):
            few.submit([5] * 32, **pair)
        assert len(few.submit([5] * 31, **pair).result(60).tokens) == 1
    for size in (0, 100, True, 1e9, "1"):
        with pytest.raises(ConfigError, match="cache_bytes="):
            Engine(tiny_decoder(), word_tokenizer, cache_bytes=size)


def test_a_generator_grows_or_keeps_to_its_bytes(tiny_decoder, word_tokenizer):
    decoder = tiny_decoder()
    generator = Generator(decoder, word_tokenizer, max_rows=4)
    prompts = [[5 + i] * 40 for i in range(9)]
    alone = [generator.generate([prompt], max_new_tokens=30, ignore_eos=True, records=True)[0] for prompt in prompts]
    assert generator._core.pool.blocks == 8  # the model's 128 positions
    assert generator.generate(prompts, max_new_tokens=30, ignore_eos=True, records=True) == alone
    assert generator._core.pool.blocks == 32 and generator._core.counts["preemptions"] == 0
    tight = Generator(decoder, word_tokenizer, max_rows=4, cache_bytes=12 * block_bytes(decoder.config))
    tight.generate([[5]], max_new_tokens=1)
    tight._core.ahead = 1
    assert tight.generate(prompts, max_new_tokens=30, ignore_eos=True, records=True) == alone
    assert tight._core.pool.blocks == 12 and tight._core.counts["preemptions"] > 0
    with pytest.raises(DecodingError, match="holds 48.*cache_bytes"):
        Generator(decoder, word_tokenizer, cache_bytes=3 * block_bytes(decoder.config)).generate([[5] * 48])


def test_a_generators_prefixes_end_with_the_call(tiny_decoder, word_tokenizer):
    """Between two calls weights may change; what was computed with the old ones must not be found."""
    from mindspore import Tensor

    decoder = tiny_decoder()
    generator = Generator(decoder, word_tokenizer)
    first = generator.generate([PREFIX], max_new_tokens=20, ignore_eos=True)[0]
    norm = decoder.model.layers[0].input_layernorm.weight
    norm.set_data(Tensor(norm.asnumpy() * np.float32(2.0)))
    changed = generator.generate([PREFIX], max_new_tokens=20, ignore_eos=True)[0]
    fresh = tiny_decoder()
    weight = fresh.model.layers[0].input_layernorm.weight
    weight.set_data(Tensor(weight.asnumpy() * np.float32(2.0)))
    assert changed == Generator(fresh, word_tokenizer).generate([PREFIX], max_new_tokens=20, ignore_eos=True)[0]
    assert changed.tokens != first.tokens
