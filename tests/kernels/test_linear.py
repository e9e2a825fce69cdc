"""multi_lora_linear and its gradient: the C operators against NumPy float64, the faces in graph mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from call import Refused, available_isas, call, from_bf16, linear, product, set_threads, to_bf16

ISAS = available_isas()
FORMATS = ("float32", "bfloat16", "int8", "int8 grouped", "int4", "int4 grouped")
FEW = settings(max_examples=12, deadline=None)


def make_weight(rng, out, columns, kind):
    """-> (weight, weight_scale, the same weight dequantised by NumPy in float32)."""
    dense = (rng.normal(size=(out, columns)) * 0.2).astype(np.float32)
    if kind == "float32":
        return dense, None, dense
    if kind == "bfloat16":
        pair = to_bf16(dense)
        return pair, None, from_bf16(pair)
    groups = 1
    if "grouped" in kind:
        groups = max(g for g in (1, 2, 3, 4, 6, 9) if columns % g == 0)
    scale = (rng.random((out, groups)) * 0.02 + 0.001).astype(np.float32)
    low, high = (-128, 128) if "int8" in kind else (-8, 8)
    q = rng.integers(low, high, (out, columns))
    dense = (q.reshape(out, groups, -1).astype(np.float32) * scale[:, :, None]).reshape(out, columns)
    given_scale = scale if "grouped" in kind else scale[:, 0].copy()
    if "int8" in kind:
        return q.astype(np.int8), given_scale, dense
    packed = (q[:, 0::2] + 8) | ((q[:, 1::2] + 8) << 4)
    return packed.astype(np.uint8), given_scale, dense


def make_adapters(rng, slots, rank, columns, out):
    return [(rng.normal(size=(slots, rank, columns)) * 0.1).astype(np.float32),
            (rng.normal(size=(slots, out, rank)) * 0.1).astype(np.float32),
            rng.uniform(0.5, 2, slots).astype(np.float32)]


def out_of(weight):
    return (weight[0] if isinstance(weight, tuple) else weight).shape[0]


def run(x, slots, *linears):
    """Each linear: weight, weight_scale, bias, down, up, scale."""
    outputs = [(x.shape[:-1] + (out_of(one[0]),), "float32") for one in linears]
    return call("multi_lora_linear", [x, slots] + [tensor for one in linears for tensor in linear(*one)], outputs)


def expected(x, slots, dense, bias, adapters):
    x = x.astype(np.float64)
    y = x @ dense.T.astype(np.float64)
    if bias is not None:
        y = y + bias
    if adapters is not None:
        down, up, scale = (a.astype(np.float64) for a in adapters)
        for row, slot in enumerate(slots):
            if slot >= 0:
                y[row] += scale[slot] * (x[row] @ down[slot].T) @ up[slot].T
    return y


def close(got, want):
    # float32 sums: an error of a few ulps of the largest term of a row
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("kind", FORMATS)
@FEW
@given(rows=st.integers(1, 9), tokens=st.sampled_from([0, 1, 1, 2, 5, 40]), out=st.integers(1, 41),
       half=st.sampled_from([1, 3, 8, 9, 16, 17, 48, 99, 288, 700]), rank=st.sampled_from([1, 3, 8, 16, 17, 64, 256]),
       seed=st.integers(0, 9999))
def test_forward_matches_float64(kind, rows, tokens, out, half, rank, seed):
    rng = np.random.default_rng(seed)
    columns = 2 * half - (seed % 2 if "int4" not in kind else 0)
    weight, weight_scale, dense = make_weight(rng, out, columns, kind)
    adapters = make_adapters(rng, 3, rank, columns, out)
    adapters[0][2] = adapters[1][2] = adapters[2][2] = np.nan  # a slot that no row uses
    bias = rng.normal(size=out).astype(np.float32) if seed % 3 else None
    shape = (rows, columns) if tokens == 0 else (rows, tokens, columns)  # tokens 0 stands for the rank 2 form
    x = rng.normal(size=shape).astype(np.float32)
    slots = rng.integers(-1, 2, rows).astype(np.int32)
    (y,) = run(x, slots, [weight, weight_scale, bias, *adapters])
    close(y, expected(x, slots, dense, bias, adapters))
    (base,) = run(x, None, [weight, weight_scale, bias, None, None, None])
    assert np.array_equal(y[slots < 0], base[slots < 0])  # rows without adapter: bit for bit the base


@pytest.mark.parametrize("kind", ("float32", "bfloat16", "int8", "int4 grouped"))
@FEW
@given(rows=st.integers(0, 9), tokens=st.sampled_from([1, 1, 2, 40]), out=st.integers(1, 41),
       half=st.sampled_from([1, 3, 9, 17, 99, 288]), rank=st.sampled_from([1, 3, 8, 16, 17, 64, 256]),
       seed=st.integers(0, 9999))
def test_bfloat16_adapters_are_their_float32_values(kind, rows, tokens, out, half, rank, seed):
    rng = np.random.default_rng(seed)
    weight, weight_scale, _ = make_weight(rng, out, 2 * half, kind)
    down, up, scale = make_adapters(rng, 3, rank, 2 * half, out)
    short_down, short_up = to_bf16(down), to_bf16(up)
    x = rng.normal(size=(rows, tokens, 2 * half)).astype(np.float32)
    slots = rng.integers(-1, 3, rows).astype(np.int32)
    (y,) = run(x, slots, [weight, weight_scale, None, short_down, short_up, scale])
    (wide,) = run(x, slots, [weight, weight_scale, None, from_bf16(short_down), from_bf16(short_up), scale])
    assert np.array_equal(y, wide)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_is_the_same_in_any_batch(kind):
    rng = np.random.default_rng(3)
    for out, columns in ((70, 576), (13, 1536), (21, 36)):
        weight, weight_scale, _ = make_weight(rng, out, columns, kind)
        adapters = make_adapters(rng, 4, 16, columns, out)
        bias = rng.normal(size=out).astype(np.float32)
        x = rng.normal(size=(70, columns)).astype(np.float32)
        slots = rng.integers(-1, 4, 70).astype(np.int32)
        one = [weight, weight_scale, bias, *adapters]
        alone = np.concatenate([run(x[i : i + 1], slots[i : i + 1], one)[0] for i in range(70)])
        for n in [*range(1, 33), 33, 64, 70]:
            start = int(rng.integers(0, 71 - n))
            (y,) = run(x[start : start + n], slots[start : start + n], one)
            assert np.array_equal(y, alone[start : start + n]), (out, columns, n)
        (y,) = run(x[:66].reshape(2, 33, columns), np.array([2, -1], np.int32), one)
        first = run(x[5:6], np.array([2], np.int32), one)[0]
        assert np.array_equal(y[0, 5:6], first)


@pytest.mark.parametrize("kind", FORMATS)
def test_threads_do_not_change_a_bit(kind):
    rng = np.random.default_rng(4)
    weight, weight_scale, _ = make_weight(rng, 130, 576, kind)
    adapters = make_adapters(rng, 2, 8, 576, 130)
    for rows in (1, 8, 50):
        x = rng.normal(size=(rows, 576)).astype(np.float32)
        slots = rng.integers(-1, 2, rows).astype(np.int32)
        results = []
        for threads in (1, 2, 3, 5):
            set_threads(threads)
            results.append(run(x, slots, [weight, weight_scale, None, *adapters])[0])
        set_threads(2)
        assert all(np.array_equal(results[0], other) for other in results[1:])


def test_fused_linears_are_the_single_ones():
    rng = np.random.default_rng(5)
    kinds, outs = ("float32", "int4 grouped", "bfloat16", "int8"), (20, 7, 33, 64)
    for rows in (1, 5, 12, 40):
        linears = []
        for i, (kind, out) in enumerate(zip(kinds, outs)):
            weight, weight_scale, _ = make_weight(rng, out, 192, kind)
            adapters = make_adapters(rng, 3, 4 * i + 1, 192, out) if i != 2 else [None] * 3
            linears.append([weight, weight_scale, None, *adapters])
        x = rng.normal(size=(rows, 1, 192)).astype(np.float32)
        slots = rng.integers(-1, 3, rows).astype(np.int32)
        for n in range(1, 5):
            for one, y in zip(linears, run(x, slots, *linears[:n])):
                assert np.array_equal(y, run(x, slots, one)[0])


def test_a_smaller_rank_padded_with_zeros_is_the_same_adapter():
    rng = np.random.default_rng(6)
    weight, _, dense = make_weight(rng, 24, 100, "float32")
    down, up, scale = make_adapters(rng, 2, 6, 100, 24)
    wide_down, wide_up = np.zeros((2, 40, 100), np.float32), np.zeros((2, 24, 40), np.float32)
    wide_down[:, :6], wide_up[:, :, :6] = down, up
    x, slots = rng.normal(size=(3, 100)).astype(np.float32), np.array([1, -1, 0], np.int32)
    narrow = run(x, slots, [weight, None, None, down, up, scale])[0]
    wide = run(x, slots, [weight, None, None, wide_down, wide_up, scale])[0]
    close(wide, expected(x, slots, dense, None, [down, up, scale]))
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=2e-6)


def test_nothing_to_do():
    weight = np.ones((3, 4), np.float32)
    assert run(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), [weight] + [None] * 5)[0].shape == (0, 3)
    assert run(np.zeros((2, 0, 4), np.float32), None, [weight] + [None] * 5)[0].shape == (2, 0, 3)


def gradients(x, slots, linears, dys):
    inputs = [np.array([len(linears)], np.int32), x, slots]
    outputs = [(x.shape, "float32")]
    for (weight, weight_scale, down, up, scale), dy in zip(linears, dys):
        inputs += [dy, *linear(weight, weight_scale, None, down, up, scale)]
        outputs += [(() if down is None else down.shape, "float32"), (() if up is None else up.shape, "float32")]
    return call("multi_lora_linear_grad", inputs, outputs)


@pytest.mark.parametrize("kind", FORMATS)
@FEW
@given(rows=st.integers(1, 6), tokens=st.sampled_from([1, 2, 7, 30]), out=st.integers(1, 150),
       half=st.sampled_from([1, 3, 9, 17, 48, 99, 140]), rank=st.sampled_from([1, 3, 8, 16, 17, 70]),
       seed=st.integers(0, 9999))
def test_gradients_match_float64(kind, rows, tokens, out, half, rank, seed):
    rng = np.random.default_rng(seed)
    columns = 2 * half - (seed % 2 if "int4" not in kind else 0)
    x = rng.normal(size=(rows, tokens, columns)).astype(np.float32)
    slots = rng.integers(-1, 2, rows).astype(np.int32)
    linears, dys, wanted = [], [], []
    dx = np.zeros(x.shape)
    for i, with_adapters in enumerate((True, False)):
        n = out + 3 * i
        weight, weight_scale, dense = make_weight(rng, n, columns, kind)
        dy = rng.normal(size=(rows, tokens, n)).astype(np.float32)
        dx += dy.astype(np.float64) @ dense
        down, up, scale = make_adapters(rng, 3, rank, columns, n) if with_adapters else (None, None, None)
        linears.append((weight, weight_scale, down, up, scale))
        dys.append(dy)
        if not with_adapters:
            wanted += [np.zeros(()), np.zeros(())]
            continue
        down[2] = up[2] = scale[2] = np.nan  # a slot that no row uses gets zeros
        ddown, dup = np.zeros(down.shape), np.zeros(up.shape)
        for row, slot in enumerate(slots):
            if slot >= 0:
                v = scale[slot].astype(np.float64) * x[row].astype(np.float64) @ down[slot].T
                u = scale[slot].astype(np.float64) * dy[row].astype(np.float64) @ up[slot]
                dup[slot] += dy[row].T.astype(np.float64) @ v
                ddown[slot] += u.T @ x[row]
                dx[row] += u @ down[slot]
        wanted += [ddown, dup]
    for got, want in zip(gradients(x, slots, linears, dys), [dx, *wanted]):
        # Hundreds of terms of size 1 and more may cancel in the few numbers of a small case.
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max()))


@FEW
@given(reached=st.integers(0, 40), rest=st.integers(1, 40), out=st.sampled_from([1, 7, 130]),
       columns=st.sampled_from([1, 33, 140]), seed=st.integers(0, 99))
def test_tokens_at_the_end_without_a_gradient_change_nothing(reached, rest, out, columns, seed):
    """Rows of the base model behind those that are trained: dx is 0 there, and all others are equal to the last bit."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(reached + rest, columns)).astype(np.float32)
    slots = np.where(np.arange(reached + rest) < reached, rng.integers(-1, 2, reached + rest), -1).astype(np.int32)
    linears, dys = [], []
    for n in (out, out + 3):
        weight, weight_scale, _ = make_weight(rng, n, columns, "float32")
        linears.append((weight, weight_scale, *make_adapters(rng, 2, 3, columns, n)))
        dys.append(np.concatenate([rng.normal(size=(reached, n)), np.zeros((rest, n))]).astype(np.float32))
    dx, *factors = gradients(x, slots, linears, dys)
    alone_dx, *alone = gradients(x[:reached], slots[:reached], linears, [dy[:reached] for dy in dys])
    assert not dx[reached:].any()
    for got, want in zip((dx[:reached], *factors), (alone_dx, *alone)):
        np.testing.assert_array_equal(got, want)


