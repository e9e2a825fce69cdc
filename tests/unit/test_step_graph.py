"""StepGraph: the operator and the graph of Cells make the same tokens; weights that move; limits."""

import numpy as np
import pytest

from colora_ms.adapters import LoraConfig, inject
from colora_ms.decoding import Generator
from colora_ms.decoding.step import FlatBatch, StepGraph, bucket
from colora_ms.errors import DecodingError
from colora_ms.kernels import backend
from colora_ms.kernels.options import SELECTION, OptionRows
from colora_ms.kernels.paged import BLOCK
from colora_ms.models.paged_cache import PagedCache

NONE = np.zeros((0, 2), np.int32)


class Driver:
    """Three requests (a contrast, an adapter, the base) through one StepGraph."""

    def __init__(self, decoder, capacity=4):
        self.cache = PagedCache(decoder.config, 16)
        self.graph = StepGraph(decoder, self.cache, 32, 6, 4, capacity)
        self.tables = np.arange(16, dtype=np.int32).reshape(4, 4)
        self.slots = np.array([0, -1, 0, -1], np.int32)
        self.rows_of = [(0, 1), (2,), (3,)]
        random = np.random.default_rng(3)
        self.prompts = [random.integers(3, 97, n).astype(np.int32) for n in (9, 1, 20)]

    def options(self, left, expert=(0, 2, 3)):
        rows = OptionRows(3)
        rows.mix_rows[:, 0], rows.mix_rows[0, 1] = expert, 1
        rows.put(slice(None), "budget", left)
        rows.put(0, "alpha", 0.05)
        rows.put(0, "beta", 0.5)
        rows.put(0, "mode", 8)
        rows.put(1, "temperature", 1.0)
        return [getattr(rows, name) for name in SELECTION]

    def run(self, tokens, steps, most=12):
        """``tokens`` of every request, an iteration or ``steps`` a call -> lists of tokens."""
        uniforms = np.random.default_rng(5).random((3, 64)).astype(np.float32)
        found = [[] for _ in self.rows_of]
        place = {row: 0 for rows in self.rows_of for row in rows}
        while any(len(one) < tokens for one in found):
            ids, rows, positions, expert = [], [], [], []
            for request, own in enumerate(self.rows_of):
                whole = np.append(self.prompts[request], found[request]).astype(np.int32)
                ready = False
                for row in own:
                    piece = whole[place[row]:place[row] + most]
                    ids.append(piece)
                    rows.append(np.full(len(piece), row, np.int32))
                    positions.append(np.arange(place[row], place[row] + len(piece), dtype=np.int32))
                    place[row] += len(piece)
                    ready = place[row] == len(whole)
                expert.append(own[0] if ready else -1)
            done = len(found[0])
            count = steps if all(one >= 0 for one in expert) else 1
            previous = np.array([one[-1] if one else -1 for one in found], np.int32)
            settings = self.options([tokens - len(one) for one in found], expert)
            drawn = np.stack([uniforms[i, len(one):len(one) + self.graph.capacity] for i, one in enumerate(found)])
            result = self.graph.run(FlatBatch(
                *(np.concatenate(one) for one in (ids, rows, positions)), self.slots, self.tables, NONE, *settings,
                previous, drawn, np.array([-1], np.int32), count, self.prompts))
            for request, one in enumerate(found):
                taken = int(result.counts[request])
                one += result.ints[:taken, request, 0].tolist()
                for row in self.rows_of[request]:
                    place[row] += max(taken - 1, 0)
            assert done <= len(found[0])
        return found


@pytest.fixture
def decoder(mindspore, tiny_decoder):
    net = tiny_decoder()
    inject(net, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False), seed=1)
    return net


def needs_cpu():
    if backend() != "cpu":
        pytest.skip("needs the compiled CPU library")


def test_iterations_and_cuts_do_not_change_tokens_and_nothing_compiles_again(decoder):
    needs_cpu()
    driver = Driver(decoder)
    assert driver.graph.fused
    want = driver.run(10, 1, most=1)
    for steps, most in ((1, 12), (4, 5), (3, 3)):
        assert driver.run(10, steps, most) == want
    assert driver.graph.compilations() == 1


