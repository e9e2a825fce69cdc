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
TYPED = frozenset({"x", "down", "up", "y", "logits"})


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


def sums(case, h, dtype, coarse=True):
    """(want, allowed): y plus what the rows h add through up, in float64, and what a kernel may be off.

    coarse: whether a float16 kernel rounds the coefficients to float16; the others keep float32 sums.
    """
    want, allowed = case["y"].astype(np.float64), np.zeros(case["y"].shape)
    for t, s in enumerate(case["slots"]):
        if s >= 0:
            want[t] += h[t] @ case["up"][s]
            terms = np.abs(h[t]) @ np.abs(case["up"][s])
            unit = 2.0 ** -11 if coarse and dtype == "float16" else 2.0 ** -17
            allowed[t] = ROUNDING[dtype] * np.abs(want[t]) * 1.01 + terms * unit
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


def lora_case(tokens, hidden, rank, widths, dtype):
    """y + scale (x down^T) up, each token its own adapter; ``widths`` are those of linears that lie side by side, each
    with its own down and scale. In the second slice one adapter has half the rank: zeros fill it up."""
    slices = len(widths)
    case = operands(tokens, hidden, rank * slices, sum(widths), dtype)
    rng = np.random.default_rng([tokens, slices])
    bank = len(case["down"]) - 1
    up = rounded(rng.standard_normal((bank, rank, sum(widths))), dtype)
    case["scale"] = poisoned(rng.uniform(0.25, 2, (bank, slices)).astype(np.float32))
    if slices > 1:
        half = rank + rank // 2
        case["down"][1, half:2 * rank] = 0
        up[1, rank // 2:, widths[0]:widths[0] + widths[1]] = 0
    case["up"], ends, begin = poisoned(up), np.cumsum(widths).astype(np.int32), 0
    want, allowed = np.empty(case["y"].shape), np.empty(case["y"].shape)
    for k, end in enumerate(ends):
        part = {"y": case["y"][:, begin:end], "x": case["x"], "slots": case["slots"],
                "down": case["down"][:, k * rank:(k + 1) * rank], "up": case["up"][:, :, begin:end],
                "scale": case["scale"][:, k]}
        want[:, begin:end], allowed[:, begin:end] = sums(part, shrunk(part)[0], dtype, coarse=False)
        begin = end
    return {**case, "ends": ends, "want": want, "allowed": allowed, "base": case["y"], "dtype": dtype}


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


def select_case(requests, vocab, dtype):
    """A weighted sum of three rows' logits (every second request has two) over tokens near the leading row's best."""
    rng = np.random.default_rng([requests, vocab])
    logits = rounded(rng.standard_normal((2 * requests + 1, vocab)) * 3, dtype)
    rows = np.array([(r, requests + r, -1 if r % 2 else 2 * requests) for r in range(requests)], np.int32)
    weights = np.tile(np.array([1.5, -0.5, 0.25], np.float32), (requests, 1))
    wide, lead = logits.astype(np.float64), logits[:requests].astype(np.float64)
    total = sum(np.where(rows[:, k:k + 1] < 0, 0, weights[:, k:k + 1] * wide[rows[:, k]]) for k in range(3))
    above = lead - (np.log(0.1) + lead.max(1, keepdims=True))
    return {"logits": logits, "mix_rows": rows, "weights": weights,
            "log_alpha": np.full(requests, np.log(0.1), np.float32), "dtype": dtype,
            "score": np.where(above >= 0, total, -np.inf), "favourite": lead.argmax(1), "best": lead.max(1),
            "valid": np.stack([(above >= margin).sum(1) for margin in (1e-4, -1e-4)])}


#: operator -> (maker, shapes of the small case, shapes of the further ones with their dtype).
CASES = {
    "MultiLora": (lora_case, (3, 96, 16, (80,)), [
        (1, 4096, 16, (4096,), "float16"), (32, 4096, 16, (4096,), "float16"), (7, 1000, 24, (1000,), "float16"),
        (2, 64, 256, (576,), "float16"), (5, 576, 16, (96, 32, 32), "float16"), (9, 256, 8, (300, 100), "bfloat16"),
        (1, 4096, 16, (4096,), "bfloat16"), (33, 576, 3, (192,), "bfloat16"), (300, 1000, 64, (64,), "bfloat16"),
        (5, 576, 8, (1536,), "float32"), (4, 96, 16, (64, 16, 24), "float32")]),
    "LoraShrink": (shrink_case, (3, 96, 16, 80), [
        (32, 4096, 16, 8, "float16"), (9, 1000, 24, 8, "bfloat16"), (3, 576, 8, 8, "float32")]),
    "LoraExpand": (expand_case, (3, 8, 16, 80), [
        (32, 8, 16, 4096, "float16"), (9, 8, 24, 1000, "bfloat16"), (3, 8, 8, 1536, "float32")]),
    "ContrastiveSelect": (select_case, (3, 1000), [
        (1, 151936, "float16"), (16, 49152, "bfloat16"), (3, 262144, "float32")]),
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
        sizes = [str(one) if isinstance(one, int) else "+".join(map(str, one)) for one in arguments[:-1]]
        name = "-".join([operator, "x".join(sizes), arguments[-1]])
        np.savez(folder / f"{name}.npz", operator=operator, **maker(*arguments))
    return len(cases)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print(f"{write(options.folder, options.small)} cases in {options.folder}")
