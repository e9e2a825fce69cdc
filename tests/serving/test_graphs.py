"""What the engine relies on: a prompt's keys and values do not depend on how it was cut, nor on its neighbours."""

import numpy as np

from colora_ms.models.cache import KeyValueCache
from colora_ms.serving.graphs import Graphs


def test_keys_and_values_are_the_same_however_a_prompt_is_cut(tiny_decoder):
    decoder = tiny_decoder(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    cache = KeyValueCache(decoder.config, 5, 128)
    graphs = Graphs(decoder, cache)
    ids = np.random.default_rng(1).integers(3, 97, 100).astype(np.int32)

    def fill(shape, pieces):
        """pieces: [(cache row, start, end)] for one call."""
        rows, tokens = shape
        block = np.zeros((rows, tokens), np.int32)
        numbers = np.zeros((4, rows), np.int32)
        numbers[0] = -1
        for i, (row, start, end) in enumerate(pieces):
            block[i, :end - start] = ids[start:end]
            numbers[1:, i] = row, start, end - start
        graphs.prefill(block, *numbers)

    fill((1, 100), [(0, 0, 100)])
    cuts = [0, 7, 30, 31, 62, 94, 100]
    for start, end in zip(cuts, cuts[1:]):
        fill((3, 32), [(2, start, end)])
        fill((3, 32), [(3, 0, 9), (1, start, end)])
    graphs.copy(2, 4)
    for tensor in (*cache.keys, *cache.values):
        values = tensor.asnumpy()[:, :, :100]
        assert np.abs(values[0]).sum(axis=(0, 2)).all()
        for row in (1, 2, 4):
            assert np.array_equal(values[0], values[row])
