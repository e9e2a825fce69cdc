#!/usr/bin/env python
"""Serving many adapters: SmolLM2-135M, float32, random rank-16 LoRAs on all linears, requests mixed in one batch.

    python scripts/benchmark_serving.py --json serving.json            this project
    python scripts/benchmark_serving.py --peers --json serving.json    and transformers + peft with adapter_names=
    python scripts/benchmark_serving.py --quick                        the smallest run: only to see it work

What is measured, each in child processes pinned to the same processors:

* Steps: the engine with a full batch of greedy requests, all of the base model, all of one adapter, or each of another
  adapter, with float32 adapters in the bank and, in an engine of its own, with bfloat16 ones. All requests are handed
  in while the engine's thread stands still, so that they start together; a step is the difference of two runs whose
  answers differ by n tokens, over n, so it holds no prefill. Rounds alternate their direction; a measure that compares
  two cases is the median of the ratios within a round. peft runs the same rows, the same prompts and the same adapters.
* Load: as many clients as the batch has rows, each of which sends its next request when the former is answered, for
  1, 4, 16 and 64 adapters over as many slots as rows: tokens/s, time to the first token, time between tokens (the gap
  between two pieces of a stream over the tokens that it brought), peak memory.
* Memory: the peak of the second prefill of 8 rows with 256 tokens, in a process of its own: with the multi-adapter
  operator, and with linears that gather each row's matrices and multiply them in batches. Each is compared with a
  process that has loaded the same adapters and runs the same graph without their products. The machine must have memory
  to
  spare: pages that are swapped out are not counted.
* Swaps: an adapter that is neither in a slot nor in host memory is put into a slot while a batch runs; read and check,
  and the writing of the slot. The tokens of the requests beside it are compared with a run without swaps.
"""

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np

from benchmark_common import (
    ROOT,
    BenchmarkError,
    Worker,
    machine,
    measure,
    peak_bytes,
    per_step,
    ratio,
    reset_peak,
    run_benchmark,
    serve,
    table,
    versions,
)
from decode_worker import RANK, write_adapter

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

KINDS = {"base": "base only", "single": "one adapter", "mixed": "one adapter each"}
PROMPT_TOKENS, ANSWER_TOKENS = 16, 32
MEMORY_ROWS, MEMORY_TOKENS = 8, 256
#: The forms of a prefill, and the one without adapters whose graph is otherwise the same.
MEMORY_FORMS = {"operator": "base", "gather": "base, a linear at a time"}
VOCABULARY = 49152


# -- what runs in child processes -------------------------------------------------------------------------------------


class Ours:
    """An engine over a bank; the handler of ``--child engine``."""

    def load(self, adapters, rows, slots, chunk, host_adapters, adapter_format):
        """adapters: folder of adapter folders; host_adapters: how many of them host memory takes."""
        from colora_ms.kernels import backend
        from colora_ms.models import load_model
        from colora_ms.serving import AdapterBank, Engine

        decoder, tokenizer = load_model()
        one = sum(file.stat().st_size for file in next(Path(adapters).iterdir()).iterdir())
        self.bank = AdapterBank(decoder, adapters, max_loaded=slots, max_rank=RANK, host_bytes=int(one * host_adapters),
                                adapter_format=adapter_format)
        self.engine = Engine(decoder, tokenizer, self.bank, rows=rows, max_length=256, chunk=chunk)
        self.engine.warm_up()
        self.names = self.bank.names()
        return {"backend": backend(), "slot_bytes": self.bank.slot_bytes}

    def names_of(self, case, rows):
        return {"base": [None] * rows, "single": self.names[:1] * rows, "mixed": self.names[:rows]}[case]

    def run(self, case, prompts, tokens):
        """Seconds from the start of a full batch to its last token."""
        names = self.names_of(case, len(prompts))
        for name in set(names) - {None}:
            self.bank.resolve(name)
        handles, start = self.engine.call(lambda: (
            [self.engine.submit(ids, adapter=name, max_new_tokens=tokens, ignore_eos=True)
             for ids, name in zip(prompts, names)], time.perf_counter()))
        answers = [handle.result(600) for handle in handles]
        return {"seconds": time.perf_counter() - start, "tokens": [list(map(int, a.tokens)) for a in answers]}

    def load_test(self, adapters, clients, requests, seed):
        """Closed loop: every client sends its next request when the former is answered."""
        random = np.random.default_rng(seed)
        work = [(random.integers(16, VOCABULARY, random.integers(8, 64)).tolist(), self.names[i % adapters])
                for i in range(requests)]
        first, between, lock = [], [], threading.Lock()
        position = iter(work)

        def client():
            while True:
                with lock:
                    item = next(position, None)
                if item is None:
                    return
                handle = self.engine.submit(item[0], adapter=item[1], max_new_tokens=ANSWER_TOKENS, ignore_eos=True)
                last, gaps = None, []
                for piece in handle.pieces(600):
                    now = time.monotonic()
                    if last is not None and piece.tokens:
                        gaps += [(now - last) / len(piece.tokens)] * len(piece.tokens)
                    last = now
                with lock:
                    first.append(handle.timing.first_token - handle.timing.submitted)
                    between.extend(gaps)

        reset_peak()
        before = self.bank.info()
        start = time.perf_counter()
        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        after = self.bank.info()
        return {"seconds": seconds, "tokens": requests * ANSWER_TOKENS, "first": first, "between": between,
                "evictions": after["evictions"] - before["evictions"], "peak_bytes": peak_bytes()}

    def swaps(self, prompts, tokens, count):
        """Put other adapters into slots while a batch runs.

        The batch takes all rows but one; the swapped adapters answer in that one, a token each.
        """
        def batch():
            return [self.engine.submit(ids, adapter=self.names[0], max_new_tokens=tokens, ignore_eos=True)
                    for ids in prompts[:-1]]

        def answers(handles):
            return [handle.result(600).tokens for handle in handles]

        wanted = answers(batch())
        running, read, place, same = batch(), [], [], True
        for i in range(count):
            if all(handle.done for handle in running):
                same = answers(running) == wanted and same
                running = batch()
            name = next((name for name in self.names[1:] if self._state(name) == "disk"), None)
            if name is None:
                raise BenchmarkError("no adapter is left on disk alone; give more adapters than slots and host memory "
                                     "hold")
            for file in (self.bank.folder / name).iterdir():
                file.read_bytes()  # into the page cache
            self.engine.submit(prompts[-1], adapter=name, max_new_tokens=1).result(600)
            info = self.bank.info()
            read.append(info["read_ms"])
            place.append(info["place_ms"])
        return {"read_ms": read, "place_ms": place, "same": answers(running) == wanted and same}

    def _state(self, name):
        return next(one["state"] for one in self.bank.info()["adapters"] if one["name"] == name)


