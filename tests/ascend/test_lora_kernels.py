"""The LoRA kernels under the strict emulator against float64."""
import hashlib
import itertools

import numpy as np
import pytest

from emulated import INOUT, INPUT, OUTPUT, WORKSPACE, plan_lora
from lora_cases import CHIPS, LoraCase, launch_lora

RANKS = (1, 3, 8, 16, 24, 32, 64, 128, 256)
HIDDEN = (64, 576, 1000, 4096, 11008)
TOKENS = (0, 1, 2, 7, 32, 300)
DTYPES = ("float16", "bfloat16")
PATTERNS = ("mixed", "none", "one", "distinct", "skewed")


def run(emulator, case, **options):
    out, report = launch_lora(emulator, case, **options)
    assert report["findings"] == []
    case.check(out, exact=True)


def pick(patterns, *key):
    """A choice that is fixed for a case and spread over the matrix."""
    return patterns[hashlib.sha256(repr(key).encode()).digest()[0] % len(patterns)]


@pytest.mark.parametrize("rank", RANKS)
def test_matrix(emulator, rank):
    """rank x hidden x tokens x dtype; the slot pattern, the place of the result and the chip's cores rotate over the
    cases."""
    for hidden, tokens, dtype in itertools.product(HIDDEN, TOKENS, DTYPES):
        pattern = pick(PATTERNS, rank, hidden, tokens, dtype)
        in_place = pick((True, False), "place", rank, hidden, tokens, dtype)
        case = LoraCase(tokens, hidden, rank, hidden, dtype, pattern, seed=1)
        run(emulator, case, in_place=in_place, counters=False, cores=pick(CHIPS, "cores", rank, hidden, tokens, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rank", RANKS)
def test_matrix_in_full(emulator, rank, pattern):
    for hidden, tokens, dtype in itertools.product(HIDDEN, TOKENS, DTYPES):
        for in_place in (True, False):
            run(emulator, LoraCase(tokens, hidden, rank, hidden, dtype, pattern, seed=2), in_place=in_place,
                counters=False)


@pytest.mark.parametrize("dtype", DTYPES + ("float32",))
@pytest.mark.parametrize("hidden,ends", [
    (576, (576, 768, 960)), (4096, (4096, 5120, 6144)), (576, (1536, 3072)), (100, (7,)), (33, (1, 50)),
    (16, (5000, 5003)), (1000, (64, 65, 130, 131, 196, 197, 300, 301))])
def test_slices(emulator, dtype, hidden, ends):
    """Packed q, k, v and gate, up, tensor-parallel shards: in not equal to out, slices of unequal width, unaligned."""
    for tokens, rank, in_place in ((1, 8, True), (9, 5, False), (65, 16, True), (70, 3, False)):
        case = LoraCase(tokens, hidden, rank, ends[-1], dtype, ends=ends, seed=3)
        run(emulator, case, in_place=in_place)


@pytest.mark.parametrize("tokens,rank,slices", [(3, 170, 3), (2, 256, 2), (1, 64, 8), (40, 40, 3)])
def test_many_rows_of_down(emulator, tokens, rank, slices):
    """More coefficients than rows of partial sums."""
    case = LoraCase(tokens, 1000, rank, 480, "float16", ends=[480 // slices * (i + 1) for i in range(slices)], seed=4)
    run(emulator, case)


def test_slices_equal_linears_of_their_own(emulator):
    """A packed call gives the bits of one call for each of its linears where the cores take the same columns of x."""
    case = LoraCase(5, 576, 16, 320, "float16", ends=(128, 192, 320))
    packed, _ = launch_lora(emulator, case)
    for i, (begin, end) in enumerate(((0, 128), (128, 192), (192, 320))):
        own = LoraCase(5, 576, 16, end - begin, "float16")
        own.x, own.slots, own.y = case.x, case.slots, case.y[:, begin:end].copy()
        own.down, own.up = case.down[:, i * 16:(i + 1) * 16].copy(), case.up[:, :, begin:end].copy()
        own.scale = case.scale[:, i].copy()
        assert np.array_equal(launch_lora(emulator, own)[0], packed[:, begin:end])


@pytest.mark.parametrize("cores", (1, 2, 20, 40, 48, 64))
def test_any_number_of_cores(emulator, cores):
    for tokens, hidden, dtype in ((1, 1000, "float16"), (67, 576, "bfloat16"), (5, 64, "float32")):
        run(emulator, LoraCase(tokens, hidden, 24, 200, dtype, bank=7), cores=cores)


def test_order_of_blocks_does_not_matter(emulator):
    """Equal inputs give equal bits, whatever the order in which the cores run."""
    case = LoraCase(33, 1000, 16, 1000, "float16", bank=6)
    first, _ = launch_lora(emulator, case)
    for seed in range(1, 6):
        out, report = launch_lora(emulator, case, seed=seed)
        assert np.array_equal(out, first) and report["findings"] == []


def test_many_adapters(emulator):
    """More adapters than cores, and every token its own."""
    run(emulator, LoraCase(64, 576, 16, 576, "float16", "distinct", bank=64))
    run(emulator, LoraCase(130, 576, 8, 576, "bfloat16", "distinct", bank=130))


def test_slots_outside_the_bank_are_skipped(emulator):
    case = LoraCase(6, 576, 16, 576, "float16", bank=3)
    case.slots = np.array([0, 3, 2, -7, 2 ** 31 - 1, 1], np.int32)
    out, report = launch_lora(emulator, case)
    assert report["findings"] == []
    case.check(out, exact=True)


def test_other_rows_are_untouched_bit_for_bit(emulator):
    """NaN and infinity in the rows of the amateur and in adapters that nobody uses stay where they are."""
    case = LoraCase(5, 576, 16, 576, "float16", bank=4)
    case.slots = np.array([1, -1, 1, -1, 1], np.int32)
    case.x[1] = np.nan
    case.y[3] = np.inf
    case.down[[0, 2, 3]] = np.nan
    out, report = launch_lora(emulator, case)
    assert report["findings"] == []
    assert np.array_equal(out[[1, 3]], case.y[[1, 3]])
    assert np.isfinite(out[[0, 2, 4]]).all()


@pytest.mark.parametrize("size", (1e-7, 1e-3, 30.0, 900.0))
def test_coefficients_of_any_size(emulator, size):
    """x . down may leave the range of fp16 (65504)."""
    for factor in (1.0, 60.0):
        case = LoraCase(3, 4096, 16, 576, "float16", "one", seed=5)
        case.x = (case.x.astype(np.float32) * min(size, 60.0)).astype(np.float16)
        case.down = (case.down.astype(np.float32) * factor * max(size / 60.0, 1.0)).astype(np.float16)
        case.up = (case.up.astype(np.float32) / max(size * factor, 1.0) / 8).astype(np.float16)
        run(emulator, case)


# ---- the two halves alone ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES + ("float32",))
@pytest.mark.parametrize("tokens,hidden,rank,width",
                         [(1, 4096, 16, 4096), (7, 1000, 3, 64), (70, 576, 24, 100), (2, 64, 256, 576),
                                                       (0, 64, 8, 64)])
def test_shrink_then_expand(emulator, dtype, tokens, hidden, rank, width):
    case, cores = LoraCase(tokens, hidden, rank, width, dtype), pick(CHIPS, tokens, hidden, dtype)
    tiling, workspace = plan_lora(tokens, hidden, rank, width, dtype, cores, slots=case.bank)
    h = np.full((tokens, rank), np.nan, np.float32)
    report = emulator.launch(f"lora_shrink_{dtype}", cores, [
        (case.x, INPUT), (case.down, INPUT), (case.scale, INPUT), (case.slots, INPUT), (h, OUTPUT),
        (workspace, WORKSPACE), (tiling, INPUT)])
    assert report["findings"] == []
    want, size = case.products()
    factor = np.where(case.slots >= 0, case.scale[np.maximum(case.slots, 0)], 0.0)[:, None]
    want, size = want * factor, size * factor
    assert (np.abs(h - want) <= size * 2.0 ** -23 * (4 + np.log2(hidden + 1))).all()

    y = case.y.copy()
    report = emulator.launch(f"lora_expand_{dtype}", cores, [
        (h, INPUT), (case.up, INPUT), (case.slots, INPUT), (y, INOUT), (y, INOUT),
        (workspace, WORKSPACE), (tiling, INPUT)])
    assert report["findings"] == []
    case.scale[:] = 1.0  # it is in h already
    case.check(y, h=h.astype(np.float64), h_error=np.zeros((tokens, rank)))


def test_rank_padding_changes_nothing(emulator):
    """An adapter of rank 5 in a bank of rank 16, filled up with zeros, gives the same as rank 5 alone."""
    small = LoraCase(9, 576, 5, 576, "float16")
    large = LoraCase(9, 576, 16, 576, "float16")
    large.x, large.y, large.scale, large.slots = small.x, small.y, small.scale, small.slots
    large.down[:], large.up[:] = 0, 0
    large.down[:, :5], large.up[:, :5] = small.down, small.up
    assert np.array_equal(launch_lora(emulator, small)[0], launch_lora(emulator, large)[0])
