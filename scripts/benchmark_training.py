#!/usr/bin/env python
"""A LoRA training step of SmolLM2-135M: rank 16 on all linears, float32, AdamW with clipping, every label counts.

    python scripts/benchmark_training.py --json training.json           this project
    python scripts/benchmark_training.py --peers --json training.json   and transformers + peft on torch, the same batch
    python scripts/benchmark_training.py --profile                      where our step's time goes
    python scripts/benchmark_training.py --packing --json packing.json  packed examples against padding in buckets,
                                                                        see packing_benchmark.py

How it measures: this project and the peer are processes of their own, pinned to the same processors, with the same
adapter, the same batch of random ids and the same settings of the optimizer. Compilation and the first step are not
timed. A round runs a few steps on either side, one side first in even rounds and the other in odd ones; tables show
medians over all steps, the ratio is the median over rounds of the ratio of the rounds' medians. Memory is the process's
peak (/proc/self/clear_refs) while steps run, compilation not included. The losses of both sides, step by step, are
compared: they must be those of the same training.

The profile times our graph whole, without the update, and without gradients, and each compiled operator of the step by
itself (through ctypes, at the step's shapes); what the operators do not explain is MindSpore's own.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import packing_benchmark
from benchmark_common import (
    ROOT,
    BenchmarkError,
    Worker,
    machine,
    measure,
    peak_bytes,
    ratio,
    reset_peak,
    run_benchmark,
    serve,
    table,
    versions,
)
from decode_worker import ADAPTER, RANK, write_adapter

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

RATE = 1e-4
VOCABULARY = 49152
#: Largest difference of a loss, relative, that the order of additions explains within the compared steps.
AGREEMENT = 2e-3


def make_batch(rows, tokens):
    """{"ids", "labels"}: nested lists (rows, tokens); each label is the next id, so none is left out."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (rows, tokens + 1))
    return {"ids": ids[:, :-1].tolist(), "labels": ids[:, 1:].tolist()}


