"""lily_mix under the strict emulator against float64 (Lily, arXiv 2407.09946): the mixed up factor, formed in full
here."""
import itertools

import numpy as np
import pytest

from emulated import INOUT, INPUT, OUTPUT, ROUNDING, WORKSPACE, plan_lily_mix, to_dtype, to_float64
from lora_cases import CHIPS, CORES, slots_for

DTYPES = ("float16", "bfloat16", "float32")


class LilyCase:
    """Random hidden rows, router weights that sum to 1, and experts (slots, experts, rank, width)."""

    def __init__(self, tokens, experts, rank, width, dtype, pattern="mixed", bank=3, row_width=None, offset=0, seed=0):
        rng = np.random.default_rng([seed, tokens, experts, rank, width])
        self.shape, self.dtype, self.bank, self.offset = (tokens, experts, rank, width), dtype, bank, offset
        self.row_width = row_width or width
        self.h = rng.standard_normal((tokens, rank)).astype(np.float32)
        logits = rng.standard_normal((tokens, experts)) * 2
        self.weights = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
        self.up = to_dtype(rng.standard_normal((bank, experts, rank, width)), dtype)
        self.scale = rng.uniform(0.25, 2, bank).astype(np.float32)
        self.slots = slots_for(pattern, tokens, bank, rng)
        self.y = to_dtype(rng.standard_normal((tokens, self.row_width)), dtype)

    def check(self, out, exact=False):
        tokens, experts, rank, width = self.shape
        want = to_float64(self.y, self.dtype)
        allowed, columns = np.zeros_like(want), slice(self.offset, self.offset + width)
        unit, up = ROUNDING[self.dtype], to_float64(self.up, self.dtype)
        for t in np.flatnonzero(self.slots >= 0):
            s = self.slots[t]
            mixed = np.einsum("e,erw->rw", self.weights[t].astype(np.float64), up[s])
            want[t, columns] += float(self.scale[s]) * (self.h[t].astype(np.float64) @ mixed)
            coefficients = float(self.scale[s]) * self.weights[t, :, None].astype(np.float64) * self.h[t]
            terms = np.einsum("er,erw->w", np.abs(coefficients), np.abs(up[s]))
            error = (terms + np.abs(want[t, columns])) * 2.0 ** -23 * (experts * rank + 4)
            if self.dtype == "float16" and not exact:  # coefficients below the range of float16 lose more than a unit
                largest = np.abs(coefficients).max(1)
                error += terms * 2.0 ** -11 + (largest * 2.0 ** -20) @ np.abs(up[s]).sum(1)
            allowed[t, columns] = error * (1 + unit) + unit * np.abs(want[t, columns]) + 2.0 ** -25
        got = to_float64(out, self.dtype)
        excess = np.abs(got - want) - allowed
        worst = f"worst excess {excess.max(initial=0.0)} of {self.shape} {self.dtype}"
        assert np.isfinite(got).all() and (excess <= 0).all(), worst
        assert np.array_equal(got[allowed == 0], want[allowed == 0]), "columns or rows outside the slice changed"


def launch(emulator, case, exact=False, in_place=True, cores=CORES, seed=0, **options):
    tokens, experts, rank, width = case.shape
    tiling, workspace = plan_lily_mix(tokens, experts, rank, width, case.dtype, cores, case.row_width, case.offset,
                                      case.bank, exact)
    y = case.y.copy()
    out = y if in_place else np.full_like(y, 0x7777 if case.dtype == "bfloat16" else 99)
    kinds = (INOUT, INOUT) if in_place else (INPUT, OUTPUT)
    report = emulator.launch(f"lily_mix_{case.dtype}", cores, [
        (case.h, INPUT), (case.weights, INPUT), (case.up, INPUT), (case.scale, INPUT), (case.slots, INPUT),
        (y, kinds[0]),
        (out, kinds[1]), (workspace, WORKSPACE), (tiling, INPUT)], seed, **options)
    assert report["findings"] == []
    return out, report


# experts, rank, width
SHAPES = [(4, 8, 576), (4, 16, 1000), (2, 3, 64), (5, 1, 77), (1, 24, 192), (8, 64, 130), (3, 128, 300), (4, 256, 200),
          (16, 32, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (0, 1, 2, 7, 32))
def test_matrix(emulator, tokens, dtype):
    """Shapes x tokens x dtype; slot patterns, the layout of y and the form of fp16 rotate over the cases."""
    patterns = itertools.cycle(("mixed", "none", "one", "distinct", "skewed"))
    for number, (experts, rank, width) in enumerate(SHAPES):
        case = LilyCase(tokens, experts, rank, width, dtype, next(patterns), row_width=width + 30 * (number % 2),
                        offset=9 * (number % 2), seed=number + tokens)
        out, _ = launch(emulator, case, exact=dtype == "float16" and number % 3 == 0, in_place=number % 4 < 2,
                        counters=False, cores=CHIPS[number % 2])
        case.check(out, exact=dtype == "float16" and number % 3 == 0)


@pytest.mark.parametrize("tokens,experts,rank,width,dtype", [
    (1, 4, 16, 4096, "float16"), (1, 4, 16, 4096, "bfloat16"), (70, 4, 8, 1536, "float16"),
    (2, 2, 16, 11008, "float32")])
def test_sizes_of_models(emulator, tokens, experts, rank, width, dtype):
    """All cores are busy at one token; more tokens than a pass."""
    case = LilyCase(tokens, experts, rank, width, dtype, "one")
    out, report = launch(emulator, case)
    case.check(out)
    assert report["cores_used"] == CORES or tokens > 1


@pytest.mark.parametrize("cores", (1, 5, 40, 64))
def test_any_number_of_cores(emulator, cores):
    case = LilyCase(6, 3, 8, 500, "float16")
    out, _ = launch(emulator, case, cores=cores)
    case.check(out)


def test_router_weights_of_any_size(emulator):
    """An expert with weight 0 gives nothing, a dominant one everything, and tiny ones do not overflow or vanish."""
    case = LilyCase(3, 4, 16, 300, "float16", "one")
    case.weights[:] = ((0, 1, 0, 0), (1e-6, 1 - 1e-6, 0, 0), (30000, -30000, 1, 1e-3))
    case.up = (case.up.astype(np.float32) / 64).astype(np.float16)
    out, _ = launch(emulator, case)
    case.check(out)


def test_equals_one_expansion_of_all_ranks(emulator):
    """With one expert of weight 1 and scale 1 it is lora_expand, bit for bit."""
    from emulated import plan_lora

    case = LilyCase(5, 1, 16, 576, "float16")
    case.weights[:], case.scale[:] = 1, 1
    ours, _ = launch(emulator, case)
    tiling, workspace = plan_lora(5, 1, 16, 576, "float16", slots=case.bank)
    y = case.y.copy()
    report = emulator.launch("lora_expand_float16", CORES, [
        (case.h, INPUT), (np.ascontiguousarray(case.up[:, 0]), INPUT), (case.slots, INPUT), (y, INOUT), (y, INOUT),
        (workspace, WORKSPACE), (tiling, INPUT)])
    assert report["findings"] == [] and np.array_equal(ours, y)


def test_unused_experts_do_not_reach_the_result(emulator):
    case = LilyCase(5, 3, 8, 100, "float16", "one")
    case.slots[2], case.y[2, 5] = -1, np.inf
    case.up[:2], case.h[2], case.weights[2] = np.nan, np.nan, np.nan
    out, _ = launch(emulator, case)
    assert np.isinf(out[2, 5])
    out[2, 5] = case.y[2, 5] = 0
    case.check(out)
