"""A cost model of the Ascend kernels: the emulator's trace, priced with published numbers.

    python scripts/model_ascend_kernels.py [--json FILE] [--quick]

Nothing here is a measurement: no NPU is involved. The emulator (ops/emulator) runs the device sources and records every
core's instructions; ascend_costs.py turns them into cycles with the numbers of ascend_constants.py. "Public" is a model
of the public kernels' published design (vllm-ascend's bgmv_shrink and bgmv_expand: one token on one core, two launches,
weights read again for each token) under the same rules, no run of them. "Old" is today's kernel's predecessor under the
same rules (ascend_baseline.json). --quick leaves the strict run over the test matrix and the planted bugs out.
"""
import argparse
import importlib.util
import itertools
import json
import platform
from pathlib import Path

import numpy as np

import ascend_constants as constants
import ascend_costs as costs
import ascend_prefill

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, RANK = 4096, 16
BATCHES = (1, 8, 32)
#: Linears of Llama-2-7B and of grouped heads: name, inputs, outputs, slices.
PACKED = (("o", HIDDEN, HIDDEN, 1), ("q, k, v", HIDDEN, 3 * HIDDEN, 3), ("q, k, v, 8 heads of k", HIDDEN, 6144, 3),
          ("gate, up", HIDDEN, 22016, 2), ("down", 11008, HIDDEN, 1))
PACKED_SLOTS = (1, 2, 4, 6, 8, 12, 16)
MATRIX = {"rank": (1, 3, 8, 16, 24, 32, 64, 128, 256), "hidden": (64, 576, 1000, 4096, 11008),
          "tokens": (0, 1, 2, 7, 32, 150)}  # dtypes, slices and cores in turn


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driver = load(ROOT / "ops" / "emulator" / "driver.py", "emulator_driver")
builder = load(ROOT / "ops" / "emulator" / "build.py", "emulator_build")
INPUT, INOUT, OUTPUT, WORKSPACE = driver.INPUT, driver.INOUT, driver.OUTPUT, driver.WORKSPACE


def microseconds(cycles):
    return cycles / constants.CLOCK_GHZ / 1e3


def moved(report):
    total = report["total"]
    return total["bytes_in"] + total["bytes_out"] + total["scalar_gm_bytes"]


