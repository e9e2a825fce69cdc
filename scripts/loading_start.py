"""Parts of benchmark_loading.py on the real model: from process start to answers, and what the process holds then."""

import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from benchmark_common import ROOT, BenchmarkError, Worker, measure
from decode_worker import write_adapter

#: Requests after the first answer, none of which may compile.
LATER = 40
_FIRST_TOKEN = ROOT / "scripts" / "against_worker.py"


def measure_start(arguments, folder):
    """Seconds from process start to the first token, and to a server that answers; with an empty folder of compiled
    graphs and with a filled one."""
    adapter = folder / "adapters" / "one"
    if not adapter.exists():
        adapter.parent.mkdir(parents=True)
        write_adapter(adapter, 0)
    seconds = {name: [] for name in ("first_token_cold_s", "first_token_warm_s", "server_ready_cold_s",
                                     "server_ready_warm_s")}
    for number in range(arguments.repeats):
        for what, start in (("first_token", _first_token), ("server_ready", _server_ready)):
            cache = folder / f"start-{what}-{number}"
            for state in ("cold", "warm"):
                seconds[f"{what}_{state}_s"].append(start(adapter, cache))
    return [measure(name, statistics.median(found), "s") for name, found in seconds.items()], {"start": seconds}


def _environment(cache):
    return {**os.environ, "COLORA_CACHE": str(cache), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def _first_token(adapter, cache):
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, _FIRST_TOKEN, "first-token", str(adapter)], stdout=subprocess.PIPE,
                          text=True,
                          env=_environment(cache)) as process:
        if not any(line.startswith("first token") for line in iter(process.stdout.readline, "")):
            raise BenchmarkError("the first-token process failed; its message is above")
        return time.perf_counter() - begin


def _server_ready(adapter, cache):
    """Until a completion has come back."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "colora_ms", "serve", "--adapters", str(adapter.parent), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment(cache)) as process:
        watch = threading.Timer(600, process.kill)
        watch.start()
        try:
            for line in iter(process.stdout.readline, ""):
                if found := re.search(r"http://\S+", line):
                    body = b'{"model": "one", "prompt": "The capital of France is", "max_tokens": 1}'
                    urllib.request.urlopen(urllib.request.Request(found.group() + "/v1/completions", body, {
                        "Content-Type": "application/json"}), timeout=300).read()
                    return time.perf_counter() - begin
            raise BenchmarkError("the server ended before it was ready; its message is above")
        finally:
            watch.cancel()
            process.terminate()


def measure_later(arguments, folder):
    """Graphs compiled by requests of random lengths, rows and budgets after the first answer; and the process's peak
    memory after the first answers: SmolLM2 in int4, a LoRA, contrasts."""
    adapter = folder / "adapter-later"
    write_adapter(adapter, 0)
    worker = Worker([sys.executable, Path(__file__).with_name("benchmark_loading.py"), "--child"],
                    {"COLORA_CACHE": str(folder / "cache-later")}, timeout=1800)
    found = worker.ask("later", adapter=str(adapter), requests=LATER)
    worker.close()
    return [measure("compilations_after_first", found["later"] - found["first"], "graphs"),
            measure("rss_smollm2_int4_mib", found["peak"] / 2**20, "MiB")], {"later": found}


def later(adapter, requests):
    """In the child: {"first", "later": graphs compiled up to the first answer and in all; "peak": bytes}."""
    import numpy as np

    from benchmark_common import peak_bytes, reset_peak
    from colora_ms import Contrast, Generator, runtime

    reset_peak()
    generator = Generator.from_pretrained("smollm2-135m", {"one": adapter}, weight_format="int4")
    generator.generate(["The capital of France is"] * 2, adapter="one", contrast=[Contrast(), None], max_new_tokens=16)
    first, peak = runtime.all_compilations(), peak_bytes()
    random = np.random.default_rng(0)
    for _ in range(requests):
        rows = int(random.integers(1, 9))
        prompts = [random.integers(3, 40000, random.integers(1, 300)).tolist() for _ in range(rows)]
        generator.generate(prompts, adapter=["one", None][int(random.integers(2))],
                           max_new_tokens=int(random.integers(1, 40)))
    return {"first": first, "later": runtime.all_compilations(), "peak": peak}
