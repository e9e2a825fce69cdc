"""embedding: every weight format against NumPy, bad ids, the face in graph mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, ops

from call import Refused, call, from_bf16, table, to_bf16
from colora_ms.kernels.aot import ABSENT
from colora_ms.kernels.embedding import embedding, embedding_reference
from colora_ms.kernels.operands import FLOAT32, FORMATS, base_of

ms.set_context(mode=ms.GRAPH_MODE)


def make(kind, vocab, hidden, groups, rng):
    """-> (weight as the operator takes it, scale or None, the float32 table)"""
    values = rng.normal(size=(vocab, hidden)).astype(np.float32)
    if kind == "float32":
        return values, None, values
    if kind == "bfloat16":
        return to_bf16(values), None, from_bf16(to_bf16(values))
    low, high = (-128, 128) if kind == "int8" else (-8, 8)
    whole = rng.integers(low, high, size=(vocab, hidden))
    scale = rng.uniform(0.1, 2, size=(vocab, groups)).astype(np.float32)
    table = (whole.reshape(vocab, groups, -1).astype(np.float32) * scale[:, :, None]).reshape(vocab, hidden)
    if groups == 1:
        scale = scale[:, 0]
    if kind == "int8":
        return whole.astype(np.int8), scale, table
    nibbles = (whole + 8).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scale, table


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(["float32", "bfloat16", "int8", "int4"]), vocab=st.integers(1, 40),
       half=st.integers(1, 40), grouped=st.booleans(), shape=st.sampled_from([(1,), (0,), (3, 5), (2, 1, 4)]),
       seed=st.integers(0, 99))
def test_embedding_picks_exact_rows(kind, vocab, half, grouped, shape, seed):
    rng = np.random.default_rng(seed)
    weight, scale, values = make(kind, vocab, 2 * half, 2 if grouped else 1, rng)
    ids = rng.integers(0, vocab, size=shape).astype(np.int32)
    y, = call("embedding", [ids, *table(weight, scale)], [((*shape, 2 * half), "float32")])
    assert np.array_equal(y, values[ids])


@pytest.mark.parametrize("ids, weight, scale, words", [
    ([0, 5], "float32", None, ("ids", "5", "index 1", "0 to 4")),
    ([-1], "float32", None, ("ids", "-1")),
    ([0], "int8", None, ("weight_scale", "absent")),
    ([0], "int8", np.ones(4, np.float32), ("weight_scale", "(4,)")),
    ([0], "int8", np.ones((5, 3), np.float32), ("weight_scale", "3", "8")),
])
def test_bad_arguments_are_refused_before_writing(ids, weight, scale, words):
    values = make(weight, 5, 8, 1, np.random.default_rng(0))[0]
    y = np.full((len(ids), 8), 7, np.float32)
    with pytest.raises(Refused) as error:
        call("embedding", [np.array(ids, np.int32), *table(values, scale)], [y])
    assert all(word in str(error.value) for word in ("embedding", *words))
    assert (y == 7).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_face_and_reference_agree_in_graph_mode(kind):
    rng = np.random.default_rng(3)
    weight, scale, values = make(kind, 11, 12, 3, rng)
    weight = Tensor(from_bf16(weight), ms.bfloat16) if kind == "bfloat16" else Tensor(weight)
    base = base_of([name for name, _ in FORMATS].index(kind), weight, ABSENT if scale is None else Tensor(scale))
    ids = Tensor(rng.integers(0, 11, size=(2, 5)).astype(np.int32))

    class Rows(ms.nn.Cell):
        def __init__(self, form):
            super().__init__()
            self.form = form

        def construct(self, ids):
            return self.form(ids, base)

    for form in (embedding, embedding_reference):
        assert np.array_equal(Rows(form)(ids).asnumpy(), values[ids.asnumpy()])


def test_gradient_of_a_float32_table_sums_over_repeated_ids():
    rng = np.random.default_rng(3)
    ids = Tensor(np.array([[1, 1, 4]], np.int32))
    weight = Tensor(rng.normal(size=(6, 7)).astype(np.float32))
    mix = Tensor(rng.normal(size=(1, 3, 7)).astype(np.float32))

    @ms.jit
    def gradient(weight):
        return ops.grad(lambda w: (embedding(ids, base_of(FLOAT32, w)) * mix).sum())(weight)

    want = np.zeros((6, 7), np.float32)
    np.add.at(want, ids.asnumpy(), mix.asnumpy())
    np.testing.assert_allclose(gradient(weight).asnumpy(), want, rtol=1e-6)
