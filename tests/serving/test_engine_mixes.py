"""Mixes in the engine: several adapters of one request in the slots, rows with prompts of their own, and files."""

import numpy as np
import pytest

from colora_ms.decoding import Contrast, Generator, Sampling
from colora_ms.decoding.mix import Context, Ensemble, Guide, Mix, Negative, Voice
from colora_ms.decoding.mix_file import load_mix, save_mix
from colora_ms.errors import AdapterError, ConfigError, DecodingError, UnknownAdapterError
from tests.serving.conftest import write_adapter

RANDOM = np.random.default_rng(5)
PROMPTS = [RANDOM.integers(3, 97, n).tolist() for n in (4, 21, 33, 9, 17, 26, 2, 40)]
MIXES = [
    dict(mix=Ensemble(["a0", "a1", "a2"])), dict(mix=Guide("a3", "a1", 1.2), sampling=Sampling(0.9, seed=3)),
    dict(adapter="a4", mix=Negative(PROMPTS[1][:7], 1.7)), dict(adapter="a0", mix=Context(0.1, 0.8, PROMPTS[2][9:])),
    dict(mix=Ensemble(["a5", None], [1, 3], "prob", 0.1), repetition_penalty=1.2, logprobs=3),
    dict(adapter="a2", contrast=Contrast(0.1, 0.6), frequency_penalty=0.5), dict(adapter="a1", adapter_scale=0.4),
    dict(adapter="a1"),
]
OPTIONS = dict(max_new_tokens=10, records=True, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(engine):
    return [engine.submit(prompt, **settings, **OPTIONS).result(120) for prompt, settings in zip(PROMPTS, MIXES)]


def test_equal_the_batch_decoder(alone, adapter_folder, tiny_decoder, word_tokenizer):
    from colora_ms.adapters import load_adapters

    decoder = tiny_decoder()
    handle = load_adapters(decoder, {f"a{i}": adapter_folder / f"a{i}" for i in range(6)})
    generator = Generator(decoder, word_tokenizer, handle, max_rows=8)
    for prompt, settings, found in zip(PROMPTS, MIXES, alone):
        assert generator.generate([prompt], **settings, **OPTIONS)[0] == found
    assert len({one.tokens for one in alone}) == len(alone)


def test_any_order_beside_any_others(engine, alone):
    """With 4 rows and 3 slots for six adapters: requests wait for rows and for all their slots at once."""
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(2 * len(MIXES)) % len(MIXES)
        handles = [(i, engine.submit(PROMPTS[i], **MIXES[i], **OPTIONS)) for i in order]
        for i, handle in handles:
            assert handle.result(240) == alone[i]
    assert engine.bank.info()["pinned"] == 0


def test_out_of_blocks_they_wait_and_make_the_same_tokens(adapter_folder, tiny_decoder, word_tokenizer):
    """Penalties and rows with prompts of their own survive it that a request is computed again."""
    from colora_ms.models.paged_cache import PagedCache
    from colora_ms.serving import AdapterBank, Engine

    options = {**OPTIONS, "max_new_tokens": 40}

    def run(blocks, order, **more):
        """(answers, preemptions) of an engine with so many blocks of cache."""
        decoder = tiny_decoder()
        bank = AdapterBank(decoder, adapter_folder, max_loaded=6, max_rank=6)
        room = blocks * PagedCache(decoder.config, 1).block_bytes
        with Engine(decoder, word_tokenizer, bank, rows=12, cache_bytes=room, chunk=4, prompt_chunk=24,
                    **more) as engine:
            handles = [engine.submit(PROMPTS[i], **MIXES[i], **options) for i in order]
            return [handle.result(240) for handle in handles], engine.stats()["preemptions"]

    order = list(range(len(MIXES)))
    want, none = run(100, order)
    found, some = run(16, order, ahead=1)
    assert found == want and none == 0 < some


def test_pieces_carry_log_probabilities(engine):
    handle = engine.submit(PROMPTS[4], **MIXES[4], **OPTIONS)
    pieces = list(handle.pieces())
    want = handle.result(60)
    assert tuple(one for piece in pieces for one in piece.logprobs) == want.logprobs and len(want.logprobs) == 10


@pytest.mark.parametrize("wanted, error, words", [
    (dict(mix=Ensemble(["a0", "nobody"])), UnknownAdapterError, ("nobody",)),
    (dict(mix=Ensemble(["a0", "a1", "a2", "a3"])), DecodingError, ("4 adapters", "3 slots")),
    (dict(mix=Ensemble(["a0", None, None, None, None])), DecodingError, ("5 rows", "has 4")),
    (dict(adapter="a0", mix=Negative([5] * 96)), DecodingError, ("96 tokens",)),
])
def test_what_the_engine_cannot_run_is_refused(engine, wanted, error, words):
    with pytest.raises(error) as told:
        engine.submit([5, 6], **wanted)
    assert all(word in str(told.value) for word in words), str(told.value)


def test_files(tmp_path, adapter_folder):
    mix = Mix((Voice("first", "a0", 0.7, 0.5), Voice("second", None, 0.3, prompt=[{"role": "user", "content": "ü"}])),
              "probability", "mixture", 0.2, title="two")
    path = tmp_path / "mixes" / "both.yaml"
    path.parent.mkdir()
    folder = write_adapter(tmp_path / "adapters" / "a0", seed=1)
    saved = save_mix(path, mix, {"a0": folder, "other": adapter_folder / "a1"})
    found = load_mix(path)
    assert found.mix == mix and found.name == "both" and found.digests == saved.digests
    assert found.adapters["a0"].resolve() == folder.resolve() and list(found.adapters) == ["a0"]
    write_adapter(folder, seed=2)
    with pytest.raises(ConfigError, match="'a0' in .* save the mix again"):
        load_mix(path)
    path.write_text("adapters: {a0: ../adapters/a0}\nmix: {ensemble: {adapters: [a0, null]}}\nname: short\n")
    assert load_mix(path).mix == Ensemble(["a0", None]) and load_mix(path).name == "short"


@pytest.mark.parametrize("text, error, words", [
    ("- 1", ConfigError, "holds no mix"), ("a: [", ConfigError, "cannot be read"),
    ("mix: {}", DecodingError, "expected a mapping"), ("mix: {negative: {prompt: x}}", ConfigError, "name its adapter"),
    ("mix: {ensemble: {adapters: [a]}}", ConfigError, "'a', which adapters does not name"),
    ("mixx: 1\nmix: {ensemble: {adapters: [a]}}", ConfigError, "Did you mean 'mix'"),
    ("adapters: {a: 3}\nmix: {ensemble: {adapters: [a]}}", ConfigError, "adapters.a=3"),
    ("adapters: {a: nowhere}\nmix: {ensemble: {adapters: [a]}}", AdapterError, "nowhere"),
])
def test_files_that_cannot_be_used(tmp_path, text, error, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(error, match=words):
        load_mix(path)


def test_a_mix_of_the_request_s_adapter_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="name its adapter"):
        save_mix(tmp_path / "x.yaml", Negative("bad"), {})
    with pytest.raises(ConfigError, match="folder is not given"):
        save_mix(tmp_path / "x.yaml", Ensemble(["a"]), {"b": tmp_path})
