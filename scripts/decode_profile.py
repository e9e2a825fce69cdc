"""Where the time of a decode step goes, operator by operator; ``--profile`` of benchmark_decode.py."""

import statistics
import sys
import time

import numpy as np

from benchmark_common import ROOT, table
from decode_worker import ALPHA, BETA, KINDS, RANK


def step_calls(shape, weight_format, requests, kind, call, position=24):
    """The operators of one decode step in their order, as (label, bytes of weights, prepared call).

    Every layer has arrays of its own, so that weights come from memory as in the real step.
    """
    rows = requests * (2 if kind == "cold" else 1)
    hidden, inner, width = shape["hidden"], shape["inner"], shape["heads"] * shape["head_dim"]
    kv_width, vocab = shape["kv_heads"] * shape["head_dim"], shape["vocab"]
    random = np.random.default_rng(0)
    tile = random.standard_normal(1 << 18, np.float32) * np.float32(0.02)
    ints = lambda values: np.array(values, np.int32)  # noqa: E731
    floats = lambda *size: np.resize(tile, size)  # noqa: E731
    slots = ints(([-1] if kind == "base" else [0]) * requests + [-1] * (rows - requests))

    def linear(out, columns, adapted=True):
        weight, scale = floats(out, columns), None
        if weight_format == "bfloat16":
            weight = call.to_bf16(weight)
        elif weight_format == "int8":
            weight, scale = np.resize(random.integers(-127, 128, 1 << 18, np.int8), (out, columns)), floats(out)
        elif weight_format == "int4":
            weight = np.resize(random.integers(0, 256, 1 << 18, np.uint8), (out, columns // 2))
            scale = floats(out, columns // 32)
        down, up = (floats(1, RANK, columns), floats(1, out, RANK)) if adapted else (None, None)
        return [weight, scale, None, down, up, np.ones(1, np.float32) if adapted else None]

    def product(label, columns, *outs, adapted=True):
        linears = [linear(out, columns, adapted) for out in outs]
        operands = [tensor for one in linears for tensor in call.linear(*one)]
        arrays = [t[0] if isinstance(t, tuple) else t for one in linears for t in (one[:3] if kind == "base" else one)]
        size = sum(a.nbytes for a in arrays if a is not None)
        return label, size, call.Prepared("multi_lora_linear", [floats(rows, 1, columns), slots, *operands],
                                          [((rows, 1, out), "float32") for out in outs])

    table_weight = linear(vocab, hidden, adapted=False)
    calls = [("embedding", 0, call.Prepared("embedding", [ints([[7]] * rows), *call.table(*table_weight[:2])],
                                            [((rows, 1, hidden), "float32")]))]
    cache = [(16 * rows, shape["kv_heads"], 16 * shape["head_dim"])] * 2  # 16 blocks a row
    angles = floats(256, shape["head_dim"] // 2)

    def norm():
        return "rms_norm_residual", 0, call.Prepared(
            "rms_norm_residual", [floats(rows, 1, hidden), floats(rows, 1, hidden), floats(hidden),
                                  np.array(1e-5, np.float32)],
            [((rows, 1, hidden), "float32")] * 2 + [((rows, 1), "float32")])

    for _ in range(shape["layers"]):
        attention = call.Prepared(
            "paged_attention", [floats(rows, width), floats(rows, kv_width), floats(rows, kv_width), angles, angles,
                                *(floats(*size) for size in cache), ints(range(rows)), ints([position] * rows),
                                ints(range(16 * rows)).reshape(rows, 16)], [((rows, width), "float32")])
        swiglu = call.Prepared("swiglu", [floats(rows, 1, inner), floats(rows, 1, inner)],
                               [((rows, 1, inner), "float32")])
        calls += [norm(), product("linear q, k, v", hidden, width, kv_width, kv_width),
                  ("paged_attention", 0, attention),
                  product("linear o", width, hidden), norm(), product("linear gate, up", hidden, inner, inner),
                  ("swiglu", 0, swiglu), product("linear down", inner, hidden)]
    calls += [norm(), product("linear head", hidden, vocab, adapted=False)]
    contrast = [requests + i if kind == "cold" else -1 for i in range(requests)]
    settings = call.options(dict(expert_rows=ints(range(requests)), amateur_rows=ints(contrast)),
                            dict(alpha=ALPHA, beta=BETA))
    return calls + [("contrastive_select", 0, call.Prepared(
        "contrastive_select", [floats(rows, vocab), *settings, np.full(requests, 0.5, np.float32)],
        [((requests, 3), "int32"), ((requests, 4), "float32")]))]


def profile(weight_format, requests, shape, found, repeats):
    """Print each operator's time in a step, called through ctypes in the step's order, beside the graph's step."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import call

    columns, calls = {}, []
    for kind in KINDS:
        calls = step_calls(shape, weight_format, requests, kind, call)
        passes = []
        for _ in range(repeats + 1):
            times = dict.fromkeys((label for label, _, _ in calls), 0.0)
            for label, _, run in calls:
                start = time.perf_counter()
                run()
                times[label] += time.perf_counter() - start
            passes.append(times)
        columns[kind] = {label: statistics.median(p[label] for p in passes[1:]) for label in passes[0]}
        columns[kind]["sum"] = statistics.median(sum(p.values()) for p in passes[1:])
    counts = {label: sum(label == other for other, _, _ in calls) for label, _, _ in calls}
    sizes = {label: sum(size for other, size, _ in calls if other == label) for label in counts}
    rows = [(label, counts[label], *(f"{1e3 * columns[kind][label]:.2f}" for kind in KINDS),
             f"{sizes[label] / columns['cold'][label] / 1e9:.1f}" if sizes[label] else None) for label in counts]
    graph = {kind: found.get((weight_format, kind, requests)) for kind in KINDS}
    steps = {kind: statistics.median(case.step_seconds) if case else None for kind, case in graph.items()}
    rows.append(("sum", len(calls), *(f"{1e3 * columns[kind]['sum']:.2f}" for kind in KINDS), None))
    rows.append(("the graph's step", None, *(f"{1e3 * steps[kind]:.2f}" if steps[kind] else None for kind in KINDS),
                 None))
    rows.append(("the rest, µs an operator", None, *(
        f"{1e6 * (steps[kind] - columns[kind]['sum']) / len(calls):.1f}" if steps[kind] else None for kind in KINDS),
                 None))
    print(f"\nOperators of a step, {weight_format}, {requests} request(s), position 24, ms (each called through "
          "ctypes, which adds some µs a call):\n")
    print(table(("operator", "calls", *KINDS.values(), "GB/s of weights, CoLD"), rows), flush=True)
