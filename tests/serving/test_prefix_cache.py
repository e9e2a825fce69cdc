"""Which rows of the cache are given out, and what they may be reused for."""

import numpy as np

from colora_ms.serving.prefix_cache import PrefixCache, common
from colora_ms.serving.scheduler import best_shape, prompt_shapes, row_buckets

IDS = np.arange(100, dtype=np.int32)


def test_common_prefix():
    assert common(IDS, IDS) == 100 and common(IDS[:0], IDS) == 0 and common(IDS, IDS + 1) == 0
    assert common(np.array([1, 2, 3]), np.array([1, 2, 4, 3])) == 2


def test_longest_prefix_of_the_same_key_wins_and_free_rows_win_ties():
    cache = PrefixCache(4, smallest=8)
    for index, (key, n) in enumerate([("a", 20), ("a", 50), ("b", 90), ("a", 50)]):
        cache.occupy(cache.rows[index], key, IDS[:n])
    assert cache.best("a", IDS) == (cache.rows[1], 50)
    cache.release(cache.rows[3])
    assert cache.best("a", IDS) == (cache.rows[3], 50)
    assert cache.best("c", IDS) == (None, 0)
    assert cache.best("a", IDS[:7]) == (None, 0)  # below the smallest that is worth it


def test_rows_without_content_go_first_then_the_oldest():
    cache = PrefixCache(3)
    for row in cache.rows:
        cache.occupy(row, "a", IDS)
    cache.release(cache.rows[2])
    cache.release(cache.rows[0])
    cache.release(cache.rows[1], keep=False)
    taken = [cache.take().index for _ in range(3)]
    assert taken == [1, 2, 0] and cache.free == 0
    assert all(len(row.tokens) == 0 for row in cache.rows)


def test_a_prefix_is_avoided_as_long_as_there_is_another_row():
    cache = PrefixCache(2)
    for row in cache.rows:
        cache.occupy(row, "a", IDS)
        cache.release(row)
    assert cache.take(avoid=cache.rows[0]) is cache.rows[1]
    assert cache.take(avoid=cache.rows[0]) is cache.rows[0]


def test_buckets_and_shapes():
    assert row_buckets(8) == [1, 2, 4, 8] and row_buckets(6) == [1, 2, 4, 6] and row_buckets(1) == [1]
    for rows, chunk in ((2, 2), (16, 128), (3, 20)):
        for r, t in prompt_shapes(rows, chunk):
            assert 1 <= r <= rows and 2 <= t <= chunk
    shapes = prompt_shapes(16, 128)
    assert best_shape(shapes, [5]) == (2, 16)
    assert best_shape(shapes, [5] * 8) == (8, 16)
    assert best_shape(shapes, [500, 9]) == (1, 128)
    assert best_shape(shapes, [500, 400]) == (2, 128)