def test_gradients_are_the_finite_differences_of_the_forward():
    rng = np.random.default_rng(8)
    weight, _, _ = make_weight(rng, 6, 10, "float32")
    down, up, scale = make_adapters(rng, 2, 3, 10, 6)
    x, slots = rng.normal(size=(3, 2, 10)).astype(np.float32), np.array([1, -1, 0], np.int32)
    dy = rng.normal(size=(3, 2, 6)).astype(np.float32)

    def loss():
        return float((run(x, slots, [weight, None, None, down, up, scale])[0].astype(np.float64) * dy).sum())

    got = gradients(x, slots, [(weight, None, down, up, scale)], [dy])
    for array, gradient in zip((x, down, up), got):
        for _ in range(6):
            at = tuple(int(rng.integers(0, n)) for n in array.shape)
            kept, step = array[at], np.float32(0.05)  # the loss is linear or quadratic in each number: no step error
            array[at] = kept + step
            above = loss()
            array[at] = kept - step
            below = loss()
            array[at] = kept
            assert abs((above - below) / (2 * step) - gradient[at]) < 2e-4


def make_product(rng, out, columns, half, three):
    """-> (inner, outer, core or None, their product in float64)."""
    rank, wide = 5, 7 if three else 5
    factors = [(rng.normal(size=shape) * 0.3).astype(np.float32)
               for shape in ((rank, columns), (out, wide), (wide, rank))]
    dense = [one.astype(np.float64) for one in factors]
    if half:
        factors = [to_bf16(one) for one in factors]
        dense = [from_bf16(one).astype(np.float64) for one in factors]
    inner, outer, core = factors
    return inner, outer, core if three else None, dense[1] @ (dense[2] @ dense[0] if three else dense[0])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("three", [False, True])
