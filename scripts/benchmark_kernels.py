"""Times the CPU operators one by one and prints them beside what the machine can do.

    python scripts/benchmark_kernels.py --json kernels.json
    python scripts/benchmark_kernels.py --only linears prefill --threads 2

Every row is the C operator alone (no MindSpore around it), the median of repeated runs. "read" is the share of the
read bandwidth measured in the same run (bytes of weights, caches and activations over time), "fma" the share of the
measured multiply-add rate. The decode rows walk through all linears of SmolLM2-135M's shape, so that no weight is still
in a cache when its turn comes again.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
from benchmark_common import ReadBandwidth, measure, pin, ratio, table, versions, write_json  # noqa: E402

LAYERS = 30
LINEARS = (((576, 192, 192), 576), ((576,), 576), ((1536, 1536), 576), ((576,), 1536))  # q/k/v, o, gate/up, down
VOCABULARY, HIDDEN, RANK = 49152, 576, 16
FORMATS = ("float32", "bfloat16", "int8", "int4")


class Row:
    """One line of the table: ``run()`` does the work once, moving ``bytes`` and doing ``flops``."""

    def __init__(self, name, run, bytes_moved=0, flops=0):
        self.name, self.run, self.bytes, self.flops = name, run, bytes_moved, flops
        self.times = []

    @property
    def seconds(self):
        return statistics.median(self.times)


def random(rng, *shape):
    """Uniform float32 numbers (fast to draw; the time of no operator depends on them)."""
    return rng.random(shape, np.float32) - np.float32(0.5)


def make_weight(rng, out, columns, kind):
    """(weight, weight_scale, bytes) in one of FORMATS; int4 in groups of 32 (64 and 1536 columns divide)."""
    if kind == "float32":
        return random(rng, out, columns), None, out * columns * 4
    if kind == "bfloat16":
        pair = call.to_bf16(random(rng, out, columns))
        return pair, None, pair[0].nbytes
    if kind == "int8":
        return rng.integers(-127, 128, (out, columns), np.int8), random(rng, out) * 0.01, out * (columns + 4)
    scale = random(rng, out, columns // 32) * 0.01
    return rng.integers(0, 256, (out, columns // 2), np.uint8), scale, out * columns // 2 + scale.nbytes


def linear_call(rng, x, slots, outs, kind, adapters):
    """A prepared call of fused linears -> (call, bytes of the base weights, bytes of one adapter)."""
    operands, outputs, size, adapter_size = [], [], 0, 0
    for out in outs:
        weight, scale, nbytes = make_weight(rng, out, x.shape[-1], kind)
        size += nbytes
        pair = ()
        if adapters:
            pair = (random(rng, adapters, RANK, x.shape[-1]), random(rng, adapters, out, RANK),
                    np.ones(adapters, np.float32))
            adapter_size += RANK * (x.shape[-1] + out) * 4
        operands += call.linear(weight, scale, None, *pair)
        outputs.append((x.shape[:-1] + (out,), "float32"))
    return call.Prepared("multi_lora_linear", [x, slots, *operands], outputs), size, adapter_size


# -- the groups of rows; each yields Rows, and whatever it holds is freed before the next group ------------------------


def linears(rng):
    """One decode step's linears and head, by weight format, rows, and with or without an adapter on every linear."""
    for kind in FORMATS:
        shapes = LINEARS * LAYERS
        for rows in (1, 2, 8, 16):
            for adapters in (0, 1):
                x = {columns: random(rng, rows, 1, columns) for columns in (576, 1536)}
                slots = np.zeros(rows, np.int32) if adapters else None
                calls, moved = [], 0
                if not adapters and rows == 1:
                    weights = {}
                for i, (outs, columns) in enumerate((*shapes, ((VOCABULARY,), HIDDEN))):
                    with_adapter = adapters if i < len(shapes) else 0
                    # The weights are shared by all numbers of rows; only x and the outputs differ.
                    if i not in weights:
                        weights[i] = [make_weight(rng, out, columns, kind) for out in outs]
                    operands, outputs = [], []
                    for out, (weight, scale, nbytes) in zip(outs, weights[i]):
                        pair = ()
                        moved += nbytes
                        if with_adapter:
                            pair = (random(rng, 1, RANK, columns), random(rng, 1, out, RANK), np.ones(1, np.float32))
                            moved += RANK * (columns + out) * 4
                        operands += call.linear(weight, scale, None, *pair)
                        outputs.append(((rows, 1, out), "float32"))
                    calls.append(call.Prepared("multi_lora_linear", [x[columns], slots, *operands], outputs))

                def run(calls=calls):
                    for one in calls:
                        one()

                elements = sum(sum(outs) * columns for outs, columns in shapes) + VOCABULARY * HIDDEN
                tag = "lora" if adapters else "base"
                yield Row(f"linears_{kind}_rows{rows}_{tag}", run, moved, 2 * rows * elements)


