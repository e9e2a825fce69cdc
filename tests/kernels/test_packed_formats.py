"""Weights as files store them: every format of the table against vectors written apart from it, against the ``gguf``
package's own reader, and, bit for bit, against the float32 weight of the same values."""

import gguf
import numpy as np
import pytest

from call import Refused, available_isas, call, linear, packed, set_threads, table
from colora_ms.kernels.operands import FORMATS, PACKED, PRODUCT, WITH_ZEROS

ISAS = available_isas()
BLOCKS = tuple(name for name in PACKED if name.startswith("q"))
KINDS = ("float16", *BLOCKS, *WITH_ZEROS)
ORDERED = ("int4_zero_ordered", "int8_zero_ordered")
# Even and odd columns are added up apart, or columns as they lie, so a sum is not in the order of float32's.
OTHER_ORDER = ("int4_zero", *ORDERED)


def halves(rng, count):
    """Finite float16 scales of both signs and many sizes, subnormal ones among them: bytes (count, 2)."""
    values = (rng.normal(size=count) * 10.0 ** rng.integers(-6, 0, count)).astype("<f2")
    values[:: 7] = np.frombuffer(b"\x01\x80", "<f2")  # the smallest below zero
    return values.view(np.uint8).reshape(count, 2)


def raw_blocks(rng, form, out, columns):
    """Rows of random blocks with finite scales."""
    values, size = PACKED[form]
    count = out * (columns // values)
    blocks = rng.integers(0, 256, (count, size)).astype(np.uint8)
    for at in {"q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q4_k": (0, 2),
               "q5_k": (0, 2), "q6_k": (208,)}[form]:
        blocks[:, at:at + 2] = halves(rng, count)
    return blocks.reshape(out, -1)


def make(rng, form, out, columns):
    """-> (weight, weight_scale or None, its values by other code, float32)."""
    if form == "float16":
        weight = halves(rng, out * columns).view("<f2").reshape(out, columns)
        return packed(weight, form), None, weight.astype(np.float32)
    if form in BLOCKS:
        raw = raw_blocks(rng, form, out, columns)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[form.upper()])
        return packed(raw, form), None, values.astype(np.float32)
    groups = next(n for n in (4, 3, 1) if columns % n == 0)
    low, high = (0, 16) if form.startswith("int4") else (-128, 128)
    q, zero = rng.integers(low, high, (out, groups, columns // groups)), rng.integers(low, high, (out, groups, 1))
    scale = rng.uniform(-0.1, 0.1, (out, groups, 1)).astype(np.float32)
    values = ((q - zero).astype(np.float32) * scale).reshape(out, columns)
    q = q.reshape(out, columns)
    q = (q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8) if form.startswith("int4") else q.astype(np.int8)
    order = rng.permutation(columns).astype(np.int32) if form in ORDERED else None
    if order is not None:
        stored, values = values, np.empty_like(values)
        values[:, order] = stored
    return packed(q, form, order), np.concatenate([scale, zero.astype(np.float32)], 2), values


def widths(form):
    """Row lengths: one block, some, and more than one block of the sums (1024)."""
    values = PACKED.get(form, (2, 1))[0]
    return (values, 5 * values, 8960 if values == 256 else 1152)


def bits(array):
    return np.asarray(array).view(np.uint32)


def rows_of(weight, scale=None):
    """All rows of a table by the embedding operator; of an ordered one, which is no table, by a product with ones."""
    if weight.form in ORDERED:
        return run(np.eye(len(weight.order), dtype=np.float32), None, [weight, scale])[0].T
    form, out = weight.form, weight.shape[0]
    values, size = PACKED.get(form, (1, 1))
    return call("embedding", [np.arange(out, dtype=np.int32), *table(weight, scale)],
                [((out, weight.shape[1] // size * values), "float32")])[0]


def run(x, slots, *linears):
    outputs = [(x.shape[:-1] + (one[0].shape[0],), "float32") for one in linears]
    return call("multi_lora_linear", [x, slots] + [tensor for one in linears for tensor in linear(*one)], outputs)


def adapters(rng, slots, rank, columns, out):
    return [(rng.normal(size=(slots, rank, columns)) * 0.1).astype(np.float32),
            (rng.normal(size=(slots, out, rank)) * 0.1).astype(np.float32),
            rng.uniform(0.5, 2, slots).astype(np.float32)]


# -- values -----------------------------------------------------------------------------------------------------------

def half(value):
    return np.array([value], "<f2").tobytes()


P = bytes(j + 16 * (15 - j) for j in range(16))
S = bytes.fromhex("4182c3044586c7089abcdef1")
K = bytes((7 * i + 3) & 255 for i in range(128))
Q6 = (bytes((7 * i + 3) & 255 for i in range(128)) + bytes((29 * i + 5) & 255 for i in range(64))
      + bytes((13 * i - 100) & 255 for i in range(16)) + half(0.5))

#: (bytes of a block, {index: value}, sum of (i + 1) * value): computed by hand from the layouts' descriptions.
VECTORS = {
    "q4_0": (half(0.5) + P, {0: -4, 1: -3.5, 15: 3.5, 16: 3.5, 31: -4}, -132),
    "q4_1": (half(0.5) + half(-1) + P, {0: -1, 15: 6.5, 16: 6.5, 31: -1}, 1452),
    "q5_0": (half(0.25) + bytes.fromhex("efcdab89") + P, {0: 0, 1: 0.25, 15: 3.75, 31: 0}, -2),
    "q5_1": (half(0.25) + half(-2) + bytes.fromhex("efcdab89") + P, {0: 2, 1: 2.25, 15: 5.75}, 1054),
    "q8_0": (half(0.5) + bytes((8 * j - 128) & 255 for j in range(32)), {0: -64, 31: 60}, 9856),
    "q4_k": (half(0.5) + half(0.25) + S + K, {0: 0.25, 1: 3.75, 31: 4.75, 32: -1.5, 64: 2.75, 128: 32.75, 255: -0.25},
             2752002),
    "q5_k": (half(0.5) + half(0.25) + S + bytes((29 * i + 5) & 255 for i in range(32)) + K,
             {0: 8.25, 1: 3.75, 64: 26.75, 255: 7.75}, 5970330),
    "q6_k": (Q6, {0: 650, 1: -500, 32: 481, 64: 768, 128: -26, 255: -1187.5}, -664948),
}


@pytest.mark.parametrize("form", VECTORS)
def test_vectors(form):
    raw, some, total = VECTORS[form]
    values = rows_of(packed(np.frombuffer(raw, np.uint8)[None], form))[0]
    assert {i: values[i] for i in some} == some
    assert (np.arange(1, len(values) + 1) * values.astype(np.float64)).sum() == total


def test_halves_and_zero_points():
    weight = packed(np.array([[0x3555, 0xC248, 1, 0x8000, 0x7BFF]], np.uint16).view("<f2"), "float16")
    want = np.array([0.33325195, -3.140625, 2.0 ** -24, -0.0, 65504], np.float32)
    assert np.array_equal(bits(rows_of(weight)[0]), bits(want))
    # GPTQ's column 0 of the vector: zero 3, scale 0.5, q[k] = k
    scale = np.array([[[0.5, 3]]], np.float32)
    assert rows_of(packed(np.array([[0x10, 0x32, 0x54, 0x76]], np.uint8), "int4_zero"), scale)[0].tolist() == \
        [-1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert rows_of(packed(np.array([[-128, 127]], np.int8), "int8_zero"), scale)[0].tolist() == [-65.5, 62]


@pytest.mark.parametrize("form", KINDS)
def test_every_value_is_that_of_another_reader(form):
    rng = np.random.default_rng(1)
    for columns in widths(form):
        weight, scale, values = make(rng, form, 7, columns)
        found = rows_of(weight, scale)
        if form in ORDERED:  # sums have no zero below zero
            found, values = found + 0.0, values + 0.0
        assert np.array_equal(bits(found), bits(values))


# -- products ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", KINDS)
def test_a_product_is_that_of_the_same_float32_weight(form):
    """With adapters and a bias, in decode (few rows), unpacked (some) and prefill (many) form."""
    rng = np.random.default_rng(2)
    for columns in widths(form):
        weight, scale, values = make(rng, form, 13, columns)
        pair, bias = adapters(rng, 3, 5, columns, 13), rng.normal(size=13).astype(np.float32)
        for rows in (1, 4, 9, 40):
            x, slots = rng.normal(size=(rows, columns)).astype(np.float32), rng.integers(-1, 3, rows).astype(np.int32)
            got, = run(x, slots, [weight, scale, bias, *pair])
            want, = run(x, slots, [values, None, bias, *pair])
            if form in OTHER_ORDER:
                np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max() * columns ** 0.5)
            else:
                assert np.array_equal(bits(got), bits(want)), (columns, rows)


@pytest.mark.parametrize("form", KINDS)
def test_a_row_is_the_same_in_any_batch_and_with_any_threads(form):
    rng = np.random.default_rng(3)
    columns = widths(form)[1]
    weight, scale, _ = make(rng, form, 70, columns)
    one = [weight, scale, None, *adapters(rng, 4, 16, columns, 70)]
    x, slots = rng.normal(size=(70, columns)).astype(np.float32), rng.integers(-1, 4, 70).astype(np.int32)
    alone = np.concatenate([run(x[i:i + 1], slots[i:i + 1], one)[0] for i in range(70)])
    for n in (2, 3, 5, 6, 7, 12, 32, 33, 70):
        start = int(rng.integers(0, 71 - n))
        for threads in (1, 2, 3):
            set_threads(threads)
            assert np.array_equal(run(x[start:start + n], slots[start:start + n], one)[0], alone[start:start + n])
        set_threads(2)


@pytest.mark.parametrize("form", KINDS)
def test_gradients_are_those_of_the_same_float32_weight(form):
    rng = np.random.default_rng(4)
    columns = widths(form)[1]
    weight, scale, values = make(rng, form, 9, columns)
    down, up, strength = adapters(rng, 3, 4, columns, 9)
    x, slots = rng.normal(size=(5, 7, columns)).astype(np.float32), np.array([0, -1, 2, 0, 1], np.int32)
    dy = rng.normal(size=(5, 7, 9)).astype(np.float32)
    outputs = [(x.shape, "float32"), (down.shape, "float32"), (up.shape, "float32")]
    got, want = (call("multi_lora_linear_grad", [np.array([1], np.int32), x, slots, dy,
                                                 *linear(one, own, None, down, up, strength)], outputs)
                 for one, own in ((weight, scale), (values, None)))
    for mine, theirs in zip(got, want):
        assert np.abs(theirs).max() > 0 and np.array_equal(bits(mine), bits(theirs))


@pytest.mark.parametrize("form", BLOCKS)
def test_rows_that_are_no_whole_blocks_are_refused(form):
    values, size = PACKED[form]
    x, y = np.ones((1, values), np.float32), np.full((1, 2), 7, np.float32)
    for bad, words in ((size - 1, ("bytes of a block", form)), (2 * size, ("input columns", form))):
        with pytest.raises(Refused) as error:
            call("multi_lora_linear", [x, None, *linear(packed(np.zeros((2, bad), np.uint8), form))], [y])
        assert all(word in str(error.value) for word in ("weight", *words)) and (y == 7).all()


@pytest.mark.parametrize("form", WITH_ZEROS)
def test_zero_points_come_in_pairs_with_scales(form):
    weight, scale, _ = make(np.random.default_rng(5), form, 3, 8)
    for bad in (scale[:, :, 0], scale[:, :, :1], scale[:2], np.ones((3, 3, 2), np.float32)):
        with pytest.raises(Refused, match="weight_scale"):
            run(np.ones((1, 8), np.float32), None, [weight, bad] + [None] * 4)


@pytest.mark.parametrize("form", ORDERED)
def test_linears_of_one_call_have_orders_of_their_own(form):
    """Two that share one, one with another, one of plain float32: each is what it is alone, its gradient, too."""
    rng = np.random.default_rng(7)
    linears, plain, columns = [], [], 160
    for i in range(4):
        weight, scale, values = make(rng, form if i != 2 else "int8_zero", 9, columns)
        if i == 1:
            stored, weight.order = values[:, weight.order], linears[0][0].order.copy()
            values[:, weight.order] = stored
        pair = adapters(rng, 3, 4, columns, 9)
        linears.append([weight, scale, None, *pair])
        plain.append([values, None, None, *pair])
    slots = np.array([0, -1, 2, 0, 1], np.int32)
    for tokens in (1, 9):
        x = rng.normal(size=(5, tokens, columns)).astype(np.float32)
        together = run(x, slots, *linears)
        for one, same, got in zip(linears, plain, together):
            assert np.array_equal(bits(got), bits(run(x, slots, one)[0]))
            if one[0].order is not None:  # without adapters it is the plain form on the gathered x
                sorted_form = packed(np.asarray(one[0]), form.removesuffix("_ordered"))
                bare, = run(np.ascontiguousarray(x[:, :, one[0].order]), None, [sorted_form, one[1]])
                assert np.array_equal(bits(run(x, None, one[:2])[0]), bits(bare))
            np.testing.assert_allclose(got, run(x, slots, same)[0], rtol=0, atol=2e-5 * np.abs(got).max())
        dy = rng.normal(size=(4, 5, tokens, 9)).astype(np.float32)
        outputs = [(x.shape, "float32")] + [(part.shape, "float32") for one in linears for part in one[3:5]]
        got, want = (call("multi_lora_linear_grad", [np.array([4], np.int32), x, slots, *[
            tensor for own, one in zip(dy, ones) for tensor in (own, *linear(*one))]], outputs)
            for ones in (linears, plain))
        for mine, theirs in zip(got, want):
            assert np.abs(theirs).max() > 0 and np.array_equal(bits(mine), bits(theirs))


@pytest.mark.parametrize("form", ORDERED)
def test_orders_that_reach_outside_of_x_and_tables_are_refused(form):
    weight, scale, _ = make(np.random.default_rng(8), form, 3, 8)
    for wrong in (np.arange(1, 9, dtype=np.int32), -np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int64),
                  np.arange(4, dtype=np.int32)):
        with pytest.raises(Refused, match="order"):
            run(np.ones((1, 8), np.float32), None, [packed(np.asarray(weight), form, wrong), scale])
    with pytest.raises(Refused, match="order of its own"):
        call("embedding", [np.zeros(1, np.int32), *table(weight, scale)], [((1, 8), "float32")])


# -- in graph mode ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kinds", [KINDS[i:i + 4] for i in range(0, len(KINDS), 4)], ids=" ".join)
def test_faces_and_gradients_equal_those_of_the_reference_forms(mindspore, isa, kinds):
    """Four linears a call on one x, with adapters; and the rows of an embedding."""
    from colora_ms.kernels import backend
    from colora_ms.kernels.aot import ABSENT
    from colora_ms.kernels.embedding import embedding, embedding_reference
    from colora_ms.kernels.linear import multi_lora_linear, multi_lora_linear_reference
    from colora_ms.kernels.operands import base_of

    if isa != ISAS[0] or backend() != "cpu":
        pytest.skip("graph mode is tested with the CPU operators, once")
    ms, rng = mindspore, np.random.default_rng(6)
    bases, rows_are, tables = [], [], []
    for form in kinds:
        weight, scale, values = make(rng, form, 6, 512)
        tag = [name for name, _ in FORMATS].index(form)
        assert tag < PRODUCT
        order = ABSENT if weight.order is None else ms.Tensor(weight.order)
        bases.append(base_of(tag, ms.Tensor(np.asarray(weight)), ABSENT if scale is None else ms.Tensor(scale),
                             order=order))
        if form not in ORDERED:
            rows_are.append(bases[-1])
            tables.append(values)
    down, up, strength = (ms.Tensor(one) for one in adapters(rng, 2, 3, 512, 6))
    x, slots = ms.Tensor(rng.normal(size=(3, 2, 512)).astype(np.float32)), ms.Tensor(np.array([0, -1, 1], np.int32))
    ids = ms.Tensor(np.array([5, 0, 3], np.int32))

    def run_with(product, rows):
        class Loss(ms.nn.Cell):
            def construct(self, x, down, up):
                total, found = 0.0, ()
                for base in rows_are:
                    found = found + (rows(ids, base),)
                for base in bases:
                    y = product(x, slots, (base, (down, up, strength)))
                    total = total + (y * y).mean()
                return total, found

        return ms.value_and_grad(Loss(), (0, 1, 2), has_aux=True)(x, down, up)

    (fast, found), fast_gradients = run_with(multi_lora_linear, embedding)
    (slow, by_reference), slow_gradients = run_with(multi_lora_linear_reference, embedding_reference)
    for mine, theirs, values in zip(found, by_reference, tables):
        assert np.array_equal(mine.asnumpy(), values[ids.asnumpy()])
        assert np.array_equal(theirs.asnumpy(), values[ids.asnumpy()])
    np.testing.assert_allclose(fast.asnumpy(), slow.asnumpy(), rtol=1e-5)
    for got, want in zip(fast_gradients, slow_gradients):
        np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=0, atol=5e-6 * np.abs(want.asnumpy()).max())