@FEW
@given(rows=st.integers(1, 9), tokens=st.sampled_from([1, 1, 5, 40]), out=st.integers(1, 41),
       columns=st.integers(1, 90),
       rank=st.sampled_from([0, 3, 16]), seed=st.integers(0, 9999))
def test_products_match_float64(half, three, rows, tokens, out, columns, rank, seed):
    """A product with adapters beside a matrix; rows without one are, bit for bit, what the factors one by one give."""
    rng = np.random.default_rng(seed)
    inner, outer, core, dense = make_product(rng, out, columns, half, three)
    adapters = make_adapters(rng, 3, rank, columns, out) if rank else None
    bias = rng.normal(size=out).astype(np.float32) if seed % 2 else None
    x, slots = rng.normal(size=(rows, tokens, columns)).astype(np.float32), rng.integers(-1, 3, rows).astype(np.int32)
    weight = make_weight(rng, 4, columns, "float32")[0]
    y, beside = call("multi_lora_linear",
                     [x, slots, *product(inner, outer, core, bias, *(adapters or ())), *linear(weight)],
                     [((rows, tokens, out), "float32"), ((rows, tokens, 4), "float32")])
    close(y, expected(x, slots, dense, bias, adapters))
    assert np.array_equal(beside, run(x, slots, [weight] + [None] * 5)[0])
    chain = run(x, None, [inner] + [None] * 5)[0]
    if three:
        chain = run(chain, None, [core] + [None] * 5)[0]
    chain = run(chain, None, [outer, None, bias, None, None, None])[0]
    plain = slots < 0 if rank else slots < 9
    assert np.array_equal(y[plain], chain[plain])


