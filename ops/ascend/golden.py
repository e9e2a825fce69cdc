"""Golden cases for an NPU: inputs and float64 results of every operator in every dtype, written as .npz files.

    python ops/ascend/golden.py FOLDER [--small]

run_golden.py runs them. --small: the smallest case of each operator and dtype. Every bank holds a slot that no token
uses, full of NaN: a kernel that reads it shows. In banks of rank 16 one adapter has rank 8: the unused rows of ``down``
are zero, those of ``up`` any numbers. Some tokens have no adapter: their ``y`` must come back to the bit.
"""
import argparse
from pathlib import Path

import numpy as np

ROUNDING = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8, "float32": 2.0 ** -24}
DTYPES = tuple(ROUNDING)
#: Arguments of the operator's dtype; all others are float32, int32 or bytes, as they are.
TYPED = frozenset({"x", "down", "up", "y", "expert", "amateur"})


def rounded(values, dtype):
    """Values that dtype represents exactly, as float32."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return values


def poisoned(bank):
    """A bank with one more slot, of NaN, which no token uses."""
    return np.concatenate((bank, np.full((1,) + bank.shape[1:], np.nan, np.float32)))


def operands(tokens, hidden, rank, width, dtype, bank=4):
    """x, down, up, scale, slots and y of random values; -1 and several slots among the tokens."""
    rng = np.random.default_rng([tokens, hidden, rank, width])

    def normal(*shape):
        return rounded(rng.standard_normal(shape), dtype)

    case = {"x": normal(tokens, hidden),
            "down": rounded(rng.standard_normal((bank, rank, hidden)) * hidden ** -0.5, dtype),
            "up": normal(bank, rank, width), "scale": rng.uniform(0.25, 2, bank).astype(np.float32),
            "slots": rng.integers(-1, bank, tokens).astype(np.int32), "y": normal(tokens, width)}
    case["slots"][0] = bank - 1
    case["slots"][1:3] = (-1, 0)[:max(tokens - 1, 0)]
    if rank == 16:
        case["down"][0, 8:] = 0
    return {**case, **{name: poisoned(case[name]) for name in ("down", "up", "scale")}}


def sums(case, h, dtype):
    """(want, allowed): y plus what the rows h add through up, in float64, and what a kernel may be off.

    float16 kernels round the coefficients to float16, the others keep float32 sums.
    """
    want, allowed = case["y"].astype(np.float64), np.zeros(case["y"].shape)
    for t, s in enumerate(case["slots"]):
        if s >= 0:
            want[t] += h[t] @ case["up"][s]
            terms = np.abs(h[t]) @ np.abs(case["up"][s])
            allowed[t] = ROUNDING[dtype] * np.abs(want[t]) * 1.01 + terms * (2.0 ** -11 if dtype == "float16"
                                                                             else 2.0 ** -17)
    return want, allowed


def shrunk(case):
    """(tokens, rank) float64: scale * down @ x of each token's slot, zeros without one; and the sum of its terms."""
    h = np.zeros((len(case["slots"]), case["down"].shape[1]))
    terms = np.zeros_like(h)
    for t, s in enumerate(case["slots"]):
        if s >= 0:
            h[t] = float(case["scale"][s]) * (case["down"][s].astype(np.float64) @ case["x"][t])
            terms[t] = float(case["scale"][s]) * (np.abs(case["down"][s]) @ np.abs(case["x"][t]))
    return h, terms


def lora_case(tokens, hidden, rank, width, dtype):
    """y + scale (x down^T) up, each token its own adapter."""
    case = operands(tokens, hidden, rank, width, dtype)
    want, allowed = sums(case, shrunk(case)[0], dtype)
    return {**case, "want": want, "allowed": allowed, "base": case["y"], "dtype": dtype}


