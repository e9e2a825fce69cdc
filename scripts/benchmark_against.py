"""``benchmark_decode.py --against COMMIT``: this tree's times beside an older revision's, both in one run.

The older revision gets a git work tree of its own with its operators compiled there, and each side a folder of compiled
graphs of its own. A worker process a side and weight format answers the same requests; rounds alternate which side goes
first, and a ratio is the median of the ratios within a round, old over new: 1 and more means that this tree is no
slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmark_common import ROOT, BenchmarkError, Worker, machine, measure, per_step, ratio, table, versions
from compare_outputs import LIBRARY, revision
from decode_worker import PROMPT_TOKENS, write_adapter

WORKER = ROOT / "scripts" / "against_worker.py"
SIDES = ("old", "new")
MIXED = 8  # requests, each with an adapter of its own
TRAINING_ROWS, TRAINING_TOKENS = 4, 128


@dataclasses.dataclass
class Timed:
    """One thing that both sides did: its name, and each side's seconds, one entry a round; what counts for the
    minimum."""

    name: str
    seconds: dict = dataclasses.field(default_factory=lambda: {side: [] for side in SIDES})
    decode: bool = False

    @property
    def ratio(self) -> float:
        """Old over new, the median over rounds."""
        return ratio(self.seconds["old"], self.seconds["new"])


def order(number: int) -> Sequence[str]:
    """The sides in the order of a round: each goes first in every second one."""
    return SIDES[::-1] if number % 2 else SIDES


def measures_of(timed: Iterable[Timed], peaks: dict[str, dict[str, int]]) -> list[dict]:
    """The JSON file's measures: every ratio, the smallest one of decoding, and of all.

    Args:
        timed: what was timed; peaks: {name: {"old", "new": bytes}}.
    """
    timed = list(timed)
    found = [measure(f"{one.name}_old_over_new", one.ratio, "ratio") for one in timed]
    found += [measure(f"peak_{name}_old_over_new", sides["old"] / sides["new"], "ratio")
              for name, sides in peaks.items()]
    decode = [one.ratio for one in timed if one.decode]
    smallest = min(one["value"] for one in found)
    if decode:
        found.append(measure("decode_old_over_new_min", min(decode), "ratio"))
    return [*found, measure("old_over_new_min", smallest, "ratio")]


def results_table(timed: Iterable[Timed], peaks: dict[str, dict[str, int]]) -> str:
    """The Markdown table of both sides."""
    rows = [(one.name, *(f"{1e3 * statistics.median(one.seconds[side]):.2f}" for side in SIDES), "ms",
             f"{one.ratio:.3f}")
            for one in timed]
    rows += [(f"peak_{name}", *(f"{sides[side] / 2**20:.0f}" for side in SIDES), "MiB",
              f"{sides['old'] / sides['new']:.3f}")
             for name, sides in peaks.items()]
    return table(("", "old", "new", "unit", "old / new"), rows)


class Sides:
    """The two trees, and processes in which they run.

    Args:
        trees: {"old", "new": folder of a checkout with compiled operators}; caches: folder for their compiled graphs.
    """

    def __init__(self, trees: dict[str, Path], caches: Path) -> None:
        self.trees, self.caches = trees, caches

    def environment(self, side: str, cache: Path | None = None) -> dict[str, str]:
        """What makes a process run that side's package and operators."""
        return {"PYTHONPATH": str(self.trees[side]), "COLORA_CACHE": str(cache or self.caches / side),
                "COLORA_CPU_LIBRARY": str(self.trees[side] / LIBRARY)}

    def workers(self) -> dict[str, Worker]:
        """A worker of each side."""
        return {side: Worker([sys.executable, WORKER, "worker"], self.environment(side), timeout=1800)
                for side in SIDES}

    def check(self, side: str, package: str) -> None:
        """Refuse a worker that measured another package.

        Raises:
            BenchmarkError: it did.
        """
        if Path(package) != (self.trees[side] / "colora_ms").resolve():
            raise BenchmarkError(f"the worker of {side} ran {package}, expected the package in {self.trees[side]}")