@pytest.mark.parametrize("three", [False, True])
@FEW
@given(rows=st.integers(1, 5), tokens=st.sampled_from([1, 3, 30]), out=st.integers(1, 150), columns=st.integers(1, 150),
       rank=st.sampled_from([0, 3, 17]), seed=st.integers(0, 9999))
def test_gradients_of_products_match_float64(three, rows, tokens, out, columns, rank, seed):
    rng = np.random.default_rng(seed)
    inner, outer, core, dense = make_product(rng, out, columns, False, three)
    down, up, scale = adapters = make_adapters(rng, 2, rank, columns, out) if rank else (None, None, None)
    x, slots = rng.normal(size=(rows, tokens, columns)).astype(np.float32), rng.integers(-1, 2, rows).astype(np.int32)
    dy = rng.normal(size=(rows, tokens, out)).astype(np.float32)
    outputs = [(x.shape, "float32")] + [(one.shape if rank else (), "float32") for one in (down, up)] if rank else \
        [(x.shape, "float32"), ((), "float32"), ((), "float32")]
    found = call("multi_lora_linear_grad", [np.array([1], np.int32), x, slots, dy, *product(inner, outer, core, None,
                                                                                           *adapters)], outputs)
    dx = dy.astype(np.float64) @ dense
    wanted = [np.zeros(()), np.zeros(())]
    if rank:
        wanted = [np.zeros(down.shape), np.zeros(up.shape)]
        for row, slot in enumerate(slots):
            if slot >= 0:
                u = scale[slot].astype(np.float64) * dy[row].astype(np.float64) @ up[slot]
                wanted[0][slot] += u.T @ x[row]
                wanted[1][slot] += dy[row].T.astype(np.float64) @ (scale[slot]
                                                                   * x[row].astype(np.float64) @ down[slot].T)
                dx[row] += u @ down[slot]
    for got, want in zip(found, [dx, *wanted]):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max()))


