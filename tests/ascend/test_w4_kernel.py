"""w4_lora under the strict emulator against float64: the int4 weight of LR-QAT's export (arXiv 2406.06385), and an
adapter."""
import itertools

import numpy as np
import pytest

from emulated import INPUT, OUTPUT, ROUNDING, WORKSPACE, plan_w4_lora, to_float64
from lora_cases import CHIPS, CORES, LoraCase

DTYPES = ("float16", "bfloat16", "float32")


class W4Case(LoraCase):
    """A LoraCase whose y is the product with a packed weight of random nibbles."""

    def __init__(self, tokens, hidden, rank, width, dtype, groups=1, pattern="mixed", bank=4, seed=0):
        super().__init__(tokens, hidden, rank, width, dtype, pattern, bank, seed=seed)
        rng = np.random.default_rng([seed, 4, tokens, hidden, width])
        self.groups = groups
        self.weight = rng.integers(0, 256, (width, hidden // 2), dtype=np.uint8)
        self.weight_scale = (rng.uniform(0.5, 2, (width, groups)) * 0.2 * hidden ** -0.5).astype(np.float32)

    def dequantised(self):
        """(width, hidden) float64: low nibble = even column, stored as value + 8."""
        values = np.stack((self.weight & 15, self.weight >> 4), -1).reshape(len(self.weight), -1).astype(np.float64) - 8
        return values * np.repeat(self.weight_scale.astype(np.float64), values.shape[1] // self.groups, 1)

    def check(self, out, exact=False):
        """Within the rounding of y, of float32 sums, and of what the adapters' part is allowed."""
        tokens, hidden, _, width = self.shape
        x, weight, unit = to_float64(self.x, self.dtype), self.dequantised(), ROUNDING[self.dtype]
        self.y = np.zeros_like(self.y)
        delta, allowed = self.reference(exact)
        want = x @ weight.T + delta
        allowed = allowed + (np.abs(x) @ np.abs(weight.T)) * 2.0 ** -23 * (5 + np.log2(hidden)) * (1 + unit) \
            + unit * np.abs(want) + 2.0 ** -25
        got = to_float64(out, self.dtype)
        excess = np.abs(got - want) - allowed
        worst = f"worst excess {excess.max(initial=0.0)} of {self.shape} {self.dtype}"
        assert np.isfinite(got).all() and (excess <= 0).all(), worst


def launch(emulator, case, exact=False, cores=CORES, seed=0, **options):
    tokens, hidden, rank, width = case.shape
    tiling, workspace = plan_w4_lora(tokens, hidden, rank, width, case.dtype, case.groups, cores, case.bank, exact)
    out = np.full_like(case.y, 0x7777 if case.dtype == "bfloat16" else 99)
    report = emulator.launch(f"w4_lora_{case.dtype}", cores, [
        (case.x, INPUT), (case.weight, INPUT), (case.weight_scale, INPUT), (case.down, INPUT), (case.up, INPUT),
        (case.scale, INPUT), (case.slots, INPUT), (out, OUTPUT), (workspace, WORKSPACE), (tiling, INPUT)], seed,
                             **options)
    assert report["findings"] == []
    return out, report


def run(emulator, case, **options):
    out, report = launch(emulator, case, **options)
    case.check(out, options.get("exact", False))
    return report


# in, groups of a row, out: one scale a row, groups of 8 to 256 columns, groups that no tile ends with, odd widths.
SHAPES = [(64, 1, 64), (64, 8, 40), (576, 1, 192), (576, 8, 100), (576, 18, 7), (1000, 1, 1000), (1000, 5, 333),
          (1000, 25, 64),
          (30, 1, 1), (2, 1, 5), (704, 11, 257), (2080, 26, 130)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (0, 1, 2, 7, 32))
def test_matrix(emulator, tokens, dtype):
    """Shapes x tokens x dtype; ranks, slot patterns and the form of fp16 rotate over the cases."""
    ranks = itertools.cycle((1, 3, 8, 16, 24, 64, 256))
    patterns = itertools.cycle(("mixed", "none", "one", "distinct", "skewed"))
    for number, (hidden, groups, width) in enumerate(SHAPES):
        case = W4Case(tokens, hidden, next(ranks), width, dtype, groups, next(patterns), seed=number + tokens)
        run(emulator, case, exact=dtype == "float16" and number % 3 == 0, counters=False, cores=CHIPS[number % 2])


@pytest.mark.parametrize("tokens,hidden,groups,width,dtype", [
    (1, 4096, 32, 4096, "float16"), (2, 4096, 128, 512, "bfloat16"), (33, 576, 18, 576, "float16"),
    (70, 128, 1, 96, "bfloat16"),
    (5, 11008, 86, 96, "float16"), (32, 256, 2, 11008, "float16")])
def test_sizes_of_models(emulator, tokens, hidden, groups, width, dtype):
    """Rows longer than a tile, more tokens than a pass, more rows than a core's sums hold."""
    report = run(emulator, W4Case(tokens, hidden, 16, width, dtype, groups))
    if width >= 8 * CORES:
        assert report["cores_used"] == CORES


@pytest.mark.parametrize("cores", (1, 3, 40, 64))
def test_any_number_of_cores(emulator, cores):
    run(emulator, W4Case(3, 320, 8, 200, "float16", 5), cores=cores)


def test_order_of_blocks_and_the_batch_do_not_matter(emulator):
    """Equal inputs give equal bits: whatever the order of the cores, and for rows without an adapter whatever the
    others do."""
    case = W4Case(9, 576, 16, 300, "float16", 18)
    first, _ = launch(emulator, case)
    for seed in (1, 2, 3):
        assert np.array_equal(launch(emulator, case, seed=seed)[0], first)
    none = np.flatnonzero(case.slots < 0)
    assert len(none)
    case.slots[:] = -1
    assert np.array_equal(launch(emulator, case)[0][none], first[none])


def test_every_nibble_has_its_value(emulator):
    """One column at a time: y is the stored value less 8, times the scale of its group, exactly."""
    hidden, width = 32, 16
    case = W4Case(hidden, hidden, 1, width, "float32", groups=4, pattern="none")
    case.x = np.eye(hidden, dtype=np.float32)
    case.weight = (np.arange(width, dtype=np.uint8)[:, None] + 16
                   * ((np.arange(width, dtype=np.uint8)[:, None] + 5) % 16)
                   ).repeat(hidden // 2, 1)
    case.weight_scale = (np.arange(1, 5, dtype=np.float32) * 0.25)[None].repeat(width, 0).copy()
    out, _ = launch(emulator, case)
    row, column = np.meshgrid(np.arange(width), np.arange(hidden))
    stored = np.where(column % 2 == 0, row, (row + 5) % 16)
    assert np.array_equal(out, (stored - 8) * (column // 8 + 1) * 0.25)


def test_unused_adapters_do_not_reach_the_result(emulator):
    case = W4Case(5, 576, 16, 100, "float16", 9, "one", bank=4)
    case.slots[2] = -1
    case.down[:3], case.up[:3] = np.nan, np.nan
    run(emulator, case)
