"""colora_ms/kernels/ascend.py: the emulated operators inside MindSpore graphs."""
import os
import subprocess
import sys

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from colora_ms.kernels import ascend  # noqa: E402
from colora_ms.kernels.aot import KernelError  # noqa: E402
from emulated import ROOT  # noqa: E402
from lora_cases import LoraCase  # noqa: E402
from test_lily_kernel import LilyCase  # noqa: E402

ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module", autouse=True)
def loaded(emulator):
    ascend.load("CPU")


def tensor(array, dtype=None):
    """A Tensor; bfloat16 arrays are stored as uint16 here and cast exactly."""
    if dtype == "bfloat16":
        return ms.Tensor((array.astype(np.uint32) << 16).view(np.float32)).astype(ms.bfloat16)
    return ms.Tensor(array)


def stored(result, dtype):
    if dtype == "bfloat16":
        return (result.astype(ms.float32).asnumpy().view(np.uint32) >> 16).astype(np.uint16)
    return result.asnumpy()


class Linear(ms.nn.Cell):
    def construct(self, x, slots, down, up, scale, y):
        return ascend.multi_lora(x, slots, down, ascend.rank_major(up), scale, y)


class Halves(ms.nn.Cell):
    def construct(self, x, slots, down, up, scale, y):
        return ascend.lora_expand(ascend.lora_shrink(x, slots, down, scale), slots, up, y)


class Sliced(ms.nn.Cell):
    def construct(self, x, slots, down, up, scale, y, ends):
        return ascend.multi_lora(x, slots, down, up, scale, y, ends)


class Mixed(ms.nn.Cell):
    def construct(self, h, weights, slots, up, scale, y):
        return ascend.lily_mix(h, weights, slots, up, scale, y)


class Select(ms.nn.Cell):
    def construct(self, logits, rows, weights, log_alpha):
        return ascend.contrastive_token(logits, rows, weights, log_alpha)


def operands(case, swap=True):
    up = case.up.transpose(0, 2, 1).copy() if swap else case.up
    d = case.dtype
    return tensor(case.down, d), tensor(up, d), tensor(case.scale), tensor(case.y, d)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_multi_lora_in_a_graph(emulator, dtype):
    for tokens, hidden, rank, width in ((1, 576, 16, 192), (5, 1000, 3, 64)):
        case = LoraCase(tokens, hidden, rank, width, dtype)
        out = Linear()(tensor(case.x, dtype), tensor(case.slots), *operands(case))
        case.check(stored(out, dtype), exact=True)


class Exactly(ms.nn.Cell):
    def construct(self, x, slots, down, up, scale, y):
        h = ascend.lora_shrink(x, slots, down, scale)
        return ascend.lora_expand(h, slots, up, y, True), ascend.lora_expand(h, slots, up, y, exact=False)


def test_the_attribute_exact_reaches_the_operators(emulator):
    """With float32 coefficients float16 is within its narrower bound, which the rounded form exceeds."""
    case = LoraCase(5, 576, 16, 192, "float16", "distinct")
    down, up, scale, y = operands(case, swap=False)
    exactly, rounded = Exactly()(tensor(case.x), tensor(case.slots), down, up, scale, y)
    case.check(exactly.asnumpy(), exact=True)
    assert not np.array_equal(exactly.asnumpy(), rounded.asnumpy())
    mixed = LilyCase(5, 3, 16, 192, "float16")

    class Mixes(ms.nn.Cell):
        def construct(self, given):
            return ascend.lily_mix(*given, exact=True), ascend.lily_mix(*given)

    exactly, rounded = Mixes()(tuple(map(tensor, (mixed.h, mixed.weights, mixed.slots, mixed.up, mixed.scale,
                                                  mixed.y))))
    mixed.check(exactly.asnumpy(), exact=True)
    assert not np.array_equal(exactly.asnumpy(), rounded.asnumpy())


def test_rows_of_several_tokens(emulator):
    case = LoraCase(12, 576, 8, 100, "float32")
    case.slots = np.repeat(np.array([2, -1, 0], np.int32), 4)
    down, up, scale, y = operands(case)
    out = Linear()(tensor(case.x.reshape(3, 4, 576)), ms.Tensor([2, -1, 0], ms.int32), down, up, scale,
                   y.reshape((3, 4, 100)))
    assert out.shape == (3, 4, 100)
    case.check(out.asnumpy().reshape(12, 100))


@pytest.mark.parametrize("stored_as", ("float32", "bfloat16"))
def test_low_rank_in_place_of_the_reference(emulator, stored_as):
    from colora_ms.kernels.lora import low_rank_reference

    class Both(ms.nn.Cell):
        def construct(self, x, slots, down, up, scale):
            return ascend.low_rank(x, slots, down, up, scale), low_rank_reference(x, slots, down, up, scale)

    case = LoraCase(6, 96, 8, 50, "float32")
    down, up, scale, _ = operands(case)
    down, up = (one.astype(getattr(ms, stored_as)) for one in (down, up))
    for shape, slots in (((6, 96), case.slots), ((3, 2, 96), np.array([1, -1, 3], np.int32))):
        ours, reference = Both()(tensor(case.x.reshape(shape)), tensor(slots), down, up, scale)
        assert ours.shape == reference.shape and np.abs((ours - reference).asnumpy()).max() < 2e-5