GOOD = {
    "x": np.ones((2, 1, 8), np.float32), "slots": np.array([0, -1], np.int32), "weight": np.ones((5, 8), np.float32),
    "weight_scale": None, "bias": None, "down": np.ones((2, 3, 8), np.float32),
    "up": np.ones((2, 5, 3), np.float32), "scale": np.ones(2, np.float32),
}


def inputs_of(values):
    x, slots, *operands = values.values()
    return [x, slots, *linear(*operands)]


@pytest.mark.parametrize("change, words", [
    ({"slots": np.array([0, 2], np.int32)}, ["slots", "slot 2 at index 1", "0 to 1"]),
    ({"slots": np.array([-2, 0], np.int32)}, ["slots", "slot -2 at index 0"]),
    ({"slots": np.array([0, 0, 0], np.int32)}, ["slots", "(3,)"]),
    ({"slots": np.array([0, 0], np.int64)}, ["slots", "int64", "int32"]),
    ({"x": np.ones((2, 1, 7), np.float32)}, ["weight", "(5, 8)", "7"]),
    ({"x": np.ones((2, 1, 8), np.float64)}, ["x", "float64", "float32"]),
    ({"x": np.ones((2, 1, 1, 8), np.float32)}, ["x", "rank"]),
    ({"weight": np.ones((5, 8), np.int16)}, ["weight", "int16"]),
    ({"weight": np.ones((5, 8), np.int8)}, ["weight_scale", "absent"]),
    ({"weight": np.ones((5, 4), np.uint8), "weight_scale": np.ones((5, 3), np.float32)}, ["weight_scale", "3 groups"]),
    ({"weight_scale": np.ones(5, np.float32)}, ["weight_scale", "no scale"]),
    ({"bias": np.ones(4, np.float32)}, ["bias", "(4,)", "5"]),
    ({"down": None}, ["down", "absent", "together"]),
    ({"down": np.ones((2, 3, 9), np.float32)}, ["down", "(2, 3, 9)", "8"]),
    ({"up": np.ones((2, 5, 4), np.float32)}, ["up", "(2, 5, 4)", "3"]),
    ({"up": np.ones((5, 3), np.float32)}, ["up", "(5, 3)", "slots, out, rank"]),
    ({"up": to_bf16(np.ones((2, 5, 3), np.float32))}, ["up", "bfloat16", "'down' is float32"]),
    ({"down": np.ones((2, 3, 8), np.float16)}, ["down", "float16", "bfloat16"]),
    ({"scale": np.ones(3, np.float32)}, ["scale", "(3,)", "2"]),
    ({"scale": np.ones(2, np.float64)}, ["scale", "float64"]),
])
def test_bad_arguments_are_named_and_nothing_is_written(change, words):
    given_values = inputs_of({**GOOD, **change})
    y = np.full((2, 1, 5), 7, np.float32)
    with pytest.raises(Refused) as refused:
        call("multi_lora_linear", given_values, [y])
    for word in ["multi_lora_linear", *words]:
        assert word in str(refused.value)
    assert (y == 7).all()


