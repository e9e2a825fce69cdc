"""A cost model of the Ascend kernels: what the emulator counts, priced with the published instruction rates.

    python scripts/model_ascend_kernels.py [--json FILE] [--quick]

Nothing here is a measurement: no NPU is involved. The emulator (ops/emulator) runs the device sources and counts vector
repeats, bytes and cores; this script turns repeats into cycles by the rate table of the vendor's documentation and
compares with a model of the public design (vllm-ascend's bgmv_shrink and bgmv_expand, from their published description:
one token on one core, two launches, weights read again for each token). --quick leaves the strict run over the whole
test matrix out.
"""
import argparse
import importlib.util
import itertools
import json
import platform
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CORES = 48
CLOCK_GHZ, MEMORY_TB_S = 1.8, 1.6

# Cycles for one repeat of 256 bytes of the widest operand; every other instruction takes one.
CYCLES_PER_REPEAT = {
    "MulAddDst": 2, "WholeReduceSum": 7, "WholeReduceMax": 7, "Exp": 2, "Ln": 2, "Div": 2, "Sqrt": 2, "Reciprocal": 1,
}
RANKS = (1, 3, 8, 16, 24, 32, 64, 128, 256)
HIDDEN = (64, 576, 1000, 4096, 11008)
TOKENS = (0, 1, 2, 7, 32, 300)


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driver = load(ROOT / "ops" / "emulator" / "driver.py", "emulator_driver")
builder = load(ROOT / "ops" / "emulator" / "build.py", "emulator_build")
INPUT, INOUT, WORKSPACE = driver.INPUT, driver.INOUT, driver.WORKSPACE


def cycles(counters):
    """Vector cycles of one core's (or all cores') counters."""
    return sum(repeats * CYCLES_PER_REPEAT.get(name.split(".")[0], 1)
               for name, (_, repeats, _) in counters["vector"].items())


def moved(report):
    total = report["total"]
    return total["bytes_in"] + total["bytes_out"] + total["scalar_gm_bytes"]


class Shape:
    """Random operands of one launch; the values do not matter here, only that they are finite."""

    def __init__(self, tokens, hidden, rank, dtype="float16", bank=1):
        rng = np.random.default_rng(0)
        self.tokens, self.hidden, self.rank, self.dtype, self.bank = tokens, hidden, rank, dtype, bank
        def normal(*shape):
            return driver.to_dtype(rng.standard_normal(shape, np.float32) * np.float32(0.1), dtype)
        self.x, self.y, self.h = normal(tokens, hidden), normal(tokens, hidden), np.ones((tokens, rank), np.float32)
        self.down, self.up = normal(bank, rank, hidden), normal(bank, rank, hidden)
        self.scale = np.ones(bank, np.float32)

    def minimum(self, slots):
        """Bytes that any kernel must move: x, slots, each used adapter once, y in and out (tokens with an adapter)."""
        live, used, size = int((slots >= 0).sum()), len(set(slots[slots >= 0].tolist())), driver.BYTES[self.dtype]
        return live * 3 * self.hidden * size + used * (2 * self.rank * self.hidden * size + 4) + 4 * self.tokens


def run(emulator, kernel, shape, slots, segments=None):
    slots = np.asarray(slots, np.int32)
    tiling, workspace = driver.plan_lora(shape.tokens, shape.hidden, shape.rank, shape.hidden, shape.dtype, CORES,
                                         slots=shape.bank, segments=0 if segments is None else len(slots))
    tail = [(shape.y, INOUT), (shape.y, INOUT), (workspace, WORKSPACE), (tiling, INPUT)]
    x, down, up = (shape.x, INPUT), (shape.down, INPUT), (shape.up, INPUT)
    scale, chosen = (shape.scale, INPUT), (slots, INPUT)
    if kernel == "multi_lora":
        arguments = [x, down, up, scale, chosen, *tail]
    elif kernel == "multi_lora_segments":
        arguments = [x, down, up, scale, (np.asarray(segments, np.int32), INPUT), chosen, *tail]
    elif kernel == "lora_shrink":
        arguments = [x, down, scale, chosen, (shape.h, INOUT), *tail[2:]]
    else:
        arguments = [(shape.h, INPUT), up, chosen, *tail]
    return emulator.launch(f"{kernel}_{shape.dtype}", CORES, arguments, seed=1)