def decode(sides: Sides, weight_format: str, rows: Sequence[int], adapters: dict[str, str], adapter_format: str,
           arguments: Any, names: dict[int, str]) -> tuple[list[Timed], dict[str, int]]:
    """Decode steps of both sides in one format; names: rows -> name of the measure. Also each side's peak in bytes.

    With several adapters request i uses the i-th, else all use the one that there is.
    """
    workers = sides.workers()
    used = list(adapters)
    timed, peaks = [], dict.fromkeys(SIDES, 0)
    try:
        for side in SIDES:
            sides.check(side, workers[side].ask("load", weight_format=weight_format, adapters=adapters,
                                                adapter_format=adapter_format, rows=max(rows), chunk=arguments.steps))
        texts = [f"A short introduction to {one}: what it is, where it comes from, and why people care about it today."
                 for one in ("bread", "volcanoes", "the violin", "bicycles", "coral reefs", "chess", "honey", "maps")]
        prompts = workers["new"].ask("encode", texts=texts, tokens=PROMPT_TOKENS)
        for count in rows:
            steps = arguments.steps if count == 1 else max(arguments.steps * 3 // 8, 2)
            question = dict(prompts=prompts[:count], adapters=[used[i % len(used)] for i in range(count)])
            first = {side: workers[side].ask("run", tokens=1 + steps, **question) for side in SIDES}  # compiles
            if first["old"]["tokens"] != first["new"]["tokens"]:
                print(f"note: {names[count]}: the two revisions made other tokens", flush=True)
            short, long = ({side: [] for side in SIDES} for _ in range(2))
            for number in range(arguments.repeats):
                for side in order(number):
                    short[side].append(workers[side].ask("run", tokens=1, **question)["seconds"])
                    answer = workers[side].ask("run", tokens=1 + steps, **question)
                    long[side].append(answer["seconds"])
            timed.append(Timed(names[count], {side: per_step(short[side], long[side], steps) for side in SIDES}, True))
            for side in SIDES:
                peaks[side] = max(peaks[side], first[side]["peak_bytes"])
    finally:
        for worker in workers.values():
            worker.close()
    return timed, peaks


def training(sides: Sides, adapter: str, arguments: Any) -> tuple[Timed, dict[str, int]]:
    """Steps of a LoRA training on both sides, and each side's peak."""
    workers, timed, peaks = sides.workers(), Timed("train_step"), dict.fromkeys(SIDES, 0)
    try:
        for side in SIDES:
            sides.check(side, workers[side].ask("load_training", adapter=adapter, rows=TRAINING_ROWS,
                                                tokens=TRAINING_TOKENS))
        for number in range(arguments.repeats):
            for side in order(number):
                answer = workers[side].ask("train", steps=1)
                timed.seconds[side] += answer["seconds"]
                peaks[side] = max(peaks[side], answer["peak_bytes"])
    finally:
        for worker in workers.values():
            worker.close()
    return timed, peaks


def first_tokens(sides: Sides, adapter: str, rounds: int) -> list[Timed]:
    """Seconds from process start to the first token: with an empty folder of compiled graphs, then with a filled
    one."""
    cold, warm = Timed("first_token_cold"), Timed("first_token_warm")
    for number in range(rounds):
        for side in order(number):
            with tempfile.TemporaryDirectory(dir=sides.caches) as cache:
                for timed in (cold, warm):
                    start = time.perf_counter()
                    with subprocess.Popen([sys.executable, WORKER, "first-token", adapter], stdout=subprocess.PIPE,
                                          text=True,
                                          env={**os.environ, **sides.environment(side, Path(cache))}) as process:
                        if not any(line.startswith("first token") for line in iter(process.stdout.readline, "")):
                            raise BenchmarkError(f"the first-token process of {side} failed; its message is above")
                        timed.seconds[side].append(time.perf_counter() - start)
    return [cold, warm]


def benchmark(arguments: argparse.Namespace, folder: Path) -> tuple[list[dict], dict, dict]:
    """Measure both revisions; returns (measures, versions, more for the JSON file).

    Raises:
        BenchmarkError: the older revision cannot be built, or a process failed.
    """
    adapters = {}
    for seed in range(MIXED):
        write_adapter(folder / f"adapter{seed}", seed)
        adapters[f"a{seed}"] = str(folder / f"adapter{seed}")
    first = {"a0": adapters["a0"]}
    host, used = machine(), versions("colora-ms", "mindspore", "numpy")
    timed, peaks = [], {}
    try:
        with revision(arguments.against, folder) as tree:
            sides = Sides({"old": tree, "new": ROOT}, folder)
            print(f"\n{host['cpu']}, {arguments.threads} threads, {host['memory_gib']} GiB; old: {arguments.against}; "
                  f"{arguments.repeats} rounds", flush=True)
            for weight_format in arguments.formats:
                rows = [1] if arguments.quick else [1, 8]
                found, peaks[weight_format] = decode(sides, weight_format, rows, first, "float32", arguments,
                                                     {count: f"decode_{weight_format}_{count}" for count in rows})
                timed += found
                print(results_table(found, {weight_format: peaks[weight_format]}), flush=True)
            if not arguments.quick:
                found, peaks["mixed8"] = decode(sides, "float32", [MIXED], adapters, "bfloat16", arguments,
                                                {MIXED: "mixed8"})
                found[0].decode = False  # a measure of its own
                timed += found
                found, peaks["training"] = training(sides, adapters["a0"], arguments)
                timed.append(found)
                timed += first_tokens(sides, adapters["a0"], arguments.cold_rounds)
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"the older revision could not be made ready: {error}") from error
    measures = measures_of(timed, peaks)
    print("\n" + results_table(timed, peaks) + "\n\n" + table(("measure", "value"), [
        (m["name"], f"{m['value']:.4g}") for m in measures if m["name"].endswith("_min")]), flush=True)
    return measures, used, {"against": arguments.against, "seconds": {one.name: one.seconds for one in timed},
                            "peaks": peaks}
