"""Packing against padding in buckets: what ``benchmark_training.py --packing`` runs.

A LoRA of SmolLM2-135M (rank 16 on all linears) is trained on the examples of GSM8K's training file by the project's own
loader in two ways: padded, with its default of 3 buckets, and packed, with ``data.packing: true``. How it is made fair:

* The examples are the same ones on both sides: of each bucket as many whole batches as its share of the whole file,
  drawn by a fixed seed, so that the padded side has no partial batch and the padding of the whole file. Nothing is left
  out for its length (``--max-length`` is above the longest example; lower ones are for other questions). What share of
  the whole file's batches is real tokens is printed beside the sample's.
* A batch has about the same number of tokens on both sides, padding included: the padded side has ``--rows`` rows, the
  packed side as many rows of the longest example as come nearest, which the trainer lays out (``packed_shape``).
* Both sides make the same update from all examples, batch by batch (gradient accumulation), by one stepper; behind each
  round the parameters are set back. The losses of both sides, which are sums over the same answer tokens at the same
  parameters, must agree to 1e-5, or there is no result.
* One round times one pass of either side, padded first in even rounds and packed first in odd ones; compilation and a
  pass over one batch of each shape come before. The speedup is the median over rounds of the ratio of real tokens a
  second.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, BenchmarkError, Worker, machine, measure, ratio, serve, table, versions
from decode_worker import ADAPTER, write_adapter

DATA = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"

#: Largest relative difference of the loss of both sides.
AGREEMENT = 1e-5


def whole_batches(sizes, buckets, rows, batches, seed=0):
    """Positions of the examples of about ``batches`` full batches, of each bucket by its share of all examples.

    Args:
        sizes: fed tokens of all examples; buckets: rising lengths; rows: rows of a batch.

    Returns:
        sorted list of int.
    """
    order = np.random.default_rng(seed).permutation(len(sizes))
    place = np.searchsorted(buckets, np.asarray(sizes)[order])
    chosen = []
    for number in range(len(buckets)):
        inside = order[place == number]
        wanted = min(max(1, round(batches * len(inside) / len(sizes))), len(inside) // rows)
        chosen += inside[:wanted * rows].tolist()
    return sorted(chosen)


class Packing:
    """The child process: both sides on one model."""

    def load(self, adapter, data, max_length, rows, batches, max_buckets, rate):
        """-> what the tables say of data and batches"""
        from colora_ms.adapters import load_adapter
        from colora_ms.kernels import backend
        from colora_ms.models import load_model
        from colora_ms.training.batching import BatchLoader
        from colora_ms.training.config import DataConfig, OptimizerConfig
        from colora_ms.training.data import encode_examples, load_examples, make_template
        from colora_ms.training.packing import fed_tokens, packed_shape
        from colora_ms.training.step import Stepper

        decoder, tokenizer = load_model()
        with open(data, encoding="utf-8") as file:
            first = json.loads(file.readline())
        keys = {"prompt_key": "question", "completion_key": "answer"} if "question" in first else {}
        examples = load_examples({"kind": "jsonl", "path": data, **keys})
        encoded = encode_examples(examples, tokenizer, make_template(DataConfig.template, tokenizer), max_length)
        sizes = [fed_tokens(item) for item in encoded.items]
        whole = BatchLoader(encoded, rows, max_buckets=max_buckets)
        chosen = whole_batches(sizes, whole.buckets, rows, batches)
        items = [encoded[k] for k in chosen]
        padded = list(BatchLoader(items, rows, buckets=whole.buckets).epoch_batches())
        area = np.mean([batch.ids.size for batch in padded])
        packed_rows, length = packed_shape(encoded.items, max(1, round(area / whole.buckets[-1])))
        packed = list(BatchLoader(items, packed_rows, buckets=[length], packing=True).epoch_batches())
        self.sides = {"padded": padded, "packed": packed}
        load_adapter(decoder, adapter, ADAPTER, trainable=True)
        # Any number above 1: the stepper adds up whatever batches it is given.
        self.stepper = Stepper(decoder, OptimizerConfig(learning_rate=rate, accumulation_steps=2))
        self.start = [item.asnumpy().copy() for item in self.stepper.optimizer.trained]
        began = time.perf_counter()
        for side in self.sides.values():
            self._update(list({batch.ids.shape: batch for batch in side}.values()))
        return {
            "backend": backend(), "compile_s": time.perf_counter() - began, "examples": len(items), "of": len(encoded),
            "left_out": len(encoded.skipped),
            "whole": {"padded": _fill(whole.epoch_batches()), "packed": _fill(BatchLoader(
                encoded, packed_rows, buckets=[length], packing=True).epoch_batches())},
            "sides": {name: {"fill": _fill(side), "batches": len(side), "tokens": sum(batch.tokens for batch in side),
                             "shapes": _shapes(side)} for name, side in self.sides.items()}}

    def _update(self, batches):
        from mindspore import Tensor

        loss, norm = self.stepper(batches, 1, 10**6)
        for item, value in zip(self.stepper.optimizer.trained, self.start):
            item.set_data(Tensor(value))
        return loss, norm

    def one_pass(self, side):
        """-> {"seconds", "loss": mean over the answer tokens, "norm": of its gradient}"""
        batches = self.sides[side]
        began = time.perf_counter()
        loss, norm = self._update(batches)
        return {"seconds": time.perf_counter() - began, "loss": loss, "norm": norm}


def _fill(batches):
    real, area = np.sum([(batch.tokens, batch.ids.size) for batch in batches], 0)
    return float(real / area)


def _shapes(batches):
    shapes = {}
    for batch in batches:
        shapes[batch.ids.shape] = shapes.get(batch.ids.shape, 0) + 1
    return ", ".join(f"{count} of {rows} x {tokens}" for (rows, tokens), count in sorted(shapes.items()))


def benchmark(arguments, folder):
    """Run it; returns (measures, versions, more for the JSON file)."""
    data = arguments.data or DATA
    if not Path(data).is_file():
        raise BenchmarkError(f"the data file {data} is not there: name a JSON lines file with prompt and completion "
                             "(or question and answer) with --data")
    write_adapter(folder / "adapter")
    worker = Worker([sys.executable, __file__, "--child"], timeout=3600)
    try:
        found = worker.ask("load", adapter=str(folder / "adapter"), data=str(Path(data).resolve()),
                           max_length=arguments.max_length, rows=arguments.rows, batches=arguments.batches,
                           max_buckets=arguments.buckets, rate=1e-4)
        if found["backend"] != "cpu":
            print(f"warning: it runs on the {found['backend']} kernels, not on the compiled ones")
        host, used = machine(), versions("colora-ms", "mindspore", "numpy")
        print(f"\n{host['cpu']}, {arguments.threads} threads, {host['memory_gib']} GiB; "
              + ", ".join(f"{k} {v}" for k, v in used.items())
              + f"; {found['examples']} of {found['of']} examples ({found['left_out']} too long), {arguments.repeats} "
                f"rounds; compiled in {found['compile_s']:.0f} s", flush=True)
        rounds = {"padded": [], "packed": []}
        for number in range(arguments.repeats):
            for side in sorted(rounds, reverse=not number % 2):
                rounds[side].append(worker.ask("one_pass", side=side))
            print(f"round {number + 1}: " + ", ".join(f"{side} {passes[-1]['seconds']:.2f} s"
                                                      for side, passes in rounds.items()),
                  flush=True)
    finally:
        worker.close()
    measures = report(found, rounds)
    print("\n" + table(("measure", "value", "unit"), [(m["name"], f"{m['value']:.6g}", m["unit"]) for m in measures]))
    return measures, used, {"rounds": rounds, "batches": found["sides"]}


def report(found, rounds):
    """Print the table of both sides; the measures.

    Raises:
        BenchmarkError: the sides have other losses, or other numbers of real tokens.
    """
    lines, seconds = [], {name: [one["seconds"] for one in passes] for name, passes in rounds.items()}
    for name, side in found["sides"].items():
        middle = statistics.median(seconds[name])
        first = rounds[name][0]
        lines.append((name, f"{side['tokens'] / middle:.0f}", f"{middle:.2f}", f"{100 * side['fill']:.1f} %",
                      side["shapes"],
                      f"{first['loss']:.7f}", f"{first['norm']:.5f}"))
    print("\n" + table(("", "real tokens/s", "s a pass", "real tokens", "batches", "loss", "gradient's norm"), lines))
    print("\nThe whole file: " + ", ".join(f"{name} {100 * fill:.1f} %" for name, fill in found["whole"].items())
          + " real tokens.", flush=True)
    padded, packed = rounds["padded"], rounds["packed"]
    apart = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a in padded for b in packed)
    tokens = {side["tokens"] for side in found["sides"].values()}
    if not apart <= AGREEMENT or len(tokens) > 1:
        raise BenchmarkError(f"the losses of both sides differ by {apart:.1e}, their real tokens are {sorted(tokens)}: "
                             "they do not train the same thing, so their times cannot be compared")
    count = tokens.pop()
    return [measure("packing_speedup", ratio(seconds["padded"], seconds["packed"]), "ratio"),
            measure("packed_tokens_s", count / statistics.median(seconds["packed"]), "tokens/s"),
            measure("padded_tokens_s", count / statistics.median(seconds["padded"]), "tokens/s"),
            measure("packed_real_share", found["sides"]["packed"]["fill"], "ratio"),
            measure("padded_real_share", found["sides"]["padded"]["fill"], "ratio"),
            {"name": "packing_loss_difference", "value": float(apart), "unit": "relative"}]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed
    serve(Packing())