def test_wrong_numbers_of_tensors_and_outputs_are_refused():
    values = inputs_of(GOOD)
    with pytest.raises(Refused, match="got 7 tensors"):
        call("multi_lora_linear", values[:-1], [((2, 1, 5), "float32")])
    with pytest.raises(Refused, match="'y' has shape .*expected 5"):
        call("multi_lora_linear", values, [((2, 1, 6), "float32")])
    short = {**GOOD, "down": to_bf16(GOOD["down"]), "up": to_bf16(GOOD["up"])}
    inputs = [np.array([1], np.int32), short["x"], short["slots"], np.ones((2, 1, 5), np.float32),
              *linear(short["weight"], None, None, short["down"], short["up"], short["scale"])]
    with pytest.raises(Refused, match="down.*bfloat16"):
        call("multi_lora_linear_grad", inputs, [((2, 1, 8), "float32"), ((2, 3, 8), "float32"), ((2, 5, 3), "float32")])
    with pytest.raises(Refused, match="count.* is 0"):
        call("multi_lora_linear_grad", [np.array([0], np.int32)] + values, [((1,), "float32")] * 4)


# -- in graph mode ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def graph(mindspore, isa):
    """(mindspore, the linear module) with the CPU operators; once, not per instruction set."""
    from colora_ms.kernels import backend, linear

    if isa != ISAS[0] or backend() != "cpu":
        pytest.skip("graph mode is tested with the CPU operators, once")
    return mindspore, linear