def test_cells_make_the_tokens_of_the_operator(decoder, monkeypatch):
    needs_cpu()
    want = Driver(decoder).run(8, 4)
    monkeypatch.setattr(type(decoder), "fused_step", property(lambda self: False))
    driver = Driver(decoder)
    assert not driver.graph.fused
    assert driver.run(8, 1) == want


def test_copies_of_blocks(decoder, monkeypatch):
    needs_cpu()
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(type(decoder), "fused_step", property(lambda self: False))
        driver = Driver(decoder)
        settings = driver.options([1, 0, 0], (-1, -1, -1))
        ids = driver.prompts[2][:9]

        def batch(row, tokens, first, copies, driver=driver, settings=settings):
            return driver.graph.run(FlatBatch(
                tokens, np.full(len(tokens), row, np.int32), np.arange(first, first + len(tokens), dtype=np.int32),
                driver.slots, driver.tables, copies, *settings, np.full(3, -1, np.int32),
                np.zeros((3, driver.graph.capacity), np.float32), np.array([-1], np.int32)))

        batch(3, ids, 0, NONE)
        source, target = driver.tables[3, 0], driver.tables[1, 0]
        batch(1, ids[:1], BLOCK - 1, np.array([[source, target]], np.int32))
        for layer in (driver.cache.keys, driver.cache.values):
            for one in layer:
                values = one.asnumpy().reshape(16, 2, -1)
                keys = values[[source, target]].reshape(2, 2, 8, BLOCK) if layer is driver.cache.keys else \
                    values[[source, target]].reshape(2, 2, BLOCK, 8).swapaxes(-1, -2)
                assert keys[0, ..., :9].any() and np.array_equal(keys[0, ..., :9], keys[1, ..., :9])


def test_weights_that_move_are_followed(decoder, mindspore):
    needs_cpu()
    driver = Driver(decoder)
    want = driver.run(6, 2)
    norm = decoder.model.norm.weight
    values = norm.asnumpy().copy()
    norm.set_data(mindspore.Tensor(-values))
    assert driver.run(6, 2) != want
    norm.set_data(mindspore.Tensor(values))
    assert driver.run(6, 2) == want
    assert driver.graph.compilations() == 1


def test_another_cache_compiles_nothing(decoder):
    needs_cpu()
    driver = Driver(decoder)
    want = driver.run(6, 2)
    driver.graph.over(lambda: PagedCache(decoder.config, 20))
    driver.cache = driver.graph.cache
    assert driver.run(6, 2) == want
    assert driver.graph.compilations() == 1


def test_a_generator_compiles_once_whatever_comes(decoder, word_tokenizer):
    needs_cpu()
    generator = Generator(decoder, word_tokenizer, max_rows=4)
    first = generator.generate([5, 6, 7], max_new_tokens=4)[0].tokens
    for prompts, tokens in (([[5] * 60, [6], [7, 8]], 40), ([[9]], 1), ([[5] * n for n in range(1, 30)], 7)):
        generator.generate(prompts, max_new_tokens=tokens, ignore_eos=True)
    assert generator.generate([5, 6, 7], max_new_tokens=4)[0].tokens == first
    assert generator._core.graph.compilations() == 1 and generator._core.pool.blocks > 16


def test_batches_that_are_too_large_are_told(decoder):
    driver = Driver(decoder)
    settings = driver.options([1, 1, 1])
    many = np.zeros(33, np.int32)
    with pytest.raises(DecodingError, match="33 tokens is larger than its graph, which has 32"):
        driver.graph.run(FlatBatch(many, many, np.arange(33, dtype=np.int32), driver.slots, driver.tables, NONE,
                                   *settings, many[:3], np.zeros((3, 4), np.float32), many[:1]))
    assert [bucket(n) for n in (0, 1, 4, 5, 65)] == [4, 4, 4, 8, 128] and bucket(1, 1) == 1
