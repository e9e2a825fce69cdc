#!/usr/bin/env python
"""Serving: SmolLM2-135M under load, and many adapters in one batch (random rank-16 LoRAs on all linears).

    python scripts/benchmark_serving.py --json serving.json                 this project
    python scripts/benchmark_serving.py --llama-server --json serving.json  and llama.cpp's server under the same load
    python scripts/benchmark_serving.py --peers --json serving.json         and transformers + peft with adapter_names=
    python scripts/benchmark_serving.py --quick                             the smallest run: only to see it work
    python scripts/benchmark_serving.py --only load pressure                these parts alone

What is measured, each in child processes pinned to the same processors; a measure that compares two cases is the median
of the ratios within a round, and rounds alternate their direction:

* load: 64 requests of 8 clients, each of which sends its next one when the former is answered; prompts of 16 to 512
  tokens that have no beginning in common, 64 tokens each, ends ignored. ``load_over_parts``: seconds of the same
  prompts alone (handed in at once, a token each) and of decoding alone in full batches, over those of the load.
* pressure: that load on an engine with a quarter of the blocks that its clients' longest requests would hold, against
  an engine with enough: tokens/s, the same answers.
* llama-server: that load over HTTP, by the same client, on the server of llama.cpp with as many slots and threads, in
  F32 against float32 and in Q8_0 against int8: tokens/s, time to the first text, time between two pieces of text.
* prefix: 64 contrastive requests of 16 clients over 8 adapters whose prompts share 512 tokens: the share of all rows'
  prompt tokens that were not computed again (its most: each adapter and the base compute them once); and the graphs
  that such an engine compiles until it is ready.
* ensemble: a step of one request over an ensemble of three adapters, against greedy decoding with one.
* steps: the engine with a full batch of greedy requests, all of the base model, all of one adapter, or each of another
  adapter, with bfloat16 adapters in the bank and, in an engine of its own, with float32 ones (``_float32_adapters``).
  All requests start together; a step is the difference of two runs whose answers differ by n tokens, over n, so it
  holds no prefill. peft runs the same rows, the same prompts and the same adapters.
* adapters: a load of short requests for 1, 4, 16 and 64 adapters over as many slots as rows: tokens/s, time to the
  first token, time between tokens (the gap between two pieces of a stream over the tokens that it brought), memory.
* swaps: an adapter that is neither in a slot nor in host memory is put into a slot while a batch runs; read and check,
  and the writing of the slot. The tokens of the requests beside it are compared with a run without swaps.
* memory: see serving_memory.py. The machine must have memory to spare: swapped pages are not counted.

A measure that this engine cannot give is printed as missing, with the reason, and stands under "missing" in the JSON
file.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, Worker, machine, measure, per_step, ratio, run_benchmark, table, versions
from decode_worker import write_adapter
from serving_load import FIRST_ID, VOCABULARY, percentiles
from serving_memory import measure_memory
from serving_pairs import measure_llama_server, measure_load, measure_pressure

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

KINDS = {"base": "base only", "single": "one adapter", "mixed": "one adapter each"}
#: Formats of the banks' adapters, and what a measure of theirs is called.
BANKS = {"bfloat16": "", "float32": "_float32_adapters"}
PROMPT_TOKENS = 16
#: The shared prefix: adapters, clients, rows of the batch, tokens in common, of each prompt's own, and of an answer.
PREFIX_ADAPTERS, PREFIX_CLIENTS, PREFIX_ROWS, PREFIX_TOKENS, OWN_TOKENS, PREFIX_ANSWER = 8, 16, 16, 512, 8, 16
PARTS = ("load", "pressure", "llama-server", "prefix", "ensemble", "steps", "adapters", "swaps", "memory")


class Bench:
    """What a run gathers, and the child processes that it needs.

    Attributes:
        measures, versions, more: for the JSON file; missing: {measure: why it cannot be had}.
        adapters: folder of adapter folders; folder: for other files.
    """

    def __init__(self, arguments, folder):
        self.arguments, self.folder, self.adapters = arguments, folder, folder / "adapters"
        self.measures, self.versions = [], versions("colora-ms", "mindspore", "numpy")
        self.missing, self.more = {}, {}
        self._workers = {}

    def engine(self, name, **options):
        """The worker of this name and what it answered when it was started with these options (see
        ``serving_worker.Ours.load``)."""
        if name not in self._workers:
            worker = Worker([sys.executable, ROOT / "scripts" / "serving_worker.py"], timeout=1800)
            answer = worker.ask("load", **{"rows": self.arguments.rows, "chunk": self.arguments.chunk, **options})
            self._workers[name] = worker, answer
            if "missing" not in answer:
                print(f"engine {name!r}: {answer['backend']} operators, {answer['slot_bytes'] / 2**20:.0f} MiB of "
                      f"slots, {answer['graphs']} graphs", flush=True)
        return self._workers[name]

    def bank(self, adapter_format):
        """The worker over a bank of this format. Host memory takes one adapter more than there are slots, so that more
        adapters are read from their folders."""
        return self.engine(adapter_format, longest=256, adapters=str(self.adapters), slots=self.arguments.rows,
                           adapter_format=adapter_format, host_adapters=self.arguments.rows + 1)[0]

    def close(self, *names):
        """End these workers; without names, all."""
        for name in names or list(self._workers):
            if name in self._workers:
                self._workers.pop(name)[0].close()

    def add(self, name, value, unit):
        """One measure."""
        self.measures.append(measure(name, value, unit))

    def lack(self, reason, *names):
        """These measures cannot be had."""
        for name in names:
            self.missing[name] = reason
            print(f"{name} is missing: {reason}", flush=True)


# -- adapters in one batch --------------------------------------------------------------------------------------------


def step_seconds(ask, steps, repeats):
    """{case: seconds a step of each round}.

    Args:
        ask: {case: function (tokens) -> seconds of a run whose answers have so many tokens}.
    """
    found = {case: ([], []) for case in ask}
    for number in range(repeats):
        for case in list(ask)[::-1 if number % 2 else 1]:
            for seconds, tokens in zip(found[case], (1, 1 + steps)):
                seconds.append(ask[case](tokens))
    return {case: per_step(*seconds, steps) for case, seconds in found.items()}


def start_peft(bench):
    """The worker of transformers + peft, or None."""
    from colora_ms.models.checkpoint import default_model_path

    arguments = bench.arguments
    if not arguments.peers_python.is_file():
        print(f"peft skipped: {arguments.peers_python} is not there; run bash scripts/setup_peers.sh", flush=True)
        return None
    worker = Worker([arguments.peers_python, ROOT / "scripts" / "peers_serving.py"],
                    {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    folders = [str(path) for path in sorted(bench.adapters.iterdir())[:arguments.rows]]
    answer = worker.ask("load", model=str(default_model_path()), adapters=folders, threads=arguments.threads)
    if "missing" in answer:
        print(f"peft skipped: {answer['missing']}", flush=True)
        worker.close()
        return None
    bench.versions.update({k: v for k, v in answer["versions"].items() if k != "python"})
    return worker


def measure_steps(bench):
    """Steps of full batches, with the peer if it is wanted."""
    arguments, n = bench.arguments, bench.arguments.rows
    workers = {name: bench.bank(name) for name in BANKS}
    peft = start_peft(bench) if arguments.peers else None
    if peft is not None:
        workers["peft"] = peft
    prompts = np.random.default_rng(1).integers(FIRST_ID, VOCABULARY, (n, PROMPT_TOKENS)).tolist()

    def asking(worker, kind):
        return lambda tokens: worker.ask("run", case=kind, prompts=prompts, tokens=tokens)["seconds"]

    tokens, cases = {}, {}
    for name, worker in workers.items():
        for kind in KINDS:
            tokens[name, kind] = worker.ask("run", case=kind, prompts=prompts, tokens=1 + arguments.steps)["tokens"]
            cases[name, kind] = asking(worker, kind)
    found = step_seconds(cases, arguments.steps, arguments.repeats)
    names = {**{name: f"this project, {name} adapters" for name in BANKS}, "peft": "transformers + peft"}
    print(table(("case", "engine", "rows", "step, ms", "range, ms", "tokens/s"), [
        (KINDS[kind], names[engine], n, f"{1e3 * statistics.median(steps):.2f}",
         f"{1e3 * min(steps):.1f} to {1e3 * max(steps):.1f}", f"{n / statistics.median(steps):.1f}")
        for (engine, kind), steps in found.items()]), flush=True)
    for bank, tag in BANKS.items():
        for kind in ("single", "base"):
            bench.add(f"mixed{n}_over_{kind}{tag}", ratio(found[bank, "mixed"], found[bank, kind]), "ratio")
    if peft is not None:
        bench.add(f"mixed{n}_vs_peft", ratio(found["peft", "mixed"], found["float32", "mixed"]), "ratio")
        equal = sum(a == b for a, b in zip(tokens["float32", "mixed"], tokens["peft", "mixed"]))
        bench.add("answers_equal_to_peft", equal, f"of {n} mixed rows, {1 + arguments.steps} tokens each")
        peft.close()
    bench.more["steps"] = [{"engine": e, "kind": k, "seconds": steps} for (e, k), steps in found.items()]


def measure_ensemble(bench):
    """A step of one request over three adapters, against one."""
    worker, arguments = bench.bank("float32"), bench.arguments
    prompt = np.random.default_rng(3).integers(FIRST_ID, VOCABULARY, PROMPT_TOKENS).tolist()
    answer = worker.ask("ensemble", count=3, prompt=prompt, tokens=1 + arguments.steps)
    if "missing" in answer:
        return bench.lack(answer["missing"], "ensemble3_over_greedy_1")
    worker.ask("ensemble", count=1, prompt=prompt, tokens=1 + arguments.steps)
    cases = {count: lambda tokens, count=count: worker.ask("ensemble", count=count, prompt=prompt,
                                                           tokens=tokens)["seconds"] for count in (3, 1)}
    found = step_seconds(cases, arguments.steps, arguments.repeats)
    bench.add("ensemble3_over_greedy_1", ratio(found[3], found[1]), "ratio")
    bench.more["ensemble"] = {"ensemble of 3": found[3], "greedy": found[1]}


def measure_prefix(bench):
    """Prompts that share their first tokens, and the graphs of that engine."""
    arguments = bench.arguments
    worker, answer = bench.engine("prefix", rows=PREFIX_ROWS, longest=PREFIX_TOKENS + OWN_TOKENS + PREFIX_ANSWER,
                                  adapters=str(bench.adapters), slots=PREFIX_ADAPTERS,
                                  host_adapters=PREFIX_ADAPTERS + 1)
    shares = []
    for number in range(arguments.load_repeats):
        got = worker.ask("shared_prefix", adapters=PREFIX_ADAPTERS, clients=PREFIX_CLIENTS, requests=arguments.requests,
                         prefix=PREFIX_TOKENS, own=OWN_TOKENS, tokens=PREFIX_ANSWER, seed=number)
        shares.append(got["cached"] / got["wanted"])
    bench.add("prefix_hit_share", statistics.median(shares), "ratio")
    most = 1 - ((PREFIX_ADAPTERS + 1) * PREFIX_TOKENS + 2 * arguments.requests * OWN_TOKENS) / got["wanted"]
    bench.add("prefix_hit_share_most", most, "ratio")
    bench.add("graphs_until_ready", answer["graphs"], "graphs")
    bench.add("graphs_after_requests", worker.ask("stats")["graphs"], "graphs")
    bench.close("prefix")


def measure_adapters(bench):
    """Short requests over more and more adapters."""
    engine, arguments, rows = bench.bank("float32"), bench.arguments, []
    for count in arguments.adapters:
        load = {"adapters": count, "clients": arguments.rows}
        engine.ask("adapters_under_load", **load, requests=arguments.rows, seed=99)  # the adapters get into memory
        got = engine.ask("adapters_under_load", **load, requests=arguments.requests, seed=count)
        speed, first, between = got["tokens"] / got["seconds"], percentiles(got["first"]), percentiles(got["between"])
        rows.append((count, arguments.rows, f"{speed:.1f}", *(f"{v:.0f}" for v in first),
                     *(f"{v:.1f}" for v in between), got["evictions"], f"{got['peak_bytes'] / 2**20:.0f}"))
        bench.add(f"tokens_per_second_{count}", speed, "tokens/s")
        for name, pair in (("first_token", first), ("between_tokens", between)):
            for q, value in zip((50, 99), pair):
                bench.add(f"{name}_p{q}_ms_{count}", value, "ms")
        bench.add(f"peak_memory_mib_{count}", got["peak_bytes"] / 2**20, "MiB")
    print(table(("adapters", "clients", "tokens/s", "first token p50, ms", "p99", "between tokens p50, ms", "p99",
                 "evictions", "peak RSS, MiB"), rows), flush=True)


def measure_swaps(bench):
    """Adapters put into slots beside a running batch."""
    arguments = bench.arguments
    prompts = np.random.default_rng(1).integers(FIRST_ID, VOCABULARY, (arguments.rows, PROMPT_TOKENS)).tolist()
    swaps = bench.bank("float32").ask("swaps", prompts=prompts, tokens=2 * arguments.steps, count=arguments.swaps)
    both = [a + b for a, b in zip(swaps["read_ms"], swaps["place_ms"])]
    bench.add("swap_in_ms", statistics.median(both), "ms")
    bench.add("swap_read_ms", statistics.median(swaps["read_ms"]), "ms")
    bench.add("swap_place_ms", statistics.median(swaps["place_ms"]), "ms")
    bench.add("swap_leaves_tokens_equal", swaps["same"], "1 = yes")


def measure_prefill_memory(bench):
    """Memory of a prefill in its forms."""
    found, bench.more["memory"] = measure_memory(bench.adapters)
    bench.measures += found


# -- the run ----------------------------------------------------------------------------------------------------------


def benchmark(arguments, folder):
    """(measures, versions, further entries of the JSON file)"""
    print(", ".join(f"{k} {v}" for k, v in machine().items()), flush=True)
    bench = Bench(arguments, folder)
    bench.adapters.mkdir()
    for i in range(max(*arguments.adapters, 2 * arguments.rows + 2, PREFIX_ADAPTERS)):
        write_adapter(bench.adapters / f"a{i:02d}", seed=i)
    plan = {"load": measure_load, "pressure": measure_pressure, "llama-server": measure_llama_server,
            "prefix": measure_prefix, "ensemble": measure_ensemble, "steps": measure_steps,
            "adapters": measure_adapters, "swaps": measure_swaps, "memory": measure_prefill_memory}
    try:
        for part in PARTS:
            if part in arguments.only:
                plan[part](bench)
    finally:
        bench.close()
    print(table(("measure", "value", "unit"), [(m["name"], f"{m['value']:.4g}", m["unit"]) for m in bench.measures]))
    return bench.measures, bench.versions, {"missing": bench.missing, **bench.more}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measures here")
    parser.add_argument("--llama-server", action="store_true", help="also llama.cpp's server (bash "
                                                                    "scripts/setup_peers.sh --llama-server)")
    parser.add_argument("--peers", action="store_true", help="also transformers + peft (bash scripts/setup_peers.sh)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2, help="processors to use")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch, clients, adapters in it, and slots")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64], help="adapters under load")
    parser.add_argument("--requests", type=int, default=64, help="requests of a load")
    parser.add_argument("--load-repeats", type=int, default=3, help="rounds of the loads")
    parser.add_argument("--steps", type=int, default=24, help="tokens by which the two runs of a step differ")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the steps")
    parser.add_argument("--swaps", type=int, default=20, help="adapters that are swapped in")
    parser.add_argument("--chunk", type=int, default=8, help="the engine's steps between which requests join and leave")
    parser.add_argument("--quick", action="store_true", help="a load of 8 requests, 4 steps, 1 round, 2 adapters: only "
                                                             "to see it work")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON",
                        help="the peers' Python; llama-server is looked for beside it")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.repeats, arguments.adapters, arguments.swaps = 4, 1, [2], 2
        arguments.requests, arguments.load_repeats = 8, 1
    least = min([*arguments.adapters, arguments.steps, arguments.repeats, arguments.requests, arguments.swaps,
                 arguments.load_repeats])
    if least < 1 or arguments.rows < 3:
        parser.error("--rows must be at least 3, the other numbers at least 1")
    if arguments.only is None:
        arguments.only = [part for part in PARTS if part != "llama-server" or arguments.llama_server]
    return arguments


if __name__ == "__main__":
    run_benchmark(benchmark, parse())
