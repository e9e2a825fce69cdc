"""Golden cases for an NPU: inputs and float64 results, written as .npz files, and the run that compares.

    python ops/ascend/golden.py write FOLDER
    python ops/ascend/golden.py run FOLDER [--target Ascend|CPU]

`run` prints a table and ends with 0 if every case is within its allowance, else 1. Target CPU takes the emulated
operators.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8, "float32": 2.0 ** -24}
LORA = [  # tokens, in, rank, out, dtype
    (1, 4096, 16, 4096, "float16"), (32, 4096, 16, 4096, "float16"), (7, 1000, 24, 1000, "float16"),
    (2, 64, 256, 576, "float16"),
    (1, 4096, 16, 4096, "bfloat16"), (33, 576, 3, 192, "bfloat16"), (300, 1000, 64, 64, "bfloat16"),
    (5, 576, 8, 1536, "float32")]
# tokens, experts, rank, out, dtype
MIX = [(1, 4, 16, 4096, "float16"), (9, 3, 8, 1000, "bfloat16"), (2, 4, 64, 64, "float32")]
SELECT = [(1, 151936, "float16"), (16, 49152, "bfloat16"), (3, 262144, "float32")]


def rounded(values, dtype):
    """Values that dtype represents exactly, as float32."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return values


def lora_case(tokens, hidden, rank, width, dtype, bank=4):
    rng = np.random.default_rng([tokens, hidden, rank, width])

    def normal(*shape):
        return rounded(rng.standard_normal(shape), dtype)

    case = {"x": normal(tokens, hidden),
            "down": rounded(rng.standard_normal((bank, rank, hidden)) * hidden ** -0.5, dtype),
            "up": normal(bank, rank, width), "scale": rng.uniform(0.25, 2, bank).astype(np.float32),
            "slots": rng.integers(-1, bank, tokens).astype(np.int32), "y": normal(tokens, width)}
    case["slots"][0] = bank - 1
    want, allowed = case["y"].astype(np.float64), np.zeros((tokens, width))
    for t, s in enumerate(case["slots"]):
        if s >= 0:
            h = float(case["scale"][s]) * (case["down"][s].astype(np.float64) @ case["x"][t])
            terms = np.abs(h) @ np.abs(case["up"][s])
            want[t] += h @ case["up"][s]
            allowed[t] = ROUNDING[dtype] * np.abs(want[t]) * 1.01 + terms * (2.0 ** -11 if dtype == "float16"
                                                                             else 2.0 ** -17)
    return {**case, "want": want, "allowed": allowed, "dtype": dtype, "kind": "lora"}


def mix_case(tokens, experts, rank, width, dtype, bank=3):
    rng = np.random.default_rng([tokens, experts, rank, width])
    weights = rng.uniform(0, 1, (tokens, experts))
    case = {"h": rng.standard_normal((tokens, rank)).astype(np.float32),
            "weights": (weights / weights.sum(1, keepdims=True)).astype(np.float32),
            "up": rounded(rng.standard_normal((bank, experts, rank, width)), dtype),
            "scale": rng.uniform(0.25, 2, bank).astype(np.float32),
            "slots": rng.integers(-1, bank, tokens).astype(np.int32),
            "y": rounded(rng.standard_normal((tokens, width)), dtype)}
    case["slots"][0] = bank - 1
    want, allowed = case["y"].astype(np.float64), np.zeros((tokens, width))
    for t, s in enumerate(case["slots"]):
        if s >= 0:
            coefficients = float(case["scale"][s]) * np.outer(case["weights"][t], case["h"][t]).astype(np.float64)
            want[t] += np.einsum("er,erw->w", coefficients, case["up"][s].astype(np.float64))
            terms = np.einsum("er,erw->w", np.abs(coefficients), np.abs(case["up"][s]))
            allowed[t] = ROUNDING[dtype] * np.abs(want[t]) * 1.01 + terms * (2.0 ** -11 if dtype == "float16"
                                                                             else 2.0 ** -17)
    return {**case, "want": want, "allowed": allowed, "dtype": dtype, "kind": "mix"}