class Ours:
    """This project; the handler of ``--child``."""

    def load(self, adapter, batch, rate, options=None):
        """-> {"backend", "trained", "compile_s", shapes for the profile}"""
        from colora_ms.adapters import load_adapter
        from colora_ms.kernels import backend
        from colora_ms.models import load_model
        from colora_ms.training.batching import Batch
        from colora_ms.training.config import OptimizerConfig
        from colora_ms.training.step import Stepper

        decoder, _ = load_model()
        load_adapter(decoder, adapter, ADAPTER, trainable=True)
        ids, labels = np.array(batch["ids"], np.int32), np.array(batch["labels"], np.int32)
        self.batch = Batch(ids, labels, np.full(len(ids), ids.shape[1], np.int32))
        self.stepper = Stepper(decoder, OptimizerConfig(learning_rate=rate, schedule="constant", warmup_ratio=0.0,
                                                        max_grad_norm=1.0, **(options or {})))
        self.done, self.first = 0, None
        start = time.perf_counter()
        self.first = self.steps(1)["losses"]
        config = decoder.config
        return {"backend": backend(), "compile_s": time.perf_counter() - start,
                "trained": sum(int(p.size) for p in self.stepper.optimizer.trained), "layers": config.num_hidden_layers,
                "hidden": config.hidden_size, "inner": config.intermediate_size, "vocab": config.vocab_size,
                "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
                "head_dim": config.head_dim}

    def steps(self, count):
        """-> {"seconds": of each step, "losses", "peak_bytes"}"""
        reset_peak()
        seconds, losses = [], []
        for _ in range(count):
            self.done += 1
            start = time.perf_counter()
            loss, _ = self.stepper([self.batch], self.done, 10**6)
            seconds.append(time.perf_counter() - start)
            losses.append(loss)
        return {"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}

    def first_loss(self):
        return self.first

    def parts(self, repeats):
        """Median seconds of the graph without gradients, with gradients, and with the update."""
        from colora_ms import runtime
        from colora_ms.training.step import EvaluationStep, GradientStep

        tensors = self.stepper.tensors(self.batch)
        found = {}
        for name, graph in (("forward and loss", EvaluationStep(self.stepper.loss_cell)),
                            ("forward and backward", GradientStep(self.stepper.loss_cell, self.stepper.optimizer))):
            seconds = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                runtime.run(graph, *tensors)[0].asnumpy()
                seconds.append(time.perf_counter() - start)
            found[name] = statistics.median(seconds[1:])
        found["whole step"] = statistics.median(self.steps(repeats)["seconds"])
        return found


# -- the profile ------------------------------------------------------------------------------------------------------


def operator_calls(shape, rows, tokens, call):
    """The distinct compiled operators of a step: [(label, calls in a step, prepared call, floating-point operations)].

    A product counts 2 operations a weight and token for its result and 2 more for the gradient of its input; the
    low-rank pair is left out.
    """
    hidden, inner, width = shape["hidden"], shape["inner"], shape["heads"] * shape["head_dim"]
    kv_width, vocab, n = shape["kv_heads"] * shape["head_dim"], shape["vocab"], rows * tokens
    random = np.random.default_rng(0)

    def floats(*size):
        return (random.standard_normal(size, np.float32) * np.float32(0.02)).astype(np.float32)

    slots, calls = np.zeros(rows, np.int32), []

    def product(label, columns, *outs):
        x, operands, inputs, grads = floats(rows, tokens, columns), [], [], [((rows, tokens, columns), "float32")]
        for out in outs:
            weight, down, up = floats(out, columns), floats(1, RANK, columns), floats(1, out, RANK)
            scale = np.ones(1, np.float32)
            linear = call.linear(weight, None, None, down, up, scale)
            operands += linear
            inputs += [floats(rows, tokens, out), *linear]
            grads += [(down.shape, "float32"), (up.shape, "float32")]
        work = 2 * n * columns * sum(outs)
        calls.append((f"{label}, forward", shape["layers"], call.Prepared(
            "multi_lora_linear", [x, slots, *operands], [((rows, tokens, out), "float32") for out in outs]), work))
        calls.append((f"{label}, backward", shape["layers"], call.Prepared(
            "multi_lora_linear_grad", [np.array([len(outs)], np.int32), x, slots, *inputs], grads), work))

    product("linear q, k, v", hidden, width, kv_width, kv_width)
    product("linear o", width, hidden)
    product("linear gate, up", hidden, inner, inner)
    product("linear down", inner, hidden)
    q, k, v = floats(rows, tokens, width), floats(rows, tokens, kv_width), floats(rows, tokens, kv_width)
    angles, lengths = floats(tokens, shape["head_dim"] // 2), np.full(rows, tokens, np.int32)
    lse = ((rows, shape["heads"], tokens), "float32")
    forward = call.Prepared("causal_attention", [q, k, v, angles, angles, lengths], [(q.shape, "float32"), lse])
    out, sums = (array.copy() for array in forward())
    calls.append(("causal_attention, forward", shape["layers"], forward, None))
    calls.append(("causal_attention, backward", shape["layers"], call.Prepared(
        "causal_attention_grad", [q, k, v, angles, angles, lengths, out, sums, floats(*q.shape)],
        [(q.shape, "float32"), (k.shape, "float32"), (v.shape, "float32")]), None))
    gate, up = floats(rows, tokens, inner), floats(rows, tokens, inner)
    calls.append(("swiglu, forward", shape["layers"], call.Prepared("swiglu", [gate, up], [(gate.shape, "float32")]),
                  None))
    calls.append(("swiglu, backward", shape["layers"], call.Prepared(
        "swiglu_grad", [gate, up, floats(*gate.shape)], [(gate.shape, "float32")] * 2), None))
    x, weight, eps = floats(rows, tokens, hidden), floats(hidden), np.array(1e-5, np.float32)
    calls.append(("rms_norm_residual, forward", 2 * shape["layers"] + 1, call.Prepared(
        "rms_norm_residual", [x, x, weight, eps], [(x.shape, "float32")] * 2 + [((rows, tokens), "float32")]), None))
    calls.append(("rms_norm_residual, backward", 2 * shape["layers"] + 1, call.Prepared(
        "rms_norm_grad", [x, weight, np.ones((rows, tokens), np.float32), x, x], [(x.shape, "float32")]), None))
    flat, head = floats(n, hidden), floats(vocab, hidden)
    labels = random.integers(0, vocab, n).astype(np.int32)
    calls.append(("linear_cross_entropy, both ways", 1, call.Prepared(
        "linear_cross_entropy", [flat, labels, *call.table(head)],
        [((1,), "float32"), ((1,), "float32"), (flat.shape, "float32"), ((n,), "float32"), ((n,), "float32")]),
        4 * n * hidden * vocab))
    return calls


def profile(worker, shape, rows, tokens, repeats):
    """Print the parts of our step and its operators; returns measures."""
    parts = worker.ask("parts", repeats=repeats)
    lines = [(name, f"{seconds:.3f}", f"{100 * seconds / parts['whole step']:.0f} %")
             for name, seconds in parts.items()]
    print("\nOur step by parts (graphs of their own):\n\n" + table(("part", "s", "of the step"), lines), flush=True)
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import call

    found, total = [], 0.0
    for label, count, run, work in operator_calls(shape, rows, tokens, call):
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        each = statistics.median(seconds[1:])
        total += count * each
        found.append((label, count, each, work))
    whole = parts["whole step"]
    lines = [(label, count, f"{1e3 * each:.2f}", f"{1e3 * count * each:.0f}", f"{100 * count * each / whole:.0f} %",
              f"{work / each / 1e9:.0f}" if work else None) for label, count, each, work in found]
    lines.append(("sum", None, None, f"{1e3 * total:.0f}", f"{100 * total / whole:.0f} %", None))
    lines.append(("the graph's step", None, None, f"{1e3 * whole:.0f}", None, None))
    print("\nCompiled operators of a step, each called by itself:\n\n"
          + table(("operator", "calls", "ms a call", "ms a step", "of the step", "GFLOP/s"), lines), flush=True)
    return [measure("train_operators_share", total / whole, "ratio"),
            measure("train_forward_share", parts["forward and loss"] / whole, "ratio")]


# -- the whole --------------------------------------------------------------------------------------------------------


def start_peer(arguments, adapter, batch):
    """(worker, versions), or (None, {}) with a message."""
    from colora_ms.models.checkpoint import default_model_path

    if not arguments.peers_python.is_file():
        print(f"peft skipped: {arguments.peers_python.name} is not there; run bash scripts/setup_peers.sh", flush=True)
        return None, {}
    worker = Worker([arguments.peers_python, ROOT / "scripts" / "peers_training.py"],
                    {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    answer = worker.ask("load", model=default_model_path(), adapter=str(adapter), batch=batch, rate=RATE,
                        threads=arguments.threads)
    if "missing" in answer:
        print(f"peft skipped: {answer['missing']}", flush=True)
        worker.close()
        return None, {}
    return worker, {k: v for k, v in answer["versions"].items() if k != "python"}


def benchmark(arguments, folder):
    """Run what the arguments ask for; returns (measures, versions, more for the JSON file)."""
    from colora_ms.kernels.aot import library_path

    os.environ["COLORA_CPU_LIBRARY"] = str(library_path().resolve())
    adapter, batch = folder / "adapter", make_batch(arguments.rows, arguments.tokens)
    write_adapter(adapter)
    workers = {"colora_ms": Worker([sys.executable, __file__, "--child"], timeout=1800)}
    information = workers["colora_ms"].ask("load", adapter=str(adapter), batch=batch, rate=RATE)
    if information["backend"] != "cpu":
        print(f"warning: it runs on the {information['backend']} kernels, not on the compiled ones")
    used = versions("colora-ms", "mindspore", "numpy")
    if arguments.peers:
        peer, more = start_peer(arguments, adapter, batch)
        if peer is not None:
            workers["peft"], used = peer, {**used, **more}
    host = machine()
    print(f"\n{host['cpu']}, {arguments.threads} threads, {host['memory_gib']} GiB; "
          + ", ".join(f"{k} {v}" for k, v in used.items())
          + f"; {arguments.rows} x {arguments.tokens} tokens, {arguments.repeats} rounds of {arguments.steps}",
          flush=True)
    losses = {"colora_ms": workers["colora_ms"].ask("first_loss")}
    if "peft" in workers:
        losses["peft"] = workers["peft"].ask("steps", count=1)["losses"]
    seconds, peaks = {name: [] for name in workers}, dict.fromkeys(workers, 0)
    try:
        for number in range(arguments.repeats):
            for name in sorted(workers, reverse=bool(number % 2)):
                answer = workers[name].ask("steps", count=arguments.steps)
                seconds[name].append(answer["seconds"])
                losses[name] += answer["losses"]
                peaks[name] = max(peaks[name], answer["peak_bytes"])
        measures = report(arguments, information, seconds, losses, peaks)
        if arguments.profile:
            measures += profile(workers["colora_ms"], information, arguments.rows, arguments.tokens, arguments.repeats)
    finally:
        for worker in workers.values():
            worker.close()
    print("\n" + table(("measure", "value", "unit"), [(m["name"], f"{m['value']:.4g}", m["unit"]) for m in measures]))
    return measures, used, {"seconds": seconds, "losses": losses}


def report(arguments, information, seconds, losses, peaks):
    """Print the table of both sides; the measures."""
    tokens = arguments.rows * arguments.tokens
    lines, medians = [], {}
    for name, rounds in seconds.items():
        every = [one for part in rounds for one in part]
        medians[name] = [statistics.median(part) for part in rounds]
        middle = statistics.median(every)
        lines.append((name, f"{middle:.3f}", f"{min(every):.3f} to {max(every):.3f}", f"{tokens / middle:.0f}",
                      f"{peaks[name] / 2**20:.0f}", " ".join(f"{one:.4f}" for one in losses[name][:3])))
    print("\n" + table(("", "s a step", "range, s", "tokens/s", "peak RSS, MiB", "first losses"), lines), flush=True)
    measures = [measure("train_step_s", statistics.median(medians["colora_ms"]), "s"),
                measure("train_first_step_s", information["compile_s"], "s"),
                measure("train_peak_mib", peaks["colora_ms"] / 2**20, "MiB")]
    if "peft" in seconds:
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses["colora_ms"], losses["peft"]))
        if apart > AGREEMENT:
            raise BenchmarkError(f"the losses of both sides differ by {apart:.1%}: they do not train the same thing, "
                                 "so their times cannot be compared")
        measures += [measure("train_step_vs_peft", ratio(medians["peft"], medians["colora_ms"]), "ratio"),
                     measure("peft_train_step_s", statistics.median(medians["peft"]), "s"),
                     measure("train_peak_vs_peft", peaks["colora_ms"] / peaks["peft"], "ratio"),
                     measure("train_loss_difference", apart, "relative")]
    return measures


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also run transformers + peft")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and measures there")
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=2, help="steps of either side in a round")
    parser.add_argument("--packing", action="store_true", help="measure packing against padding in buckets instead")
    parser.add_argument("--data", type=Path, metavar="FILE", help="with --packing: JSON lines to train on (default: "
                                                                  "GSM8K's training file in ../shared)")
    parser.add_argument("--batches", type=int, default=16, help="with --packing: padded batches of a pass, about")
    parser.add_argument("--buckets", type=int, default=3, help="with --packing: lengths of the padded side, at most")
    parser.add_argument("--max-length", type=int, default=1024, help="with --packing: longer examples are left out")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="2 x 16 tokens, 1 round of 1 step: only to see it work")
    parser.add_argument("--profile", action="store_true", help="time the parts and the operators of our step")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", metavar="PYTHON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.tokens, arguments.steps, arguments.repeats = 2, 16, 1, 1
        arguments.batches = 3
    if min(arguments.rows, arguments.tokens, arguments.steps, arguments.repeats, arguments.batches,
           arguments.buckets) < 1:
        parser.error("--rows, --tokens, --steps, --repeats, --batches and --buckets must be at least 1")
    return arguments


def main():
    arguments = parse()
    if arguments.child:
        return serve(Ours())
    run_benchmark(packing_benchmark.benchmark if arguments.packing else benchmark, arguments)


if __name__ == "__main__":
    main()