class Shape:
    """Random operands of one launch; the values do not matter here, only that they are finite."""

    def __init__(self, tokens, hidden=HIDDEN, rank=RANK, dtype="float16", bank=1, slices=1):
        rng = np.random.default_rng(0)
        self.tokens, self.hidden, self.rank, self.dtype = tokens, hidden, rank, dtype
        self.bank, self.slices = bank, slices

        def normal(*shape):
            return driver.to_dtype(rng.standard_normal(shape, np.float32) * np.float32(0.1), dtype)

        self.x, self.y, self.h = normal(tokens, hidden), normal(tokens, hidden), np.ones((tokens, rank), np.float32)
        self.down, self.up = normal(bank, slices * rank, hidden), normal(bank, rank, hidden)
        self.scale = np.ones((bank, slices), np.float32)
        self.ends = (hidden * np.arange(1, slices + 1) // slices).astype(np.int32)

    def minimum(self, slots):
        """Bytes that any kernel must move: x, slots, each used adapter once, y in and out (tokens with an adapter)."""
        live, used, size = int((slots >= 0).sum()), len(set(slots[slots >= 0].tolist())), driver.BYTES[self.dtype]
        return live * 3 * self.hidden * size + used * (2 * self.rank * self.hidden * size + 4) + 4 * self.tokens


def launch(emulator, kernel, arguments, cores, trace=True):
    """(report, price of ascend_costs.simulate or None)."""
    flags = driver.STRICT | (driver.TRACE if trace else driver.INTERLEAVE)
    report = emulator.launch(kernel, cores, arguments, 1, flags)
    assert report["findings"] == [] or not trace, report["findings"]
    return report, costs.simulate(*emulator.trace(cores)) if trace else None


def run_lora(emulator, shape, slots, cores=48, kernel="multi_lora", trace=True):
    slots = np.ascontiguousarray(slots, np.int32)
    y, chosen = [(shape.y, INOUT), (shape.y, INOUT)], (slots, INPUT)
    if kernel == "multi_lora":
        tiling, workspace = driver.plan_multi_lora(shape.tokens, shape.hidden, shape.rank, shape.hidden, shape.dtype,
                                                   cores, shape.bank, shape.slices)
        arguments = [(shape.x, INPUT), (shape.down, INPUT), (shape.up, INPUT), (shape.scale, INPUT), chosen, y[0],
                     (shape.ends, INPUT), y[1]]
    else:
        tiling, workspace = driver.plan_lora(shape.tokens, shape.hidden, shape.rank, shape.hidden, shape.dtype, cores,
                                             slots=shape.bank)
        arguments = [(shape.x, INPUT), (shape.down, INPUT), (shape.scale[:, 0].copy(), INPUT), chosen, (shape.h, INOUT)]
        if kernel == "lora_expand":
            arguments = [(shape.h, INPUT), (shape.up, INPUT), chosen, *y]
    arguments += [(workspace, WORKSPACE), (tiling, INPUT)]
    return launch(emulator, f"{kernel}_{shape.dtype}", arguments, cores, trace)


def run_mix(emulator, batch, experts=4, rank=RANK, width=HIDDEN, dtype="float16", cores=48, trace=True):
    rng = np.random.default_rng(0)
    h, weights = np.ones((batch, rank), np.float32), np.full((batch, experts), 1 / experts, np.float32)
    up = driver.to_dtype(rng.standard_normal((1, experts, rank, width)), dtype)
    y = driver.to_dtype(np.zeros((batch, width)), dtype)
    slots, scale = np.zeros(batch, np.int32), np.ones(1, np.float32)
    tiling, workspace = driver.plan_lily_mix(batch, experts, rank, width, dtype, cores)
    return launch(emulator, f"lily_mix_{dtype}", [
        (h, INPUT), (weights, INPUT), (up, INPUT), (scale, INPUT), (slots, INPUT), (y, INOUT), (y, INOUT),
        (workspace, WORKSPACE), (tiling, INPUT)], cores, trace)


def run_select(emulator, requests, voices=2, vocab=151936, dtype="float16", cores=48, trace=True):
    rng = np.random.default_rng(0)
    logits = driver.to_dtype(rng.standard_normal((requests * voices, vocab), np.float32), dtype)
    rows = np.arange(requests * voices, dtype=np.int32).reshape(requests, voices)
    weights, least = np.full((requests, voices), 0.5, np.float32), np.full(requests, -2.3, np.float32)
    tiling, workspace = driver.plan_contrastive_select(*logits.shape, requests, voices, dtype, cores)
    ints, floats = np.empty((requests, 3), np.int32), np.empty((requests, 2 + voices), np.float32)
    return launch(emulator, f"contrastive_select_{dtype}", [
        (logits, INPUT), (rows, INPUT), (weights, INPUT), (least, INPUT), (ints, OUTPUT), (floats, OUTPUT),
        (workspace, WORKSPACE), (tiling, INPUT)], cores, trace)


def public_design(tokens, cores):
    """Cycles of the public kernels' design for tokens with an adapter: float16, one buffer in shrink, two in expand."""
    names = ("Cast.f16.f32", "Cast.f32.f16", "Mul.f32", "Add.f32", "WholeReduceSum.f32", "BlockReduceSum.f32",
             "PairReduceSum.f32")
    price = dict(zip(names, costs.vector_costs(names)))

    def vector(name, repeats):
        each, head, after = price[name]
        return each * repeats + head + after

    rate = costs.bandwidth(min(tokens, cores))
    row, lanes = costs.read_cycles(2 * HIDDEN, 1, rate), HIDDEN // 64
    shrink = row + vector("Cast.f16.f32", lanes) + RANK * (
        row + vector("Cast.f16.f32", lanes) + vector("Mul.f32", lanes) + vector("WholeReduceSum.f32", lanes)
        + vector("WholeReduceSum.f32", 1) + constants.SCALAR_UB) + costs.write_cycles(4 * RANK, 1)
    tiles, tile = HIDDEN * RANK // 8192, 8192 // 64
    work = (vector("Cast.f16.f32", tile) + vector("Mul.f32", tile) + vector("BlockReduceSum.f32", tile)
            + vector("PairReduceSum.f32", tile // 8))
    expand = tiles * max(work, costs.read_cycles(2 * 8192, 1, rate)) + row + vector("Cast.f16.f32", lanes) + vector(
        "Add.f32", lanes) + vector("Cast.f32.f16", lanes) + costs.write_cycles(2 * HIDDEN, 1)
    return -(-tokens // cores) * (shrink + expand)


def decode_patterns(batch):
    """Slot tensors: one adapter for all, two in turn, two thirds of the rows on one of five, eight in turn, each its
    own, and half of the rows without (expert and amateur rows)."""
    rows = np.arange(batch, dtype=np.int32)
    yield "one adapter", np.zeros(batch, np.int32)
    if batch > 1:
        yield "2 adapters", rows % 2
        yield "skewed", np.where(rows % 3 == 1, 1 + rows // 3 % 4, 0).astype(np.int32)
        yield "8 adapters", rows % 8
        yield "all different", rows
        yield "pairs with -1", np.where(rows % 2 == 0, rows // 2 % 8, -1).astype(np.int32)


def print_decode(emulator, measure):
    """multi_lora against its predecessor and the public design."""
    old = json.loads((ROOT / "scripts" / "ascend_baseline.json").read_text())["cycles"]
    print(f"multi_lora\n{'cores':>5} {'batch':>5} {'slots':>14} {'bytes':>9} {'/ minimum':>9} {'cycles':>7} {'us':>6} "
          f"{'old':>7} {'new / old':>9} {'public':>7}   of the busiest core: scalar, vector, reads, writes")
    worst = {}
    for cores, batch in itertools.product(constants.CORES_PRICED, BATCHES):
        for name, slots in decode_patterns(batch):
            shape = Shape(batch, bank=32)
            report, price = run_lora(emulator, shape, slots, cores)
            before = old[f"{cores} cores, batch {batch}, {name}"]
            ratio = price["cycles"] / before
            live = int((slots >= 0).sum())
            print(f"{cores:>5} {batch:>5} {name:>14} {moved(report):>9} {moved(report) / shape.minimum(slots):>9.3f} "
                  f"{price['cycles']:>7.0f} {microseconds(price['cycles']):>6.2f} {before:>7} {ratio:>9.3f} "
                  f"{public_design(live, cores):>7.0f}   {price['busy']}")
            worst[batch] = max(worst.get(batch, 0.0), ratio)
            if (cores, name) == (48, "one adapter"):
                measure(f"multi_lora_cycles_{batch}", price["cycles"], "modelled cycles")
    for batch, ratio in worst.items():
        measure(f"multi_lora_new_over_old_{batch}", ratio, "ratio, the worst of all rows above")
    traces, names = (run_lora(emulator, Shape(1), [0]), emulator.trace(48))[1]
    sync = {cost: costs.simulate(traces, names, cost)["cycles"] for cost in (0, constants.SYNC_ALL, 2000)}
    print("batch 1 with a meeting of " + ", ".join(f"{cost} cycles: {cycles:.0f}" for cost, cycles in sync.items())
          + f"; a launch besides: {constants.LAUNCH_US} us")
    three = Shape(8, bank=8, slices=3)
    _, price = run_lora(emulator, three, np.arange(8))
    print(f"packed q, k, v of 8 rows with 8 adapters in one launch: {price['cycles']:.0f} cycles")


def print_others(emulator, measure):
    """contrastive_select, lily_mix and the two halves."""
    print(f"\n{'kernel':>18} {'batch':>5} {'bytes':>9} {'cycles':>7} {'us':>6}")
    for name, runner, batches in (
            ("contrastive_select", run_select, (1, 4, 16)), ("lily_mix", run_mix, BATCHES),
            ("lora_shrink", lambda e, b: run_lora(e, Shape(b), np.zeros(b), kernel="lora_shrink"), BATCHES),
            ("lora_expand", lambda e, b: run_lora(e, Shape(b), np.zeros(b), kernel="lora_expand"), BATCHES)):
        for batch in batches:
            report, price = runner(emulator, batch)
            print(f"{name:>18} {batch:>5} {moved(report):>9} {price['cycles']:>7.0f} "
                  f"{microseconds(price['cycles']):>6.2f}")
            if batch == batches[0]:
                measure(f"{name}_cycles_{batch}", price["cycles"], "modelled cycles")
    print("(contrastive_select: requests of two rows, a vocabulary of 151,936, float16; the others: hidden 4096, rank "
          "16)")


def print_prefill(emulator, measure):
    """The low-rank pair of 4 x 256 tokens by form."""
    tokens = 1024
    _, price = run_lora(emulator, Shape(64), np.zeros(64))
    vector = microseconds(price["cycles"]) * tokens / 64
    base = ascend_prefill.prices(tokens, HIDDEN, RANK, 4, True)["base"]
    names = [name for name in ascend_prefill.prices(tokens, HIDDEN, RANK, 4, True) if name != "base"]
    print(f"\nprefill, {tokens} tokens, hidden {HIDDEN}, rank {RANK}: base product {base:.1f} us; the pair, us (over "
          f"the base)\n{'adapters':>8} {'tensors':>11} " + " ".join(f"{name:>30}" for name in names)
          + f" {'multi_lora (vector)':>20}")
    for cached, slots in itertools.product((True, False), (1, 4, 8, 16, 32)):
        forms = ascend_prefill.prices(tokens, HIDDEN, RANK, slots, cached)
        base = forms.pop("base")
        print(f"{slots:>8} {'from cache' if cached else 'from memory':>11} " + " ".join(
            f"{f'{value:.1f} ({value / base:.3f})':>30}" for value in forms.values())
            + f" {f'{vector:.1f} ({vector / base:.3f})':>20}")
        if slots == 4:
            measure("prefill_lora_over_base" + ("" if cached else "_from_memory"), min(forms.values()) / base, "ratio")
    print(f"\npacked linears of {tokens} tokens, tensors from cache: masked dense / grouped, sorted once a model, us\n"
          + " " * 24 + " ".join(f"{f'{slots} adapters':>12}" for slots in PACKED_SLOTS))
    for name, width, out, slices in PACKED:
        pairs = (ascend_prefill.prices(tokens, width, RANK, slots, True, slices, out) for slots in PACKED_SLOTS)
        both = (f"{one['masked dense']:.1f} / {one['grouped, sorted once a model']:.1f}" for one in pairs)
        print(f"{name:>24}" + " ".join(f"{text:>12}" for text in both))
    weight = HIDDEN * HIDDEN
    plain, packed = (size / (constants.MEMORY_TB_S * 1e6) for size in (2 * weight, weight / 2 + weight / 64))
    print(f"a weight of {HIDDEN} x {HIDDEN} is read in {plain:.1f} us as float16, in {packed:.1f} us as int4 with "
          "scales of 128")


def strict_matrix(emulator):
    """(findings, launches) of the strict emulator over all kernels' shapes; slots mix three adapters and none."""
    found = launches = 0
    for place, (rank, hidden, tokens) in enumerate(itertools.product(*MATRIX.values())):
        slots = np.random.default_rng(tokens + rank).integers(-1, 3, tokens)
        shape = Shape(tokens, hidden, rank, tuple(driver.BYTES)[place % 3], 3, (1, min(3, 512 // rank))[place // 3 % 2])
        found += len(run_lora(emulator, shape, slots, (48, 40)[place % 2], trace=False)[0]["findings"])
        launches += 1
    for dtype in ("float16", "bfloat16", "float32"):
        for requests, voices, vocab in ((1, 1, 151936), (4, 2, 151936), (16, 2, 50000), (3, 8, 32000), (50, 2, 1025)):
            found += len(run_select(emulator, requests, voices, vocab, dtype, trace=False)[0]["findings"])
        for batch, kernel in itertools.product((1, 7, 70), ("lora_shrink", "lora_expand")):
            shape = Shape(batch, 1000, 24, dtype)
            found += len(run_lora(emulator, shape, np.zeros(batch), kernel=kernel, trace=False)[0]["findings"])
        for batch in (1, 7, 33):
            found += len(run_mix(emulator, batch, 3, 24, 1000, dtype, trace=False)[0]["findings"])
        launches += 5 + 6 + 3
    return found, launches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the measures to FILE")
    parser.add_argument("--quick", action="store_true", help="leave the strict matrix and the planted bugs out")
    options = parser.parse_args()
    emulator = driver.Emulator(builder.build())
    print(f"Modelled, not measured: float16, hidden {HIDDEN}, rank {RANK}, {constants.CLOCK_GHZ} GHz; the numbers and "
          "their sources: scripts/ascend_constants.py\n")
    measures = []

    def measure(name, value, unit):
        measures.append({"name": name, "value": value, "unit": unit})

    print_decode(emulator, measure)
    print_others(emulator, measure)
    print_prefill(emulator, measure)
    if not options.quick:
        found, launches = strict_matrix(emulator)
        measure("strict_findings", found, "findings")
        print(f"strict emulator over the test matrix: {found} findings in {launches} launches")
        planted = load(ROOT / "ops" / "emulator" / "planted.py", "emulator_planted")
        outcomes = planted.outcomes()
        measure("planted_bugs_caught", planted.share(outcomes), "share")
        print(f"planted bugs: {sum(one.caught for one in outcomes)} of {len(outcomes)} caught")
    print()
    for item in measures:
        print(f"{item['name']:<40} {item['value']:>12.4f} {item['unit']}")
    if options.json:
        document = {"machine": f"emulated Ascend 910B vector cores on {platform.machine()}, modelled",
                    "versions": {"python": platform.python_version(), "numpy": np.__version__}, "measures": measures}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