def prefill(rng):
    """Dense products of 512 tokens, by weight format, and the low-rank pair for 8 adapters beside them."""
    for kind in FORMATS:
        for columns, out in ((2048, 2048), (576, 1536), (1536, 576)):
            x = random(rng, 8, 64, columns)
            one, size, _ = linear_call(rng, x, None, (out,), kind, 0)
            yield Row(f"prefill_{kind}_512x{columns}x{out}", one, size + x.nbytes + 512 * out * 4,
                      2 * 512 * columns * out)
    x, slots = random(rng, 8, 64, 2048), np.arange(8, dtype=np.int32)
    down, up = random(rng, 8, RANK, 2048), random(rng, 8, 2048, RANK)
    y, scale = random(rng, 8, 64, 2048), np.ones(8, np.float32)
    shrink = call.Prepared("lora_shrink", [x, slots, down, scale, None], [((8, 64, RANK), "float32")])
    expand = call.Prepared("lora_expand", [shrink()[0], slots, up, y, None], [(y.shape, "float32")])

    def pair():
        shrink()
        expand()

    flops = 2 * 512 * RANK * 2048
    yield Row("lora_shrink_512_8adapters", shrink, x.nbytes + down.nbytes, flops)
    yield Row("lora_expand_512_8adapters", expand, 2 * y.nbytes + up.nbytes, flops)
    yield Row("lora_pair_512_8adapters", pair, x.nbytes + down.nbytes + 2 * y.nbytes + up.nbytes, 2 * flops)
    fused, size, adapter = linear_call(rng, x, slots, (2048,), "float32", 8)
    yield Row("prefill_float32_512x2048x2048_fused_lora", fused, size + 8 * adapter + x.nbytes + y.nbytes,
              2 * 512 * 2048 * 2048 + 2 * flops)