def run_packed(emulator, batch, hidden=4096, rank=16, group=128, dtype="float16"):
    """w4_lora with one adapter for all tokens: (report, minimum bytes). The minimum: packed weight and scales, the
    adapter, slots, x and y once."""
    rng, size = np.random.default_rng(0), driver.BYTES[dtype]
    shape = Shape(batch, hidden, rank, dtype)
    weight = rng.integers(0, 256, (hidden, hidden // 2), dtype=np.uint8)
    weight_scale = rng.uniform(0.01, 0.02, (hidden, hidden // group)).astype(np.float32)
    slots = np.zeros(batch, np.int32)
    tiling, workspace = driver.plan_w4_lora(batch, hidden, rank, hidden, dtype, hidden // group, CORES)
    report = emulator.launch(f"w4_lora_{dtype}", CORES, [
        (shape.x, INPUT), (weight, INPUT), (weight_scale, INPUT), (shape.down, INPUT), (shape.up, INPUT),
        (shape.scale, INPUT),
        (slots, INPUT), (np.empty_like(shape.y), driver.OUTPUT), (workspace, WORKSPACE), (tiling, INPUT)], seed=1)
    least = weight.nbytes + weight_scale.nbytes + 2 * rank * hidden * size + 4 + batch * (2 * hidden * size + 4)
    return report, least


def run_mix(emulator, batch, experts=4, rank=16, width=4096, dtype="float16"):
    """lily_mix with one adapter for all tokens: (report, minimum bytes). The minimum: h, router weights, slots and the
    experts once, y in and out."""
    rng = np.random.default_rng(0)
    h, weights = np.ones((batch, rank), np.float32), np.full((batch, experts), 1 / experts, np.float32)
    up = driver.to_dtype(rng.standard_normal((1, experts, rank, width)), dtype)
    y = driver.to_dtype(np.zeros((batch, width)), dtype)
    slots, scale = np.zeros(batch, np.int32), np.ones(1, np.float32)
    tiling, workspace = driver.plan_lily_mix(batch, experts, rank, width, dtype, CORES)
    report = emulator.launch(f"lily_mix_{dtype}", CORES, [
        (h, INPUT), (weights, INPUT), (up, INPUT), (scale, INPUT), (slots, INPUT), (y, INOUT), (y, INOUT),
        (workspace, WORKSPACE),
        (tiling, INPUT)], seed=1)
    return report, up.nbytes + h.nbytes + weights.nbytes + slots.nbytes + 4 + 2 * y.nbytes


def print_others(emulator, measure):
    """The rows of w4_lora and lily_mix."""
    packed = 4096 * 4096 // 2
    print(f"\n{'operator':>9} {'batch':>5} {'bytes':>10} {'/ minimum':>9} {'cores':>5} {'cycles':>8} "
          f"{'longest core':>12}   (hidden 4096, rank 16, one adapter; w4_lora: groups of 128; lily_mix: 4 experts)")
    for name, runner in (("w4_lora", run_packed), ("lily_mix", run_mix)):
        for batch in (1, 2, 8, 32):
            report, least = runner(emulator, batch)
            assert report["findings"] == []
            longest = max(cycles(core) for core in report["cores"])
            print(f"{name:>9} {batch:>5} {moved(report):>10} {moved(report) / least:>9.4f} {report['cores_used']:>5} "
                  f"{cycles(report['total']):>8} {longest:>12}")
            if batch == 1:
                measure(f"{name}_bytes_over_minimum_batch1", moved(report) / least, "ratio")
                measure(f"{name}_cores_used_batch1", report["cores_used"], "cores")
                measure(f"{name}_longest_core_batch1", longest, "modelled vector cycles")
            if batch == 32 and name == "w4_lora":
                print(f"{'':>15} of these, activations read by every core: {report['buffers'][0]['in']}")
            if batch == 32 and name == "lily_mix":
                print(f"{'':>15} a mix formed for each token in memory would write and read {2 * 32 * 16 * 4096 * 2}")
    print(f"a float16 weight in the place of the packed one ({packed} bytes and scales): {4 * packed} bytes")


def public_design(tokens, hidden, rank):
    """Model of the public kernels (fp16, in = out = hidden): cycles a token of the two, bytes, cores.

    shrink: x widened once; per rank row a Cast, a Mul and a reduction at the whole-reduce rate. expand: tiles of 8192
    weights, Cast, Mul and block reduction of each (a pair reduction more where a row fills two blocks), then y is
    widened, added to and narrowed."""
    lanes = -(-hidden // 64)
    shrink = lanes + rank * lanes * (1 + 1 + 7) + 1
    weights = -(-hidden * rank // 64)
    expand = 3 * weights + (-(-weights // 8) if rank > 8 else 0) + 3 * lanes
    byte_count = tokens * (2 * rank * hidden * 2 + 3 * hidden * 2 + 2 * rank * 4 + 2 * 8)
    cores = -(-tokens // -(-tokens // CORES))
    return shrink, expand, byte_count, cores


def decode_patterns(batch):
    """Slot tensors: one adapter for all (not a mixed batch, reported apart), two in turn, two thirds of the rows on one
    of five, eight in turn, each its own, and half of the rows without (expert and amateur rows)."""
    rows = np.arange(batch, dtype=np.int32)
    yield "one adapter", np.zeros(batch, np.int32)
    yield "2 adapters", rows % 2
    yield "skewed", np.where(rows % 3 == 1, 1 + rows // 3 % 4, 0).astype(np.int32)
    yield "8 adapters", rows % 8
    yield "all different", rows
    if batch > 1:
        yield "pairs with -1", np.where(rows % 2 == 0, rows // 2 % 8, -1).astype(np.int32)


def strict_matrix(emulator):
    """Findings of the strict emulator over rank x hidden x tokens x dtype; slots mix three adapters and none."""
    found, launches = 0, 0
    for rank, hidden, tokens, dtype in itertools.product(RANKS, HIDDEN, TOKENS, ("float16", "bfloat16")):
        shape = Shape(tokens, hidden, rank, dtype, bank=3)
        slots = np.random.default_rng(tokens + rank).integers(-1, 3, tokens)
        found += len(run(emulator, "multi_lora", shape, slots)["findings"])
        launches += 1
    return found, launches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the measures to FILE")
    parser.add_argument("--quick", action="store_true", help="leave the strict run over the test matrix out")
    options = parser.parse_args()
    emulator = driver.Emulator(builder.build())
    print("Modelled, not measured. Parameters: fp16, hidden 4096, rank 16, "
          f"{CORES} vector cores, {CLOCK_GHZ} GHz, {MEMORY_TB_S} TB/s;\n"
          f"cycles per 256-byte repeat: 1, except {CYCLES_PER_REPEAT}.\n")
    measures = []

    def measure(name, value, unit):
        measures.append({"name": name, "value": value, "unit": unit})

    print(f"{'batch':>5} {'slots':>14} {'bytes':>10} {'/ minimum':>9} {'cores':>5} {'cycles':>8} {'longest core':>12}"
          f" | public: {'bytes/min':>9} {'cores':>5} {'longest core':>12}")
    worst = worst_single = 0.0
    for batch in range(1, 33):
        for name, slots in decode_patterns(batch):
            shape = Shape(batch, 4096, 16, bank=32)
            report = run(emulator, "multi_lora", shape, slots)
            assert report["findings"] == []
            ratio = moved(report) / shape.minimum(slots)
            if name == "one adapter" and batch > 1:
                worst_single = max(worst_single, ratio)
            else:
                worst = max(worst, ratio)
            if batch == 1 and name == "one adapter":
                measure("cores_used_batch1", report["cores_used"], "cores")
            if batch in (1, 2, 8, 32):
                shrink, expand, bytes_public, cores_public = public_design(int((slots >= 0).sum()), 4096, 16)
                longest = max(cycles(core) for core in report["cores"])
                share = -(-int((slots >= 0).sum()) // cores_public)
                print(f"{batch:>5} {name:>14} {moved(report):>10} {ratio:>9.4f} {report['cores_used']:>5} "
                      f"{cycles(report['total']):>8} {longest:>12} |         "
                      f"{bytes_public / shape.minimum(slots):>9.3f} {cores_public:>5} {share * (shrink + expand):>12}")
    measure("bytes_over_minimum_decode", worst, "ratio")
    measure("bytes_over_minimum_decode_one_adapter", worst_single, "ratio")

    shape = Shape(1024, 4096, 16, bank=4)
    slots = np.arange(4, dtype=np.int32)
    report = run(emulator, "multi_lora_segments", shape, slots, segments=np.arange(5) * 256)
    assert report["findings"] == []
    ratio = moved(report) / (shape.minimum(np.repeat(slots, 256)) - 4 * 1024 + 4 * 9)
    measure("bytes_over_minimum_segment", ratio, "ratio")
    print(f"\n4 segments x 256 tokens: {moved(report)} bytes, {ratio:.4f} of the minimum, {report['cores_used']} "
          f"cores; public design {public_design(1024, 4096, 16)[2] / shape.minimum(np.repeat(slots, 256)):.2f}")

    # Like for like with the public design: one core works on one token (48 tokens, 48 adapters, 48 cores).
    shape, slots = Shape(48, 4096, 16, bank=48), np.arange(48)
    shrink, expand, _, _ = public_design(48, 4096, 16)
    for kernel, public in (("lora_expand", expand), ("lora_shrink", shrink)):
        report = run(emulator, kernel, shape, slots)
        assert report["findings"] == []
        per_token = cycles(report["total"]) / 48
        measure(kernel.replace("lora_", "") + "_cycles_per_token", per_token, "modelled vector cycles")
        single = run(emulator, kernel, Shape(1, 4096, 16), [0])
        print(f"{kernel}: {per_token:.0f} modelled vector cycles a token (public design {public}); one token alone: "
              f"{max(cycles(core) for core in single['cores'])} on the busiest of {single['cores_used']} cores")
    for dtype in ("float16", "bfloat16"):
        report = run(emulator, "lora_expand", Shape(48, 4096, 16, dtype, bank=48), slots)
        print(f"lora_expand in {dtype}: {cycles(report['total']) / 48:.0f} modelled vector cycles a token")
    # What the 32-adapter batch writes besides y, in whole weight matrices: a gathered copy would be 64 of them.
    report = run(emulator, "multi_lora", Shape(32, 4096, 16, bank=32), np.arange(32))
    written, matrix = sum(b["out"] for b in report["buffers"][7:]), 16 * 4096 * 2
    measure("gathered_weight_bytes", written // matrix * matrix, "bytes")
    print(f"batch 32, 32 adapters: {written} bytes of sums written to the workspace ({report['buffers'][7]['bytes']} "
          f"bytes); gather + batched product would copy {64 * matrix} bytes of weights")
    print_others(emulator, measure)
    if not options.quick:
        found, launches = strict_matrix(emulator)
        measure("strict_findings", found, "findings")
        print(f"strict emulator over the test matrix: {found} findings in {launches} launches")
    print()
    for item in measures:
        print(f"{item['name']:<40} {item['value']:>10.4f} {item['unit']}")
    if options.json:
        document = {"machine": f"emulated {CORES}-core Ascend 910B vector unit on {platform.machine()}, modelled",
                    "versions": {"python": platform.python_version(), "numpy": np.__version__}, "measures": measures}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