# What stands in the place of LoraLinear's methods; the graph's parser wants functions whose first parameter is
# ``self``.


def _base_operands(self):
    return self.base_layer.operands()


def _base_product(self, x, slots):
    return self.base_layer(x, slots)


def _gather_product(self, x, slots):
    return self.base_layer(x, slots) + low_rank_reference(x, slots, self.down, self.up, self.scale)


class Memory:
    """One prefill in one form, in a process that has done nothing else; the handler of ``--child memory``."""

    def run(self, form, adapters):
        """Bytes of the peak of the second prefill."""
        global low_rank_reference  # for _gather_product
        import mindspore as ms
        from mindspore import Tensor

        from colora_ms import runtime
        from colora_ms.adapters.lora import LoraLinear
        from colora_ms.kernels.lora import low_rank_reference
        from colora_ms.models import KeyValueCache, load_model
        from colora_ms.serving import AdapterBank
        from colora_ms.serving.graphs import Prefill

        if form != "operator":
            LoraLinear.operands = _base_operands
        if form in ("gather", MEMORY_FORMS["gather"]):
            LoraLinear.fusible = False
            LoraLinear.product = _gather_product if form == "gather" else _base_product
        decoder, _ = load_model(max_positions=MEMORY_TOKENS)
        bank = AdapterBank(decoder, adapters, max_loaded=MEMORY_ROWS, max_rank=RANK, host_bytes=1 << 25)
        slots = np.array([bank.lease(bank.resolve(name)).slot for name in bank.names()[:MEMORY_ROWS]], np.int32)
        graph = Prefill(decoder, KeyValueCache(decoder.config, MEMORY_ROWS, MEMORY_TOKENS, ms.float32)).set_train(False)
        ids = np.random.default_rng(0).integers(16, VOCABULARY, (MEMORY_ROWS, MEMORY_TOKENS)).astype(np.int32)
        rows = np.arange(MEMORY_ROWS, dtype=np.int32)
        arguments = [Tensor(a) for a in (ids, slots, rows, rows * 0, rows * 0 + MEMORY_TOKENS)]
        runtime.run(graph, *arguments).asnumpy()
        reset_peak()
        runtime.run(graph, *arguments).asnumpy()
        return peak_bytes()


# -- measuring --------------------------------------------------------------------------------------------------------


def measure_steps(workers, prompts, steps, repeats):
    """{(engine, kind): {"short", "long": seconds of each round, "tokens"}}"""
    found = {(engine, kind): {"short": [], "long": []} for engine in workers for kind in KINDS}
    for (engine, kind), case in found.items():
        case["tokens"] = workers[engine].ask("run", case=kind, prompts=prompts, tokens=1 + steps)["tokens"]
        workers[engine].ask("run", case=kind, prompts=prompts, tokens=1)
    for number in range(repeats):
        for (engine, kind), case in list(found.items())[::-1 if number % 2 else 1]:
            for name, tokens in (("short", 1), ("long", 1 + steps)):
                case[name].append(workers[engine].ask("run", case=kind, prompts=prompts, tokens=tokens)["seconds"])
    for case in found.values():
        case["steps"] = per_step(case["short"], case["long"], steps)
    return found