def graph_linears(ms, rng, kinds, columns, outs, rank=5):
    """Linears as graphs take them; the second has no adapters, the first a bias."""
    from colora_ms.kernels.aot import ABSENT
    from colora_ms.kernels.operands import FORMATS, base_of, linear_of

    linears = []
    for i, (kind, out) in enumerate(zip(kinds, outs)):
        weight, weight_scale, _ = make_weight(rng, out, columns, kind)
        if kind == "bfloat16":
            tensor = ms.Tensor(from_bf16(weight)).astype(ms.bfloat16)
        else:
            tensor = ms.Tensor(weight)
        adapters = [ms.Tensor(a) for a in make_adapters(rng, 3, rank, columns, out)] if i != 1 else [ABSENT] * 3
        bias = ms.Tensor(rng.normal(size=out).astype(np.float32)) if i == 0 else ABSENT
        form = [name for name, _ in FORMATS].index(kind.split()[0])
        base = base_of(form, tensor, ABSENT if weight_scale is None else ms.Tensor(weight_scale), bias)
        linears.append(linear_of(base, *adapters))
    return tuple(linears)


def cell(ms, function, linears):
    class Net(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.linears = linears

        def construct(self, x, slots):
            return function(x, slots, *self.linears)

    return Net()


@pytest.mark.parametrize("rank", [0, 5])
def test_graph_face_and_gradient_of_a_product(graph, rank):
    """LoRA on a decomposed linear, as it is trained: x, down and up have gradients, the factors are frozen."""
    from colora_ms.kernels.aot import ABSENT
    from colora_ms.kernels.operands import FLOAT32, base_of, linear_of, product_of

    ms, linear = graph
    rng = np.random.default_rng(12)
    inner, outer, core, _ = make_product(rng, 12, 36, False, True)
    base = product_of(*(ms.Tensor(one) for one in (inner, outer, core)), ms.Tensor(np.ones(12, np.float32)))
    weight = base_of(FLOAT32, ms.Tensor(make_weight(rng, 12, 36, "float32")[0]))
    down, up, scale = [ms.Tensor(a) for a in make_adapters(rng, 3, rank, 36, 12)] if rank else [ABSENT] * 3
    x, slots = ms.Tensor(rng.normal(size=(4, 3, 36)).astype(np.float32)), ms.Tensor(np.array([0, -1, 2, 0], np.int32))

    def value_and_gradients(function):
        class Loss(ms.nn.Cell):
            def construct(self, x, slots, down, up):
                a, b = function(x, slots, linear_of(base, down, up, scale), (weight, ()))
                return (a * b * a).sum()

        return ms.value_and_grad(Loss(), (0, 2, 3))(x, slots, down, up)

    (fast, fast_grads), (slow, slow_grads) = map(value_and_gradients, (linear.multi_lora_linear,
                                                                       linear.multi_lora_linear_reference))
    np.testing.assert_allclose(fast.asnumpy(), slow.asnumpy(), rtol=1e-5)
    for got, want in list(zip(fast_grads, slow_grads))[:3 if rank else 1]:
        np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=0, atol=5e-6 * np.abs(want.asnumpy()).max())


@pytest.mark.parametrize("shape", [(4, 64), (4, 3, 64)])
def test_graph_face_equals_reference_form(graph, shape):
    ms, linear = graph
    rng = np.random.default_rng(9)
    linears = graph_linears(ms, rng, ("float32", "int8", "int4 grouped", "bfloat16"), 64, (12, 10, 7, 6))
    x = ms.Tensor(rng.normal(size=shape).astype(np.float32))
    slots = ms.Tensor(np.array([0, -1, 2, 1], np.int32))
    fast = cell(ms, linear.multi_lora_linear, linears)(x, slots)
    slow = cell(ms, linear.multi_lora_linear_reference, linears)(x, slots)
    for a, b in zip(fast, slow):
        close(a.asnumpy(), b.asnumpy())


def test_bfloat16_adapters_in_a_graph_equal_the_reference_form_and_have_no_gradient(graph):
    from colora_ms.kernels.aot import KernelError

    ms, linear = graph
    rng = np.random.default_rng(11)
    linears = [(base, tuple(one.astype(ms.bfloat16) if one.ndim == 3 else one for one in adapter))
               for base, adapter in graph_linears(ms, rng, ("float32", "int8"), 64, (12, 10))]
    x = ms.Tensor(rng.normal(size=(4, 64)).astype(np.float32))
    slots = ms.Tensor(np.array([0, -1, 2, 1], np.int32))
    net = cell(ms, linear.multi_lora_linear, tuple(linears))
    for a, b in zip(net(x, slots), cell(ms, linear.multi_lora_linear_reference, tuple(linears))(x, slots)):
        close(a.asnumpy(), b.asnumpy())

    def total(x):
        first, second = net(x, slots)
        return first.sum() + second.sum()

    with pytest.raises(KernelError, match="down.*float32 adapters where gradients are wanted"):
        ms.grad(total)(x)