def segments_case(tokens, hidden, rank, width, dtype):
    """The same by segments of unequal length, one of them empty, one without an adapter."""
    case = operands(tokens, hidden, rank, width, dtype)
    cuts = np.array([0, tokens // 2, tokens // 2, tokens // 2 + tokens // 5, tokens], np.int32)
    slots = np.array([3, 1, -1, 0], np.int32)
    case["slots"] = np.repeat(slots, np.diff(cuts))
    want, allowed = sums(case, shrunk(case)[0], dtype)
    return {**case, "starts": cuts, "slots": slots, "want": want, "allowed": allowed, "base": case["y"], "dtype": dtype}


def shrink_case(tokens, hidden, rank, width, dtype):
    """The first half alone: float32 rows."""
    case = operands(tokens, hidden, rank, width, dtype)
    want, terms = shrunk(case)
    return {**{name: case[name] for name in ("x", "slots", "down", "scale")}, "want": want,
            "allowed": terms * 2.0 ** -17, "base": np.zeros_like(want), "dtype": dtype}


def expand_case(tokens, hidden, rank, width, dtype):
    """The second half alone, from float32 rows."""
    case = operands(tokens, hidden, rank, width, dtype)
    h = np.random.default_rng([tokens, rank]).standard_normal((tokens, rank)).astype(np.float32)
    want, allowed = sums(case, h.astype(np.float64), dtype)
    return {**{name: case[name] for name in ("slots", "up", "y")}, "h": h, "want": want, "allowed": allowed,
            "base": case["y"], "dtype": dtype}


def packed_case(tokens, hidden, groups, rank, width, dtype):
    """w4_lora: y is the product with random nibbles (low one = even column, value + 8)."""
    case = operands(tokens, hidden, rank, width, dtype)
    rng = np.random.default_rng([tokens, hidden, groups, width])
    weight = rng.integers(0, 256, (width, hidden // 2), dtype=np.uint8)
    weight_scale = (rng.uniform(0.5, 2, (width, groups)) * 0.2 * hidden ** -0.5).astype(np.float32)
    values = np.stack((weight & 15, weight >> 4), -1).reshape(width, hidden).astype(np.float64) - 8
    values *= np.repeat(weight_scale.astype(np.float64), hidden // groups, 1)
    x, unit = case["x"].astype(np.float64), ROUNDING[dtype]
    base = x @ values.T
    nothing = {**case, "y": np.zeros_like(base)}
    added, adapter = sums(nothing, shrunk(case)[0], dtype)
    want = base + added
    allowed = np.maximum(adapter - unit * np.abs(added) * 1.01, 0) + unit * np.abs(want) * 1.01 \
        + np.abs(x) @ np.abs(values.T) * 2.0 ** -17
    del case["y"]
    return {**case, "weight": weight, "weight_scale": weight_scale, "want": want, "allowed": allowed, "base": base,
            "dtype": dtype}


def mix_case(tokens, experts, rank, width, dtype, bank=3):
    """y + scale h sum_e w_e up[s, e]."""
    rng = np.random.default_rng([tokens, experts, rank, width])
    weights = rng.uniform(0, 1, (tokens, experts))
    case = {"h": rng.standard_normal((tokens, rank)).astype(np.float32),
            "weights": (weights / weights.sum(1, keepdims=True)).astype(np.float32),
            "up": rounded(rng.standard_normal((bank, experts, rank, width)), dtype),
            "scale": rng.uniform(0.25, 2, bank).astype(np.float32),
            "slots": rng.integers(-1, bank, tokens).astype(np.int32),
            "y": rounded(rng.standard_normal((tokens, width)), dtype)}
    case["slots"][0] = bank - 1
    flat = np.zeros((tokens, experts * rank))
    for t, s in enumerate(case["slots"]):
        flat[t] = (float(case["scale"][s]) * np.outer(case["weights"][t], case["h"][t]).astype(np.float64)).ravel()
    want, allowed = sums({**case, "up": case["up"].reshape(bank, experts * rank, width)}, flat, dtype)
    return {**case, "up": poisoned(case["up"]), "scale": poisoned(case["scale"]), "want": want, "allowed": allowed,
            "base": case["y"], "dtype": dtype}


def select_case(rows, vocab, dtype):
    """The CoLD rule: the score that the chosen token must have."""
    rng = np.random.default_rng([rows, vocab])
    expert, amateur = (rounded(rng.standard_normal((rows, vocab)) * 3, dtype) for _ in range(2))
    cut = np.log(0.1) + expert.max(1, keepdims=True).astype(np.float64)
    score = np.where(expert >= cut, 1.5 * expert.astype(np.float64) - 0.5 * amateur, -np.inf)
    return {"expert": expert, "amateur": amateur, "alpha": np.full(rows, 0.1, np.float32),
            "beta": np.full(rows, 0.5, np.float32), "want": score.max(1), "score": score, "dtype": dtype}


#: operator -> (maker, shapes of the small case, shapes of the further ones with their dtype).
CASES = {
    "MultiLora": (lora_case, (3, 96, 16, 80), [
        (1, 4096, 16, 4096, "float16"), (32, 4096, 16, 4096, "float16"), (7, 1000, 24, 1000, "float16"),
        (2, 64, 256, 576, "float16"), (1, 4096, 16, 4096, "bfloat16"), (33, 576, 3, 192, "bfloat16"),
        (300, 1000, 64, 64, "bfloat16"), (5, 576, 8, 1536, "float32")]),
    "MultiLoraSegments": (segments_case, (11, 96, 16, 80), [
        (300, 1000, 16, 576, "float16"), (130, 576, 24, 200, "bfloat16"), (65, 64, 8, 64, "float32")]),
    "LoraShrink": (shrink_case, (3, 96, 16, 80), [
        (32, 4096, 16, 8, "float16"), (9, 1000, 24, 8, "bfloat16"), (3, 576, 8, 8, "float32")]),
    "LoraExpand": (expand_case, (3, 8, 16, 80), [
        (32, 8, 16, 4096, "float16"), (9, 8, 24, 1000, "bfloat16"), (3, 8, 8, 1536, "float32")]),
    "ContrastiveSelect": (select_case, (3, 1000), [
        (1, 151936, "float16"), (16, 49152, "bfloat16"), (3, 262144, "float32")]),
    "W4Lora": (packed_case, (3, 128, 4, 16, 80), [
        (1, 4096, 32, 16, 4096, "float16"), (7, 576, 18, 8, 192, "bfloat16"), (33, 1000, 1, 24, 100, "float32")]),
    "LilyMix": (mix_case, (3, 3, 16, 80), [
        (1, 4, 16, 4096, "float16"), (9, 3, 8, 1000, "bfloat16"), (2, 4, 64, 64, "float32")]),
}


def shapes(small):
    """[(operator, maker, arguments)] of the small cases in every dtype, and with ``small`` False of all."""
    found = []
    for operator, (maker, least, further) in CASES.items():
        found += [(operator, maker, (*least, dtype)) for dtype in DTYPES]
        found += [] if small else [(operator, maker, one) for one in further]
    return found


def write(folder, small=False):
    """Write the cases as FOLDER/<operator>-<shape>-<dtype>.npz; returns how many."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cases = shapes(small)
    for operator, maker, arguments in cases:
        name = "-".join([operator, "x".join(map(str, arguments[:-1])), arguments[-1]])
        np.savez(folder / f"{name}.npz", operator=operator, **maker(*arguments))
    return len(cases)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print(f"{write(options.folder, options.small)} cases in {options.folder}")