def step_table(found, rows):
    names = {"ours": "this project", "half": "this project, bfloat16 adapters", "peft": "transformers + peft"}
    return table(("case", "engine", "rows", "step, ms", "range, ms", "tokens/s"), [
        (KINDS[kind], names[engine], rows, f"{1e3 * statistics.median(case['steps']):.2f}",
         f"{1e3 * min(case['steps']):.1f} to {1e3 * max(case['steps']):.1f}",
         f"{rows / statistics.median(case['steps']):.1f}")
        for (engine, kind), case in found.items()])


def percentiles(seconds):
    """p50 and p99 in milliseconds."""
    return [1e3 * float(np.percentile(seconds, q)) for q in (50, 99)]


def start_engine(arguments, adapters, adapter_format="float32"):
    worker = Worker([sys.executable, __file__, "--child", "engine"], timeout=1800)
    # Host memory takes one adapter more than there are slots, so that more adapters are read from their folders.
    answer = worker.ask("load", adapters=str(adapters), rows=arguments.rows, slots=arguments.rows,
                        chunk=arguments.chunk,
                        host_adapters=arguments.rows + 1, adapter_format=adapter_format)
    print(f"engine with the {answer['backend']} operators, {arguments.rows} {adapter_format} slots of "
          f"{answer['slot_bytes'] / 2**20:.0f} MiB in all", flush=True)
    return worker


