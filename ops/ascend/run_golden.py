"""Run golden cases (golden.py) on an NPU, or emulated on a CPU, and compare.

    python ops/ascend/run_golden.py FOLDER [--target Ascend|CPU] [--modes graph,pynative] [--twice] [--repeat N]
                                    [--only OPERATOR,...] [--dynamic] [--stream] [--json]

Prints a table and ends with 0 if every case is right, else 1. --twice: the second launch gives equal bits. --repeat: so
many launches, the last one compared. --dynamic: graphs whose number of tokens is not fixed. --stream: products run on a
second stream beside every launch (both on Ascend only). --json: a line before and one behind each case, for a parent
that watches over the time.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from golden import TYPED  # noqa: E402

#: operator -> the arguments of its face, in order.
CALLS = {
    "MultiLora": ("x", "slots", "down", "up", "scale", "y", "ends"),
    "LoraShrink": ("x", "slots", "down", "scale"),
    "LoraExpand": ("h", "slots", "up", "y"),
    "ContrastiveSelect": ("logits", "mix_rows", "weights", "log_alpha"),
    "LilyMix": ("h", "weights", "slots", "up", "scale", "y"),
}
#: Arguments with a row for each token or request.
BY_TOKEN = frozenset({"x", "slots", "y", "h", "weights", "logits", "mix_rows", "log_alpha"})
SCORE = 1e-4  # by how much a score may be off, and that of a chosen token below the best one


def verdict(case, outputs):
    """(share of the allowance that the worst element takes, None or what is wrong)."""
    if str(case["operator"]) == "ContrastiveSelect":
        return chosen(case, *outputs)
    got = outputs[0].astype(np.float64)
    if not np.isfinite(got).all():
        return float("inf"), f"{int((~np.isfinite(got)).sum())} values are not finite (an unused slot is read?)"
    error, allowed = np.abs(got - case["want"]), case["allowed"]
    share = float((error / np.maximum(allowed, 1e-30))[allowed > 0].max(initial=0))
    if (error > allowed).any():
        row, column = np.unravel_index(int(np.argmax(error - allowed)), error.shape)
        return share, f"[{row}, {column}] is {got[row, column]:.6g}, right is {case['want'][row, column]:.6g}"
    changed = (np.abs(got - case["base"]) > 4 * allowed).any()
    return share, None if changed else "the adapter has no effect"


def chosen(case, ints, floats):
    """The same of ContrastiveSelect: token, favourite, number of valid tokens; sum, best logit, each row's logit."""
    token, favourite, valid = ints.T
    if token.min() < 0 or token.max() >= case["score"].shape[1]:
        return float("inf"), f"a token outside the vocabulary: {token.min()}..{token.max()}"
    own = case["score"][np.arange(len(token)), token]
    below = float(np.max(case["score"].max(1) - own))
    share = max(below, float(np.abs(floats[:, 0] - own).max())) / SCORE
    each = np.where(case["mix_rows"] < 0, 0, case["logits"][case["mix_rows"], token[:, None]])
    for name, right in (("a token whose score is below the best", below <= SCORE),
                        ("a sum that is not the token's", share <= 1),
                        ("a favourite that is not the leading row's", (favourite == case["favourite"]).all()),
                        ("a number of valid tokens", ((case["valid"][0] <= valid) & (valid <= case["valid"][1])).all()),
                        ("a best logit", np.allclose(floats[:, 1], case["best"], atol=SCORE)),
                        ("a row's logit of the token", np.allclose(floats[:, 2:], each, atol=SCORE))):
        if not right:
            return share, f"{name} is wrong"
    return share, None


