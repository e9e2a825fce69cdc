"""contrastive_select under the strict emulator against NumPy float64 (scoring rule of arXiv 2505.14620)."""
import math

import numpy as np
import pytest

from emulated import INPUT, OUTPUT, WORKSPACE, to_dtype, to_float64


def plan(rows, vocab, mask_rows, cores):
    parts = max(1, min(cores // math.gcd(rows or 1, cores), -(-vocab // 1024)))
    width = -(-(-(-vocab // parts)) // 64) * 64
    parts = -(-vocab // width)
    return np.array([rows, vocab, cores, parts, width, mask_rows],
                    np.uint32), np.empty(max(rows, 1) * parts * 64, np.uint8)


def launch(emulator, expert, amateur, alpha, beta, mask, dtype, cores=48, seed=0):
    rows, vocab = expert.shape
    tiling, workspace = plan(rows, vocab, 0 if mask is None else len(mask), cores)
    token = np.full(rows, -77, np.int32)
    mask = np.zeros(0, np.float32) if mask is None else mask.astype(np.float32)
    report = emulator.launch(f"contrastive_select_{dtype}", cores, [
        (expert, INPUT), (amateur, INPUT), (np.log(np.float32(alpha)).astype(np.float32), INPUT),
        (np.asarray(beta, np.float32), INPUT), (mask, INPUT), (token, OUTPUT), (workspace, WORKSPACE), (tiling, INPUT)],
                             seed)
    assert report["findings"] == []
    return token


def scores(expert, amateur, alpha, beta, mask=None):
    expert = expert + (0 if mask is None else mask)
    cut = np.log(np.asarray(alpha, np.float32)).astype(np.float64)[:, None] + expert.max(1, keepdims=True)
    beta = np.asarray(beta, np.float64)[:, None]
    with np.errstate(invalid="ignore"):
        mixed = (1 + beta) * expert - np.where(beta == 0, 0, beta * amateur)
    return np.where(expert >= cut, mixed, -np.inf), expert - cut


def check(token, expert, amateur, alpha, beta, mask=None, slack=2e-5):
    """The chosen token is allowed and as good as the best, up to float32 rounding; tokens within rounding of the cut
    may count either way."""
    value, margin = scores(expert, amateur, alpha, beta, mask)
    sure = np.where(np.abs(margin) < slack, -np.inf, value)
    rows = np.arange(len(token))
    assert (0 <= token).all() and (token < expert.shape[1]).all()
    assert (margin[rows, token] >= -slack).all(), "a token below the cut was chosen"
    best = sure.max(1)
    loose = (1 + np.asarray(beta)) * np.asarray(expert + (0 if mask is None else mask))[rows, token] \
        - np.where(np.asarray(beta) == 0, 0, np.asarray(beta) * amateur[rows, token])
    assert (loose >= best - slack * (1 + np.abs(best))).all(), "a better token exists"


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("rows,vocab",
                         [(1, 49152), (1, 262144), (3, 151936), (16, 32000), (50, 5000), (7, 1), (2, 63), (5, 1025),
                          (0, 100)])
def test_against_numpy(emulator, dtype, rows, vocab):
    rng = np.random.default_rng([rows, vocab])
    expert = to_dtype(rng.standard_normal((rows, vocab)) * 3, dtype)
    amateur = to_dtype(rng.standard_normal((rows, vocab)) * 3, dtype)
    alpha, beta = rng.uniform(0.01, 1, rows), rng.uniform(0, 1, rows).astype(np.float32)
    mask = None if rows % 2 else np.where(rng.random((max(rows, 1), vocab)) < 0.3, -np.inf,
                                          0.5).astype(np.float32)[:rows]
    if mask is not None and rows:
        mask[:, vocab // 2] = 0.0
    token = launch(emulator, expert, amateur, alpha, beta, mask, dtype, cores=(48, 40)[vocab % 2])
    if rows:
        check(token, to_float64(expert, dtype), to_float64(amateur, dtype), alpha, beta, mask)


def test_vectors_of_the_paper_notes(emulator):
    """The worked example: greedy gives 0, the contrast gives 1; alpha = 1 and beta = 0 give 0."""
    expert = np.tile(np.array([2.0, 1.5, 0.5, -1.0], np.float32), (4, 1))
    amateur = np.tile(np.array([2.5, 0.2, 0.4, -1.0], np.float32), (4, 1))
    token = launch(emulator, expert, amateur, [0.5, 1.0, 0.5, 1.0], [0.5, 0.5, 0.0, 9.0], None, "float32")
    assert token.tolist() == [1, 0, 0, 0]


def test_ties_go_to_the_smallest_token(emulator):
    """Within a repeat, across tiles, across cores."""
    for vocab in (100, 30000, 262144):
        expert = np.zeros((3, vocab), np.float32)
        expert[1, [vocab - 1, vocab // 2, vocab // 3]] = 4.0
        expert[2, [vocab - 1, 70]] = 4.0
        token = launch(emulator, expert, np.zeros_like(expert), [0.1] * 3, [0.5] * 3, None, "float32")
        assert token.tolist() == [0, vocab // 3, 70]


def test_beta_zero_is_greedy_even_where_the_amateur_is_infinite(emulator):
    rng = np.random.default_rng(0)
    expert = rng.standard_normal((5, 9000)).astype(np.float32)
    amateur = np.full_like(expert, -np.inf)
    token = launch(emulator, expert, amateur, [0.1] * 5, [0.0] * 5, None, "float32")
    assert np.array_equal(token, expert.argmax(1))


def test_alpha_one_is_the_experts_choice(emulator):
    rng = np.random.default_rng(1)
    expert = rng.standard_normal((5, 9000)).astype(np.float32)
    token = launch(emulator, expert, expert[::-1].copy(), [1.0] * 5, [0.8] * 5, None, "float32")
    assert np.array_equal(token, expert.argmax(1))


def test_masks(emulator):
    """One mask for all, a mask of -inf everywhere (token 0), and expert logits that are -inf already."""
    rng = np.random.default_rng(2)
    expert = rng.standard_normal((4, 3000)).astype(np.float32)
    amateur = rng.standard_normal((4, 3000)).astype(np.float32)
    one = np.zeros((1, 3000), np.float32)
    one[0, np.unique(expert.argmax(1))] = -np.inf
    token = launch(emulator, expert, amateur, [0.3] * 4, [0.5] * 4, one, "float32")
    check(token, expert.astype(np.float64), amateur.astype(np.float64), [0.3] * 4, [0.5] * 4, one)
    nothing = launch(emulator, expert, amateur, [0.3] * 4, [0.5] * 4, np.full((4, 3000), -np.inf), "float32")
    assert nothing.tolist() == [0, 0, 0, 0]
    expert[:, 1:] = -np.inf
    amateur[:, 5:] = -np.inf
    assert launch(emulator, expert, amateur, [0.3] * 4, [0.5] * 4, None, "float32").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("cores", (1, 7, 40, 48))
def test_any_number_of_cores(emulator, cores):
    rng = np.random.default_rng(3)
    expert = rng.standard_normal((6, 20000)).astype(np.float32)
    amateur = rng.standard_normal((6, 20000)).astype(np.float32)
    first = launch(emulator, expert, amateur, [0.2] * 6, [0.5] * 6, None, "float32", cores, seed=cores)
    check(first, expert.astype(np.float64), amateur.astype(np.float64), [0.2] * 6, [0.5] * 6)