def start_peft(arguments, adapters):
    """The worker of transformers + peft and its versions, or (None, {})."""
    from colora_ms.models.checkpoint import default_model_path

    if not arguments.peers_python.is_file():
        print(f"peft skipped: {arguments.peers_python} is not there; run bash scripts/setup_peers.sh", flush=True)
        return None, {}
    worker = Worker([arguments.peers_python, ROOT / "scripts" / "peers_serving.py"],
                    {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    folders = [str(path) for path in sorted(adapters.iterdir())[:arguments.rows]]
    answer = worker.ask("load", model=str(default_model_path()), adapters=folders, threads=arguments.threads)
    if "missing" in answer:
        print(f"peft skipped: {answer['missing']}", flush=True)
        worker.close()
        return None, {}
    return worker, {k: v for k, v in answer["versions"].items() if k != "python"}


def benchmark(arguments, adapters):
    """(measures, versions, further entries of the JSON file)"""
    print(", ".join(f"{k} {v}" for k, v in machine().items()), flush=True)
    count = max(*arguments.adapters, 2 * arguments.rows + 2)
    for i in range(count):
        write_adapter(adapters / f"a{i:02d}", seed=i)
    measures, more, used = [], {}, versions("colora-ms", "mindspore", "numpy")
    memory = measure_memory(adapters)
    measures += memory[0]
    more["memory"] = memory[1]
    if arguments.only_memory:
        return measures, used, more

    workers = {"ours": start_engine(arguments, adapters), "half": start_engine(arguments, adapters, "bfloat16")}
    if arguments.peers:
        peft, found = start_peft(arguments, adapters)
        used.update(found)
        if peft is not None:
            workers["peft"] = peft
    random = np.random.default_rng(1)
    prompts = random.integers(16, VOCABULARY, (arguments.rows, PROMPT_TOKENS)).tolist()
    found = measure_steps(workers, prompts, arguments.steps, arguments.repeats)
    print(step_table(found, arguments.rows), flush=True)
    n = arguments.rows
    mixed = found["ours", "mixed"]["steps"]
    for engine, tag in (("ours", ""), ("half", "_bfloat16_adapters")):
        for kind in ("single", "base"):
            value = ratio(found[engine, "mixed"]["steps"], found[engine, kind]["steps"])
            measures.append(measure(f"mixed{n}_over_{kind}{tag}", value, "ratio"))
    workers.pop("half").close()
    if "peft" in workers:
        measures.append(measure(f"mixed{n}_vs_peft", ratio(found["peft", "mixed"]["steps"], mixed), "ratio"))
        ours, theirs = found["ours", "mixed"]["tokens"], found["peft", "mixed"]["tokens"]
        equal = sum(a == b for a, b in zip(ours, theirs))
        measures.append(measure("answers_equal_to_peft", equal,
                                f"of {n} mixed rows, {1 + arguments.steps} tokens each"))
        workers.pop("peft").close()
    more["steps"] = [{"engine": e, "kind": k, "seconds": case["steps"]} for (e, k), case in found.items()]

    engine, rows = workers["ours"], []
    for adapters_used in arguments.adapters:
        engine.ask("load_test", adapters=adapters_used, clients=n, requests=n, seed=99)  # the adapters get into memory
        got = engine.ask("load_test", adapters=adapters_used, clients=n, requests=arguments.requests,
                         seed=adapters_used)
        speed, first, between = got["tokens"] / got["seconds"], percentiles(got["first"]), percentiles(got["between"])
        rows.append((adapters_used, n, f"{speed:.1f}", *(f"{v:.0f}" for v in first), *(f"{v:.1f}" for v in between),
                     got["evictions"], f"{got['peak_bytes'] / 2**20:.0f}"))
        measures += [measure(f"tokens_per_second_{adapters_used}", speed, "tokens/s"),
                     measure(f"first_token_p50_ms_{adapters_used}", first[0], "ms"),
                     measure(f"first_token_p99_ms_{adapters_used}", first[1], "ms"),
                     measure(f"between_tokens_p50_ms_{adapters_used}", between[0], "ms"),
                     measure(f"between_tokens_p99_ms_{adapters_used}", between[1], "ms"),
                     measure(f"peak_memory_mib_{adapters_used}", got["peak_bytes"] / 2**20, "MiB")]
    print(table(("adapters", "clients", "tokens/s", "first token p50, ms", "p99", "between tokens p50, ms", "p99",
                 "evictions",
                 "peak RSS, MiB"), rows), flush=True)

    swaps = engine.ask("swaps", prompts=prompts, tokens=2 * arguments.steps, count=arguments.swaps)
    both = [a + b for a, b in zip(swaps["read_ms"], swaps["place_ms"])]
    measures += [measure("swap_in_ms", statistics.median(both), "ms"),
                 measure("swap_read_ms", statistics.median(swaps["read_ms"]), "ms"),
                 measure("swap_place_ms", statistics.median(swaps["place_ms"]), "ms"),
                 measure("swap_leaves_tokens_equal", swaps["same"], "1 = yes")]
    engine.close()
    print(table(("measure", "value", "unit"), [(m["name"], f"{m['value']:.4g}", m["unit"]) for m in measures]))
    return measures, used, more


def measure_memory(adapters):
    """(measures, peaks in bytes) of the prefill in all forms."""
    peaks = {}
    for form in (*MEMORY_FORMS, *MEMORY_FORMS.values()):
        # Without kept graphs: their key does not know that a form has replaced methods of the Cells.
        worker = Worker([sys.executable, __file__, "--child", "memory"], {"COLORA_COMPILE_CACHE": "0"}, timeout=1800)
        peaks[form] = worker.ask("run", form=form, adapters=str(adapters))
        worker.close()
    extra = {form: peaks[form] - peaks[base] for form, base in MEMORY_FORMS.items()}
    print(table(("prefill 8 x 256", "peak RSS, MiB", "more than without adapters, MiB"), [
        (form, f"{one / 2**20:.0f}", f"{extra[form] / 2**20:.1f}" if form in extra else None)
        for form, one in peaks.items()]), flush=True)
    measures = [measure(f"extra_memory_{form}_mib", value / 2**20, "MiB") for form, value in extra.items()]
    if extra["gather"] <= 0:
        print("extra_memory_vs_gather is left out: the gather form used no more memory than the base", flush=True)
        return measures, peaks
    return [*measures, measure("extra_memory_vs_gather", max(extra["operator"], 0) / extra["gather"], "ratio")], peaks


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measures here")
    parser.add_argument("--peers", action="store_true", help="also transformers + peft (bash scripts/setup_peers.sh)")
    parser.add_argument("--threads", type=int, default=2, help="processors to use")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch, adapters in it, and slots")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64], help="adapters under load")
    parser.add_argument("--requests", type=int, default=64, help="requests a load test")
    parser.add_argument("--steps", type=int, default=24, help="tokens by which the two runs of a step differ")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--swaps", type=int, default=20, help="adapters that are swapped in")
    parser.add_argument("--chunk", type=int, default=8, help="the engine's steps between which requests join and leave")
    parser.add_argument("--quick", action="store_true", help="4 steps, 1 round, 2 adapters under load: only to see it "
                                                             "work")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON")
    parser.add_argument("--only-memory", action="store_true", help="measure the memory alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.repeats, arguments.adapters, arguments.requests, arguments.swaps = 4, 1, [2], 8, 2
    least = min([*arguments.adapters, arguments.steps, arguments.repeats, arguments.requests, arguments.swaps])
    if least < 1 or arguments.rows < 2:
        parser.error("--rows must be at least 2, the other numbers at least 1")
    return arguments


def main():
    arguments = parse()
    if arguments.child:
        return serve({"engine": Ours, "memory": Memory}[arguments.child]())
    run_benchmark(benchmark, arguments)


if __name__ == "__main__":
    main()