def cells():
    """operator -> a Cell that calls it; graphs are parsed from the source, so each is written out."""
    from mindspore import nn

    from colora_ms.kernels import ascend

    class MultiLora(nn.Cell):
        def construct(self, x, slots, down, up, scale, y, ends):
            return ascend.multi_lora(x, slots, down, up, scale, y, ends)

    class LoraShrink(nn.Cell):
        def construct(self, x, slots, down, scale):
            return ascend.lora_shrink(x, slots, down, scale)

    class LoraExpand(nn.Cell):
        def construct(self, h, slots, up, y):
            return ascend.lora_expand(h, slots, up, y)

    class ContrastiveSelect(nn.Cell):
        def construct(self, logits, mix_rows, weights, log_alpha):
            return ascend.contrastive_token(logits, mix_rows, weights, log_alpha)

    class LilyMix(nn.Cell):
        def construct(self, h, weights, slots, up, scale, y):
            return ascend.lily_mix(h, weights, slots, up, scale, y)

    made = (MultiLora, LoraShrink, LoraExpand, ContrastiveSelect, LilyMix)
    return {cell.__name__: cell for cell in made if cell.__name__ in ascend.OPERATORS}


def call(ms, cell, case, mode, repeat=1, dynamic=False, beside=None):
    """The outputs of the last of ``repeat`` calls, as arrays."""
    arguments = CALLS[str(case["operator"])]
    given = [ms.Tensor(case[one]).astype(getattr(ms, str(case["dtype"]))) if one in TYPED else ms.Tensor(case[one])
             for one in arguments]
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    if dynamic:
        cell.set_inputs(*[ms.Tensor(shape=[None, *one.shape[1:]], dtype=one.dtype) if name in BY_TOKEN else one
                          for name, one in zip(arguments, given)])
    for _ in range(repeat):
        if beside is not None:
            beside()
        out = cell(*given)
    outputs = out if isinstance(out, tuple) else (out,)
    return [one.asnumpy() if one.dtype == ms.int32 else one.astype(ms.float32).asnumpy() for one in outputs]


def second_stream(ms):
    """A function that starts products on a second stream, which take some of the cores while a case runs."""
    stream, a = ms.runtime.Stream(), ms.Tensor(np.ones((2048, 2048), np.float16))

    def start():
        with ms.runtime.StreamCtx(stream):
            for _ in range(4):
                ms.ops.matmul(a, a)
    return start


def run(options, say):
    """Run the cases; returns (right, all)."""
    import mindspore as ms

    from colora_ms.kernels import ascend

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(options.target)
    began = time.time()
    ascend.load(options.target)
    say({"loaded": len(ascend.OPERATORS), "seconds": round(time.time() - began, 2)})
    made, only = cells(), [one for one in options.only.split(",") if one]
    beside = second_stream(ms) if options.stream else None
    files = [file for file in sorted(options.folder.glob("*.npz"))
             if file.name.split("-")[0] in made and (not only or file.name.split("-")[0] in only)]
    right = 0
    for file in files:
        for mode in options.modes.split(","):
            name = f"{file.stem} {mode}" + (" dynamic" if options.dynamic else "")
            say({"start": name})
            began = time.time()
            try:
                case = np.load(file)
                cell = made[str(case["operator"])]()
                got = call(ms, cell, case, mode, options.repeat, options.dynamic, beside)
                share, wrong = verdict(case, got)
                if options.twice and not wrong and any(
                        a.tobytes() != b.tobytes() for a, b in zip(got, call(ms, cell, case, mode))):
                    wrong = "a second launch gives other bits"
            except Exception as problem:  # one broken operator must not hide the results of the others
                share, wrong = float("nan"), f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
            right += not wrong
            say({"done": name, "share": share, "wrong": wrong, "seconds": round(time.time() - began, 3)})
    return right, len(files) * len(options.modes.split(","))


def table(line):
    """The lines of a person."""
    if "done" in line:
        print(f"{line['done']:<52} {line['share']:>22.3f}  {'ok' if not line['wrong'] else 'WRONG: ' + line['wrong']}")


def main():
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", choices=("Ascend", "CPU"), default="Ascend")
    parser.add_argument("--modes", default="graph")
    parser.add_argument("--only", default="")
    parser.add_argument("--repeat", type=int, default=1)
    for flag in ("twice", "dynamic", "stream", "json"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    if not options.json:
        print(f"{'case':<52} {'worst error / allowed':>22}  result")
    right, count = run(options, (lambda line: print(json.dumps(line), flush=True)) if options.json else table)
    if not options.json:
        print(f"{right} of {count} cases right on {options.target}")
    return 0 if count and right == count else 1


if __name__ == "__main__":
    sys.exit(main())