def test_graph_gradients_equal_those_of_the_reference_form(graph):
    ms, linear = graph
    rng = np.random.default_rng(10)
    (first, (_, _, scale)), second, (third, (down3_, up3, scale3)) = linears = graph_linears(
        ms, rng, ("float32", "int8 grouped", "bfloat16"), 36, (12, 10, 7))
    head, = graph_linears(ms, rng, ("float32",), 12, (5,))

    def gradients_with(function):
        class Loss(ms.nn.Cell):
            def construct(self, x, slots, down, up, down3):
                a, b, c = function(x, slots, (first, (down, up, scale)), second, (third, (down3, up3, scale3)))
                d = function(a, slots, head)
                return (a * a).sum() + (b * c[:, :, :1]).sum() + (d * d * d).sum()

        class Gradient(ms.nn.Cell):
            def __init__(self):
                super().__init__()
                self.loss = Loss()
                self.gradient = ms.ops.GradOperation(get_all=True)

            def construct(self, *args):
                return self.gradient(self.loss)(*args)

        x = ms.Tensor(np.random.default_rng(1).normal(size=(4, 3, 36)).astype(np.float32))
        slots = ms.Tensor(np.array([0, -1, 2, 0], np.int32))
        return Gradient()(x, slots, *linears[0][1][:2], down3_)

    fast = gradients_with(linear.multi_lora_linear)
    slow = gradients_with(linear.multi_lora_linear_reference)
    for i in (0, 2, 3, 4):
        want = slow[i].asnumpy()
        assert np.abs(want).max() > 0.01
        np.testing.assert_allclose(fast[i].asnumpy(), want, rtol=0, atol=5e-6 * np.abs(want).max())


def test_graph_errors_reach_python(graph):
    ms, linear = graph
    from colora_ms.kernels.aot import ABSENT, KernelError, last_error
    from colora_ms.kernels.operands import flat_linears, linear_of

    rng = np.random.default_rng(11)
    linears = graph_linears(ms, rng, ("float32",), 8, (5,))
    x = ms.Tensor(np.ones((2, 8), np.float32))
    with pytest.raises(RuntimeError, match="multi_lora_linear"):
        cell(ms, linear.multi_lora_linear, linears)(x, ms.Tensor(np.array([0, 9], np.int32))).asnumpy()
    assert "slot 9 at index 1" in last_error()
    slots = ms.Tensor(np.array([0, 1], np.int32))
    with pytest.raises(KernelError, match=r"weight has shape \(5, 8\), expected 7 columns"):
        cell(ms, linear.multi_lora_linear, linears)(x[:, :7], slots)
    from colora_ms.kernels.linear_operator import _shapes

    flat = [list(one.shape) for one in flat_linears(linears)]
    with pytest.raises(KernelError, match=f"number of operands is {len(flat) + 1}"):
        _shapes([2, 8], [2], *flat[:-1])
    with pytest.raises(KernelError, match="'down', 'up' and 'scale' come together"):
        (base, (_, up, scale)), = linears
        cell(ms, linear.multi_lora_linear, (linear_of(base, ABSENT, up, scale),))(x, slots)
    with pytest.raises(KernelError, match="x has dtype Float16"):
        cell(ms, linear.multi_lora_linear, linears)(x.astype(ms.float16), slots)
    with pytest.raises(KernelError, match="weight has dtype Int8"):
        (_, tensors, bias), adapter = linears[0]
        cell(ms, linear.multi_lora_linear, (((0, (tensors[0].astype(ms.int8),), bias), adapter),))(x, slots)