def test_backend_of_a_process(emulator):
    """COLORA_KERNELS=emulator binds the device's operators, at the first look and not at import."""
    code = ("from colora_ms.kernels import ascend, backend, bound\n"
            "assert 'device_multi_lora' not in vars(bound) and not ascend.libraries_in_use()\n"
            "assert backend() == 'emulator' and all(face in vars(bound) for face in ascend._FACES)")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "COLORA_KERNELS": "emulator"},
                          capture_output=True,
                          text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def test_halves_in_a_graph(emulator):
    case = LoraCase(30, 576, 8, 100, "float16")
    down, up, scale, y = operands(case, swap=False)
    case.check(Halves()(tensor(case.x), tensor(case.slots), down, up, scale, y).asnumpy())


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_packed_linears_in_a_graph(emulator, dtype):
    case = LoraCase(5, 576, 8, 192, dtype, ends=(96, 128, 192))
    down, up, scale, y = operands(case, swap=False)
    out = Sliced()(tensor(case.x, dtype), tensor(case.slots), down, up, scale, y, tensor(case.ends))
    case.check(stored(out, dtype), exact=True)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_lily_mix_in_a_graph(emulator, dtype):
    for tokens, experts, rank, width in ((1, 4, 8, 192), (7, 3, 5, 100)):
        case = LilyCase(tokens, experts, rank, width, dtype)
        out = Mixed()(*(tensor(a) for a in (case.h, case.weights, case.slots)), tensor(case.up, dtype),
                      tensor(case.scale),
                      tensor(case.y, dtype))
        case.check(stored(out, dtype))


def test_contrastive_token_in_a_graph(emulator):
    rng = np.random.default_rng(0)
    expert, amateur = rng.standard_normal((2, 3, 5000)).astype(np.float32)
    alpha, beta = np.array([0.1, 0.5, 1.0], np.float32), np.array([0.5, 0.0, 2.0], np.float32)
    weights, rows = np.stack((1 + beta, -beta), 1), np.array([[0, 3], [1, 4], [2, 5]], np.int32)
    ints, floats = (a.asnumpy() for a in Select()(*(ms.Tensor(a) for a in (
        np.concatenate((expert, amateur)), rows, weights, np.log(alpha)))))
    token = ints[:, 0]
    score = (1 + beta[:, None]) * expert - beta[:, None] * amateur
    score = np.where(expert >= np.log(alpha)[:, None] + expert.max(1, keepdims=True), score, -np.inf)
    assert np.array_equal(token, score.argmax(1)) and np.abs(floats[:, 0] - score.max(1)).max() < 1e-5
    each = np.stack([np.take_along_axis(a, token[:, None], 1)[:, 0] for a in (expert, amateur)], 1)
    assert np.array_equal(floats[:, 2:], each) and np.array_equal(ints[:, 1], expert.argmax(1))