def training(rng):
    """The gradient of a linear with one adapter: 4 rows of 128 tokens."""
    for columns, out in ((576, 1536), (2048, 2048)):
        x, dy = random(rng, 4, 128, columns), random(rng, 4, 128, out)
        down, up = random(rng, 1, RANK, columns), random(rng, 1, out, RANK)
        inputs = [np.ones(1, np.int32), x, np.zeros(4, np.int32), dy, random(rng, out, columns), None, down, up,
                  np.ones(1, np.float32)]
        one = call.Prepared("multi_lora_linear_grad", inputs, [(a.shape, "float32") for a in (x, down, up)])
        yield Row(f"linear_grad_float32_512x{columns}x{out}", one, 0,
                  2 * 512 * columns * out + 2 * 5 * 512 * RANK * (columns + out) // 2)
    x = random(rng, 512, HIDDEN)
    inputs = [x, np.arange(2, dtype=np.int32), np.full(1, 1 << 20, np.int32), np.ones(1, np.float32)]
    yield Row("dropout_512x576", call.Prepared("dropout", inputs, [(x.shape, "float32")]), 2 * x.nbytes)


def others(rng):
    """The other operators of a decode step."""
    for rows in (1, 16):
        x = random(rng, rows, 1, HIDDEN)
        eps = np.full(1, 1e-5, np.float32)
        norm = call.Prepared("rms_norm_residual", [x, x.copy(), np.ones(HIDDEN, np.float32), eps],
                             [(x.shape, "float32"), (x.shape, "float32"), (x.shape[:-1], "float32")])
        yield Row(f"rms_norm_residual_rows{rows}", norm, 4 * x.nbytes)
        gate = random(rng, rows, 1, 1536)
        yield Row(f"swiglu_rows{rows}", call.Prepared("swiglu", [gate, gate.copy()], [(gate.shape, "float32")]),
                  3 * gate.nbytes)
        for position in (255, 2047):
            length, dim, heads, kv = 2048, 64, 9, 3
            blocks = length // 16
            numbers = [np.arange(rows, dtype=np.int32), np.full(rows, position, np.int32),
                       np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)]
            caches = [random(rng, rows * blocks, kv, 16 * dim) for _ in range(2)]
            inputs = [random(rng, rows, heads * dim), random(rng, rows, kv * dim), random(rng, rows, kv * dim),
                      random(rng, length, dim // 2), random(rng, length, dim // 2), *caches, *numbers]
            attention = call.Prepared("paged_attention", inputs, [(inputs[0].shape, "float32")])
            yield Row(f"paged_attention_rows{rows}_at{position + 1}", attention,
                      2 * rows * kv * (position + 1) * dim * 4, 4 * rows * heads * (position + 1) * dim)
        requests = max(1, rows // 2)
        logits = random(rng, 2 * requests, VOCABULARY) * 20

        first = np.arange(requests, dtype=np.int32) * 2
        inputs = [logits, *call.options(dict(expert_rows=first, amateur_rows=first + 1), dict(alpha=0.1, beta=0.5)),
                  np.full(requests, 0.5, np.float32)]
        choose = call.Prepared("contrastive_select", inputs, [((requests, 3), "int32"), ((requests, 4), "float32")])
        yield Row(f"contrastive_select_requests{requests}", choose, logits.nbytes)


#: Name -> function(rng) that yields Rows. A new operator adds its rows to a group, or a group here.
GROUPS = {"linears": linears, "prefill": prefill, "training": training, "others": others}


def time_rows(rows, repeats, seconds):
    """Fill ``times`` of every row: alternating, so that the machine's drift meets all of them alike."""
    inner = []
    for row in rows:
        row.run()
        start = time.perf_counter()
        row.run()
        once = max(time.perf_counter() - start, 1e-7)
        inner.append(max(1, min(1000, int(seconds / repeats / once))))
    for _ in range(repeats):
        for row, count in zip(rows, inner):
            start = time.perf_counter()
            for _ in range(count):
                row.run()
            row.times.append((time.perf_counter() - start) / count)


def multiply_add_rate():
    """Floating-point operations a second with registers only, the best of several runs."""
    prepared = call.Prepared("measure_fma", [np.array([100000], np.int32)], [((1,), "float32")])
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        (done,) = prepared()
        best = max(best, float(done[0]) * 1e6 / (time.perf_counter() - start))
    return best


def builtin_product():
    """MindSpore's own product (oneDNN), 512x2048x2048, in graph mode -> a Row, or None without MindSpore."""
    try:
        import mindspore as ms
    except ImportError:
        return None
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    product = ms.ops.MatMul(transpose_b=True)

    class Product(ms.nn.Cell):
        def construct(self, x, w):
            return product(x, w)

    net = Product()
    x, w = (ms.Tensor(np.ones(shape, np.float32)) for shape in ((512, 2048), (2048, 2048)))
    return Row("mindspore_matmul_512x2048x2048", lambda: net(x, w).asnumpy(), 0, 2 * 512 * 2048 * 2048)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the measures to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts (at least 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for all runs of a row, roughly")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows")
    parser.add_argument("--mindspore", action="store_true", help="also time MindSpore's built-in product")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error(f"--repeats {options.repeats}: a median of at least 5 is needed")
    pin(options.threads)

    global call
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import call  # builds the library if it is missing or old

    call.set_threads(options.threads)
    bandwidth = ReadBandwidth(call.LIBRARY._name)
    read, fma = bandwidth(7), multiply_add_rate()
    print(f"{options.threads} threads, {call.LIBRARY.colora_isa().decode()}: reads {read / 1e9:.1f} GB/s, "
          f"multiply-adds {fma / 1e9:.0f} GFLOP/s\n")
    measures = [measure("read_bandwidth", read / 1e9, "GB/s"), measure("fma_peak", fma / 1e9, "GFLOP/s")]

    lines, rng = [], np.random.default_rng(0)
    for name in options.only:
        rows = list(GROUPS[name](rng))
        if name == "prefill" and options.mindspore:
            rows += [row for row in [builtin_product()] if row]
        time_rows(rows, options.repeats, options.seconds)
        for row in rows:
            lines.append([row.name, f"{row.seconds * 1e3:.3f}",
                          f"{row.bytes / row.seconds / 1e9:.1f}" if row.bytes else None,
                          f"{row.bytes / row.seconds / read:.0%}" if row.bytes else None,
                          f"{row.flops / row.seconds / 1e9:.0f}" if row.flops else None,
                          f"{row.flops / row.seconds / fma:.0%}" if row.flops else None])
            measures.append(measure(row.name, row.seconds * 1e3, "ms"))
        by_name = {row.name: row for row in rows}
        if name == "prefill":
            value = ratio(by_name["lora_pair_512_8adapters"].times, by_name["prefill_float32_512x2048x2048"].times)
            measures.append(measure("lora_prefill_over_gemm", value, "ratio"))
            lines.append(["lora_prefill_over_gemm", f"{value:.3f}", None, None, None, None])
        if name == "linears":
            for kind in FORMATS:
                value = ratio(by_name[f"linears_{kind}_rows1_lora"].times, by_name[f"linears_{kind}_rows1_base"].times)
                measures.append(measure(f"linears_lora_over_base_{kind}_1", value, "ratio"))
                lines.append([f"linears_lora_over_base_{kind}_1", f"{value:.3f}", None, None, None, None])
    print(table(["operator", "ms", "GB/s", "read", "GFLOP/s", "fma"], lines))
    if options.json:
        write_json(options.json, measures, versions("mindspore", "numpy"), threads=options.threads)


if __name__ == "__main__":
    main()
