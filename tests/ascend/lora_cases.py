"""Cases of the LoRA operators: data, the float64 reference, the allowed rounding, and one launch."""
import numpy as np

from emulated import BYTES, INOUT, INPUT, OUTPUT, ROUNDING, WORKSPACE, plan_multi_lora, to_dtype, to_float64

CORES = 48
CHIPS = (48, 40)  # vector cores of a 910B1, B2, 910_93 and of a 910B3, B4


def slots_for(pattern, tokens, bank, rng):
    """none: all -1; one: a single adapter; distinct: round robin; skewed: mostly one; mixed: random with -1."""
    if pattern == "none":
        return np.full(tokens, -1, np.int32)
    if pattern == "one":
        return np.full(tokens, bank - 1, np.int32)
    if pattern == "distinct":
        return (np.arange(tokens) % bank).astype(np.int32)
    if pattern == "skewed":
        return np.where(rng.random(tokens) < 0.8, 0, rng.integers(-1, bank, tokens)).astype(np.int32)
    return rng.integers(-1, bank, tokens).astype(np.int32)


class LoraCase:
    """Random data for one shape. Values have the sizes that a model has: x about 1, x . down about 1, up about 1.
    ends: where the slices of the outputs end; one slice, of all columns, if not given."""

    def __init__(self, tokens, hidden, rank, width, dtype, pattern="mixed", bank=4, ends=None, seed=0):
        rng = np.random.default_rng([seed, tokens, hidden, rank, width])
        self.shape = (tokens, hidden, rank, width)
        self.dtype, self.bank = dtype, bank
        self.ends = np.array([width] if ends is None else ends, np.int32)
        def normal(*shape, scale=1.0):
            return to_dtype(rng.standard_normal(shape, np.float32) * np.float32(scale), dtype)
        self.x = normal(tokens, hidden)
        self.down = normal(bank, len(self.ends) * rank, hidden, scale=hidden ** -0.5)
        self.up = normal(bank, rank, width)
        self.scale = rng.uniform(0.25, 2.0, (bank, len(self.ends))).astype(np.float32)
        if ends is None:
            self.scale = self.scale[:, 0].copy()
        self.slots = slots_for(pattern, tokens, bank, rng)
        self.y = normal(tokens, width)
        self.seed = seed

    def products(self):
        """float64 x . down[slot]^T, zeros without an adapter, and the sum of absolute terms beside it."""
        tokens, rows = self.shape[0], self.down.shape[1]
        h, size = np.zeros((tokens, rows)), np.zeros((tokens, rows))
        x, down = to_float64(self.x, self.dtype), to_float64(self.down, self.dtype)
        for s in range(self.bank):
            rows = self.slots == s
            if rows.any():
                h[rows] = x[rows] @ down[s].T
                size[rows] = np.abs(x[rows]) @ np.abs(down[s].T)
        return h, size

    def reference(self, exact=False, h=None, h_error=None):
        """(float64 result, allowed error). The allowance is rounding only: the last rounding of y, the rounding of the
        coefficients to float16 where that is done, and float32 sums."""
        tokens, hidden, rank, width = self.shape
        want = to_float64(self.y, self.dtype).copy()
        if h is None:
            h, size = self.products()
            h_error = size * 2.0 ** -23 * (4 + np.log2(hidden + 1))
        up = to_float64(self.up, self.dtype)
        allowed = np.zeros_like(want)
        scales = self.scale.reshape(self.bank, -1).astype(np.float64)
        for s in range(self.bank):
            rows = self.slots == s
            if not rows.any():
                continue
            for i, end in enumerate(self.ends):
                columns, ranks = slice(self.ends[i - 1] if i else 0, end), slice(i * rank, (i + 1) * rank)
                scale, part = scales[s, i], up[s][:, columns]
                coefficients = h[rows, ranks] * scale
                delta, terms = coefficients @ part, np.abs(coefficients) @ np.abs(part)
                want[rows, columns] += delta
                error = terms * 2.0 ** -23 * (rank + 4) + (h_error[rows, ranks] * scale) @ np.abs(part)
                if self.dtype == "float16" and not exact:
                    largest = np.abs(coefficients).max(axis=1, keepdims=True)
                    error += terms * 2.0 ** -11 + (largest * 2.0 ** -20) @ np.abs(part).sum(0, keepdims=True)
                allowed[rows, columns] = error
        unit = ROUNDING[self.dtype]
        touched = allowed > 0
        allowed = np.where(touched, allowed * (1 + unit) + unit * np.abs(want) + 2.0 ** -25, 0.0)
        return want, allowed

    def check(self, out, exact=False, **given):
        want, allowed = self.reference(exact, **given)
        got = to_float64(out, self.dtype)
        excess = np.abs(got - want) - allowed
        assert np.isfinite(got).all() and (excess <= 0).all(), \
            f"worst excess {excess.max()} of {self.shape} {self.dtype}"
        untouched = allowed == 0
        assert np.array_equal(got[untouched], want[untouched]), "columns or rows outside the slice changed"


def launch_lora(emulator, case, in_place=True, cores=CORES, seed=0, **launch):
    """One multi_lora launch; returns (out, report)."""
    tokens, hidden, rank, width = case.shape
    tiling, workspace = plan_multi_lora(tokens, hidden, rank, width, case.dtype, cores, case.bank, len(case.ends))
    y = case.y.copy()
    out = y if in_place else np.full_like(y, 0x7777 if case.dtype == "bfloat16" else 99)
    kinds = (INOUT, INOUT) if in_place else (INPUT, OUTPUT)
    report = emulator.launch(f"multi_lora_{case.dtype}", cores, [
        (case.x, INPUT), (case.down, INPUT), (case.up, INPUT), (case.scale, INPUT), (case.slots, INPUT), (y, kinds[0]),
        (case.ends, INPUT), (out, kinds[1]), (workspace, WORKSPACE), (tiling, INPUT)], seed, **launch)
    return out, report


def minimum_bytes(case, distinct):
    """What any kernel must move: x, slots, the down and up of each adapter in use once, scale, y in and out."""
    tokens, hidden, rank, width = case.shape
    live = int((case.slots >= 0).sum())
    size = BYTES[case.dtype]
    return live * (hidden + 2 * width) * size + distinct * (rank * (hidden + width) * size + 4) + tokens * 4


def distinct_adapters(case):
    return len(set(case.slots[case.slots >= 0].tolist()))