def test_a_loop_in_the_graph(emulator):
    """Tokens chosen step by step by the device sources inside a `while` of one static graph, two requests with two
    adapters, expert and amateur rows together; equal to the same loop in NumPy."""
    vocab, hidden, rank, steps = 300, 64, 4, 6
    rng = np.random.default_rng(7)
    table = rng.standard_normal((vocab, hidden)).astype(np.float32)
    head = rng.standard_normal((hidden, vocab)).astype(np.float32)
    down = (rng.standard_normal((2, rank, hidden)) / 8).astype(np.float32)
    up = rng.standard_normal((2, rank, vocab)).astype(np.float32)
    slots = np.array([0, 1, -1, -1], np.int32)

    class Loop(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.table, self.head = ms.Tensor(table), ms.Tensor(head)
            self.down, self.up, self.scale = ms.Tensor(down), ms.Tensor(up), ms.Tensor(np.array([2.0, 3.0], np.float32))
            self.slots = ms.Tensor(slots)
            self.rows = ms.Tensor(np.array([[0, 2], [1, 3]], np.int32))
            self.weights = ms.Tensor(np.tile(np.array([1.5, -0.5], np.float32), (2, 1)))
            self.log_alpha = ms.Tensor(np.full(2, np.log(0.1), np.float32))
            self.out = ms.Parameter(ms.Tensor(np.zeros((steps, 2), np.int32)))

        def construct(self, first):
            token, step = first, ms.Tensor(0, ms.int32)
            while step < steps:
                x = ms.ops.gather(self.table, ms.ops.concat((token, token)), 0)
                y = ms.ops.matmul(x, self.head)
                logits = ascend.multi_lora(x, self.slots, self.down, self.up, self.scale, y)
                token = ascend.contrastive_token(logits, self.rows, self.weights, self.log_alpha)[0][:, 0]
                self.out = ms.ops.scatter_update(self.out, step.reshape((1,)), token.reshape((1, 2)))
                step = step + 1
            return self.out

    got = Loop()(ms.Tensor([3, 5], ms.int32)).asnumpy()
    token = np.array([3, 5])
    for step in range(steps):
        x = table[token].astype(np.float64)
        amateur = x @ head
        expert = np.stack([amateur[r] + (2.0, 3.0)[r] * (down[r] @ x[r]) @ up[r] for r in range(2)])
        score = np.where(expert >= np.log(0.1) + expert.max(1, keepdims=True), 1.5 * expert - 0.5 * amateur, -np.inf)
        token = score.argmax(1)
        assert np.array_equal(got[step], token), step


def test_bad_arguments_are_python_errors(emulator):
    case = LoraCase(4, 64, 8, 64, "float32")
    down, up, scale, y = operands(case, swap=False)
    x, slots = tensor(case.x), tensor(case.slots)
    ends, scale = tensor(case.ends), scale.reshape((-1, 1))
    run = ascend.primitive("MultiLora", "CPU")

    class Raw(ms.nn.Cell):
        def construct(self, *given):
            return run(*given)

    with pytest.raises(KernelError, match="MultiLora: down has shape"):
        Raw()(x, down, tensor(case.up.transpose(0, 2, 1)[:, :7].copy()), scale, slots, y, ends)
    with pytest.raises(KernelError, match="MultiLora: scale has shape"):
        Raw()(x, down, up, scale[:, 0], slots, y, ends)
    with pytest.raises(RuntimeError):
        Raw()(x, down, up, scale, slots, y, ms.Tensor([63], ms.int32)).asnumpy()
    with pytest.raises(KernelError, match="MultiLora: y has dtype"):
        Raw()(x, down, up, scale, slots, y.astype(ms.float16), ends)
    with pytest.raises(KernelError, match="MultiLora: slots has dtype"):
        Raw()(x, down, up, scale, slots.astype(ms.float32), y, ends)
    with pytest.raises(RuntimeError):
        Raw()(x, down, up, scale, ms.Tensor([0, 1, 4, 0], ms.int32), y, ends).asnumpy()
    mix = ascend.primitive("LilyMix", "CPU")

    class RawMix(ms.nn.Cell):
        def construct(self, *given):
            return mix(*given, False)

    case = LilyCase(4, 3, 8, 64, "float32")
    good = [tensor(a) for a in (case.h, case.weights, case.up, case.scale, case.slots, case.y)]
    assert RawMix()(*good).shape == (4, 64)
    for place, value, message in ((1, good[1][:, :2], "up has shape"), (0, good[0].astype(ms.float16), "h has dtype"),
                                  (3, good[3][:2], "scale has shape")):
        with pytest.raises(KernelError, match=f"LilyMix: {message}"):
            RawMix()(*good[:place], value, *good[place + 1:])
    with pytest.raises(RuntimeError):
        RawMix()(*good[:4], ms.Tensor([0, 1, 3, 0], ms.int32), good[5]).asnumpy()


def test_missing_package_says_what_to_do(monkeypatch):
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", "/nowhere")
    with pytest.raises(KernelError, match="build.sh"):
        ascend.find_package()
    monkeypatch.setenv("COLORA_EMULATOR_LIBRARY", "/nowhere.so")
    with pytest.raises(KernelError, match="/nowhere.so"):
        ascend.emulator_library()


@pytest.mark.parametrize("sampled", (False, True))
def test_selection_by_the_operator_is_the_reference(emulator, sampled):
    """All kinds of requests in one graph: alone, a contrast, mixes with and without a cut, inactive; and with those
    that need the distribution among them."""
    from colora_ms.kernels.options import COLUMN, OptionRows
    from colora_ms.kernels.select import _with_device_token, contrastive_select_reference

    rng = np.random.default_rng(11)
    logits = (rng.standard_normal((9, 700)) * 3).astype(np.float32)
    logits[:, rng.integers(0, 700, 300)] = -np.inf
    options = OptionRows(6)
    for q, (rows, weights, mixing, cut) in enumerate((
            ([0], [], 0, 1), ([1, 2], [], 0, 1), ([3, 4, 5], [0.5, 1.0, -0.25], 1, 0),
            ([6, 7, 8], [2.0, 0.0, -1.0], 1, 1), ([], [], 0, 1),
            ([2, 0], [0.5, 0.5], 2 if sampled else 1, 2 * sampled))):
        options.mix_rows[q, :len(rows)] = rows
        options.mix_weights[q, :len(weights)] = weights
        options.whole[q, COLUMN["mixing"]], options.whole[q, COLUMN["cut"]] = mixing, cut
        options.real[q, COLUMN["alpha"]], options.real[q, COLUMN["beta"]] = 0.1, 0.5
    options.real[0, COLUMN["temperature"]] = 0.7 * sampled

    class Both(ms.nn.Cell):
        def construct(self, *given):
            return _with_device_token(*given), contrastive_select_reference(*given)

    ours, reference = Both()(*(ms.Tensor(a) for a in (logits, options.whole, options.real, options.mix_rows,
                                                      options.mix_weights, np.full(6, 0.4, np.float32))))
    assert np.array_equal(ours[0].asnumpy(), reference[0].asnumpy())
    assert np.abs(ours[1].asnumpy() - reference[1].asnumpy()).max() < 1e-5
