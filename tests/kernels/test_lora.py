"""lora_shrink and lora_expand against NumPy float64, per row and per segment; the worker threads behind all
operators."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call import LIBRARY, Refused, available_isas, call, set_threads

ISAS = available_isas()
FEW = settings(max_examples=20, deadline=None)


def make_stacks(rng, slots, rank, columns, out):
    down = (rng.normal(size=(slots, rank, columns)) * 0.1).astype(np.float32)
    up = (rng.normal(size=(slots, out, rank)) * 0.1).astype(np.float32)
    return down, up, rng.uniform(0.5, 2, slots).astype(np.float32)


def shrink(x, slots, down, scale, segments=None):
    return call("lora_shrink", [x, slots, down, scale, segments], [(x.shape[:-1] + (down.shape[1],), "float32")])[0]


def expand(v, slots, up, y, segments=None):
    return call("lora_expand", [v, slots, up, y, segments], [(y.shape, "float32")])[0]


def check(x, slots_of_tokens, v, result, y, down, up, scale):
    """All with the leading dimensions flattened to tokens; one slot per token."""
    for t, slot in enumerate(slots_of_tokens):
        if slot < 0:
            assert not v[t].any() and np.array_equal(result[t], y[t])
            continue
        # A sum's rounding grows with its terms, not with the sum, which may cancel.
        factor = scale[slot].astype(np.float64)
        want, terms = factor * (down[slot].astype(np.float64) @ x[t]), abs(factor) * (np.abs(down[slot]) @ np.abs(x[t]))
        assert (np.abs(v[t] - want) <= 1e-6 * terms + 1e-30).all()
        want, terms = y[t] + up[slot].astype(np.float64) @ v[t], np.abs(y[t]) + np.abs(up[slot]) @ np.abs(v[t])
        assert (np.abs(result[t] - want) <= 1e-6 * terms + 1e-30).all()


@FEW
@given(rows=st.integers(1, 40), tokens=st.sampled_from([0, 1, 3, 35]),
       columns=st.sampled_from([1, 5, 16, 63, 576, 1030]),
       out=st.sampled_from([1, 3, 16, 65, 130, 200]), rank=st.sampled_from([1, 2, 8, 15, 16, 33, 64, 70, 256]),
       popularity=st.sampled_from(["distinct", "uniform", "skewed", "identical", "none"]), seed=st.integers(0, 9999))
def test_rows_match_float64(rows, tokens, columns, out, rank, popularity, seed):
    rng = np.random.default_rng(seed)
    n = 41
    down, up, scale = make_stacks(rng, n, rank, columns, out)
    down[40] = up[40] = scale[40] = np.nan  # never used
    slots = {
        "distinct": rng.permutation(40)[:rows], "uniform": rng.integers(-1, 40, rows),
        "skewed": np.minimum(rng.geometric(0.5, rows) - 2, 39), "identical": np.full(rows, 7),
        "none": np.full(rows, -1),
    }[popularity].astype(np.int32)
    lead = (rows,) if tokens == 0 else (rows, tokens)
    x, y = (rng.normal(size=lead + (n,)).astype(np.float32) for n in (columns, out))
    v = shrink(x, slots, down, scale)
    result = expand(v, slots, up, y)
    check(x.reshape(-1, columns), np.repeat(slots, max(tokens, 1)), v.reshape(-1, rank), result.reshape(-1, out),
          y.reshape(-1, out), down, up, scale)


@FEW
@given(lengths=st.lists(st.integers(0, 60), min_size=0, max_size=9), columns=st.sampled_from([3, 64, 577]),
       out=st.sampled_from([1, 64, 99]), rank=st.sampled_from([1, 8, 17, 64]), seed=st.integers(0, 9999))
def test_segments_match_float64_and_the_row_form(lengths, columns, out, rank, seed):
    rng = np.random.default_rng(seed)
    down, up, scale = make_stacks(rng, 4, rank, columns, out)
    tokens = sum(lengths)
    segments = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    slots = rng.integers(-1, 4, len(lengths)).astype(np.int32)
    x, y = (rng.normal(size=(tokens, n)).astype(np.float32) for n in (columns, out))
    v = shrink(x, slots, down, scale, segments)
    result = expand(v, slots, up, y, segments)
    per_token = np.repeat(slots, lengths)
    check(x, per_token, v, result, y, down, up, scale)
    assert np.array_equal(v, shrink(x, per_token, down, scale))
    assert np.array_equal(result, expand(v, per_token, up, y))


def test_results_depend_neither_on_threads_nor_on_neighbours():
    rng = np.random.default_rng(1)
    down, up, scale = make_stacks(rng, 5, 24, 300, 333)
    x, y = rng.normal(size=(90, 300)).astype(np.float32), rng.normal(size=(90, 333)).astype(np.float32)
    slots = rng.integers(-1, 5, 90).astype(np.int32)
    v, result = shrink(x, slots, down, scale), None
    for threads in (1, 2, 5):
        set_threads(threads)
        assert np.array_equal(v, shrink(x, slots, down, scale))
        again = expand(v, slots, up, y)
        assert result is None or np.array_equal(result, again)
        result = again
    set_threads(2)
    for i in (0, 13, 89):
        alone = shrink(x[i : i + 1], slots[i : i + 1], down, scale)
        assert np.array_equal(alone, v[i : i + 1])
        assert np.array_equal(expand(alone, slots[i : i + 1], up, y[i : i + 1]), result[i : i + 1])


SHRINK = {"x": np.ones((4, 8), np.float32), "slots": np.zeros(4, np.int32), "down": np.ones((2, 3, 8), np.float32),
          "scale": np.ones(2, np.float32), "segments": None}
EXPAND = {"v": np.ones((4, 3), np.float32), "slots": np.zeros(4, np.int32), "up": np.ones((2, 5, 3), np.float32),
          "y": np.ones((4, 5), np.float32), "segments": None}


def offsets(*values):
    return {"segments": np.array(values, np.int32), "slots": np.zeros(max(len(values) - 1, 0), np.int32)}


@pytest.mark.parametrize("change, words", [
    ({"slots": np.array([0, 0, 2, 0], np.int32)}, ["slots", "slot 2 at index 2"]),
    ({"slots": np.array([0, 0, -7, 0], np.int32)}, ["slots", "slot -7"]),
    ({"slots": np.zeros(3, np.int32)}, ["slots", "(3,)", "4"]),
    ({"slots": np.zeros(4, np.float32)}, ["slots", "float32", "int32"]),
    (offsets(1, 4), ["segments", "starts at 1"]),
    (offsets(0, 3, 2, 4), ["segments", "falls from 3 to 2"]),
    (offsets(0, 3), ["segments", "ends at 3", "4"]),
    (offsets(0, 9), ["segments", "ends at 9", "4"]),
    (offsets(), ["segments", "empty"]),
    ({"segments": np.array([0, 4], np.int32)}, ["slots", "(4,)", "1"]),
    ({"segments": np.array([0, 4], np.int64), "slots": np.zeros(1, np.int32)}, ["segments", "int64"]),
])
def test_bad_slots_and_segments_are_named_and_nothing_is_written(change, words):
    for name, good, shape in (("lora_shrink", SHRINK, (4, 3)), ("lora_expand", EXPAND, (4, 5))):
        output = np.full(shape, 7, np.float32)
        with pytest.raises(Refused) as refused:
            call(name, list({**good, **change}.values()), [output])
        for word in [name, *words]:
            assert word in str(refused.value)
        assert (output == 7).all()


@pytest.mark.parametrize("name, good, change, words", [
    ("lora_shrink", SHRINK, {"x": np.ones((4, 7), np.float32)}, ["down", "(2, 3, 8)", "7"]),
    ("lora_shrink", SHRINK, {"down": np.ones((3, 8), np.float32)}, ["down", "slots, rank, in"]),
    ("lora_shrink", SHRINK, {"scale": np.ones(1, np.float32)}, ["scale", "(1,)"]),
    ("lora_expand", EXPAND, {"v": np.ones((4, 2), np.float32)}, ["up", "(2, 5, 3)", "2"]),
    ("lora_expand", EXPAND, {"y": np.ones((3, 5), np.float32)}, ["y", "(3, 5)", "4"]),
    ("lora_expand", EXPAND, {"y": np.ones((4, 5), np.float64)}, ["y", "float64"]),
])
def test_bad_shapes_are_named(name, good, change, words):
    with pytest.raises(Refused) as refused:
        call(name, list({**good, **change}.values()), [((4, 3 if name == "lora_shrink" else 5), "float32")])
    for word in [name, *words]:
        assert word in str(refused.value)


# -- worker threads ---------------------------------------------------------------------------------------------------

def test_calls_from_several_threads_at_once_are_right():
    rng = np.random.default_rng(2)
    down, _, scale = make_stacks(rng, 3, 16, 512, 1)
    slots = np.arange(48, dtype=np.int32) % 3
    inputs = [rng.normal(size=(48, 512)).astype(np.float32) for _ in range(4)]
    wanted = [shrink(x, slots, down, scale) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(60):
            if not np.array_equal(shrink(inputs[i], slots, down, scale), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_compute():
    rng = np.random.default_rng(3)
    down, _, scale = make_stacks(rng, 2, 16, 512, 1)
    x, slots = rng.normal(size=(64, 512)).astype(np.float32), np.zeros(64, np.int32)
    wanted = shrink(x, slots, down, scale)  # starts the workers, which the child does not inherit
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if np.array_equal(shrink(x, slots, down, scale), wanted) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_thread_count_and_instruction_set_can_be_read(isa):
    assert LIBRARY.colora_isa().decode() == isa
    before = LIBRARY.colora_thread_count()
    assert LIBRARY.colora_set_threads(0) == 1 and LIBRARY.colora_thread_count() == before
    assert LIBRARY.colora_set_isa(b"mmx") == 1 and LIBRARY.colora_isa().decode() == isa


# -- in graph mode ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["rows", "tokens", "segments"])
def test_graph_faces_equal_reference_forms(mindspore, isa, form):
    from colora_ms.kernels import ABSENT, backend, lora

    if isa != ISAS[0] or backend() != "cpu":
        pytest.skip("graph mode is tested with the CPU operators, once")
    ms, rng = mindspore, np.random.default_rng(4)
    down, up, scale = (ms.Tensor(a) for a in make_stacks(rng, 3, 5, 20, 11))
    if form == "segments":
        segments = ms.Tensor(np.array([0, 4, 4, 9], np.int32))
        slots, lead = ms.Tensor(np.array([2, 0, -1], np.int32)), (9,)
    else:
        segments = ABSENT
        slots, lead = ms.Tensor(np.array([2, -1, 0], np.int32)), (3,) if form == "rows" else (3, 4)
    x, y = (ms.Tensor(rng.normal(size=lead + (n,)).astype(np.float32)) for n in (20, 11))

    class Net(ms.nn.Cell):
        def __init__(self, shrink_face, expand_face):
            super().__init__()
            self.shrink, self.expand = shrink_face, expand_face

        def construct(self, x, y, slots, segments):
            return self.expand(self.shrink(x, slots, down, scale, segments), slots, up, y, segments)

    fast = Net(lora.lora_shrink, lora.lora_expand)(x, y, slots, segments).asnumpy()
    slow = Net(lora.lora_shrink_reference, lora.lora_expand_reference)(x, y, slots, segments).asnumpy()
    np.testing.assert_allclose(fast, slow, rtol=0, atol=3e-6)
    assert not np.array_equal(fast, y.asnumpy())