def select_case(rows, vocab, dtype):
    rng = np.random.default_rng([rows, vocab])
    expert, amateur = (rounded(rng.standard_normal((rows, vocab)) * 3, dtype) for _ in range(2))
    cut = np.log(0.1) + expert.max(1, keepdims=True).astype(np.float64)
    score = np.where(expert >= cut, 1.5 * expert.astype(np.float64) - 0.5 * amateur, -np.inf)
    pairs = np.ascontiguousarray(np.arange(2 * rows, dtype=np.int32).reshape(2, rows).T)
    return {"logits": np.concatenate((expert, amateur)), "rows": pairs,
            "weights": np.tile(np.array([1.5, -0.5], np.float32), (rows, 1)),
            "log_alpha": np.full(rows, np.log(0.1), np.float32), "want": score.max(1), "score": score, "dtype": dtype,
            "kind": "select"}


def write(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, shapes, case in (("lora", LORA, lora_case), ("mix", MIX, mix_case),
                               ("select", SELECT, select_case)):
        for shape in shapes:
            np.savez_compressed(folder / (f"{name}_" + "_".join(map(str, shape)) + ".npz"), **case(*shape))


def run(folder, target):
    import mindspore as ms

    sys.path.insert(0, str(ROOT))
    from colora_ms.kernels import ascend

    ms.set_context(mode=ms.GRAPH_MODE, jit_level="O0") if target == "Ascend" else ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(target)
    ascend.load(target)

    class Lora(ms.nn.Cell):
        def construct(self, x, slots, down, up, scale, y):
            return ascend.multi_lora(x, slots, down, up, scale, y)

    class Mix(ms.nn.Cell):
        def construct(self, h, weights, slots, up, scale, y):
            return ascend.lily_mix(h, weights, slots, up, scale, y)

    class Select(ms.nn.Cell):
        def construct(self, logits, rows, weights, log_alpha):
            return ascend.contrastive_token(logits, rows, weights, log_alpha)

    files = sorted(Path(folder).glob("*.npz"))
    failed = 0
    print(f"{'case':<44} {'worst error / allowed':>22}  result")
    for file in files:
        case = np.load(file)

        def plain(name, case=case):
            return ms.Tensor(case[name])

        def typed(name, case=case):
            return ms.Tensor(case[name]).astype(getattr(ms, str(case["dtype"])))

        try:
            if str(case["kind"]) != "select":
                if str(case["kind"]) == "lora":
                    out = Lora()(typed("x"), plain("slots"), typed("down"), typed("up"), plain("scale"), typed("y"))
                else:
                    out = Mix()(plain("h"), plain("weights"), plain("slots"), typed("up"), plain("scale"), typed("y"))
                got = out.astype(ms.float32).asnumpy().astype(np.float64)
                error, allowed = np.abs(got - case["want"]), case["allowed"]
                share = float((error / np.maximum(allowed, 1e-30))[allowed > 0].max())
                good = bool((error <= allowed).all())
            else:
                ints, _ = Select()(typed("logits"), plain("rows"), plain("weights"), plain("log_alpha"))
                token = ints.asnumpy()[:, 0]
                score = case["score"][np.arange(len(token)), token]
                share = float(np.max((case["want"] - score) / 1e-4))
                good = share <= 1.0
        except Exception as problem:  # one broken operator must not hide the results of the others
            print(f"{file.stem:<44} {'':>22}  {type(problem).__name__}: {str(problem).splitlines()[0]}")
            failed += 1
            continue
        failed += not good
        print(f"{file.stem:<44} {share:>22.3f}  {'ok' if good else 'WRONG'}")
    print(f"{len(files) - failed} of {len(files)} cases right on {target}")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "run"))
    parser.add_argument("folder")
    parser.add_argument("--target", choices=("Ascend", "CPU"), default="Ascend")
    options = parser.parse_args()
    sys.exit(write(options.folder) if options.action == "write" else run(options.folder, options.target))
