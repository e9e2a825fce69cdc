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
    """Graphs compiled by requests of random lengths, rows and budgets after the first answer, of a Generator, an Engine
    and ``colora-ms generate``; and the process's peak memory after the first answers: SmolLM2 in int4, a LoRA,
    contrasts."""
    adapter = folder / "adapters-later" / "one"
    adapter.parent.mkdir()
    write_adapter(adapter, 0)
    found = {}
    for what in ("later", "later_engine"):
        worker = Worker([sys.executable, Path(__file__).with_name("benchmark_loading.py"), "--child"],
                        {"COLORA_CACHE": str(folder / f"cache-{what}")}, timeout=1800)
        found[what] = worker.ask(what, adapter=str(adapter), requests=LATER)
        worker.close()
    found["later_cli"] = _later_cli(adapter, folder / "cache-later-cli")
    compiled = {what: one["later"] - one["first"] for what, one in found.items()}
    return [measure("compilations_after_first", sum(compiled.values()), "graphs"),
            measure("rss_smollm2_int4_mib", found["later"]["peak"] / 2**20, "MiB")], {**found, "compiled": compiled}


def _later_cli(adapter, cache):
    """{"first", "later"}: graphs that ``colora-ms generate`` has kept after a short call, and after calls that differ
    in prompts, rows and budgets."""
    kept = []
    for prompts, budget in ((["The capital of France is"], 4), (["Once upon a time"] * 3, 30), (["word " * 300], 9)):
        done = subprocess.run([sys.executable, "-m", "colora_ms", "generate", "--adapter", adapter, "--max-new-tokens",
                               str(budget), *prompts], env=_environment(cache), capture_output=True, text=True,
                              check=False)
        if done.returncode:
            raise BenchmarkError(f"colora-ms generate failed:\n{done.stderr[-800:]}")
        kept.append(len(list((cache / "graphs").iterdir())))
    return {"first": kept[0], "later": kept[-1]}


def later_engine(adapter, requests):
    """In the child: {"first", "later": graphs compiled up to the Engine's first answer and in all}."""
    import numpy as np

    from colora_ms import Contrast, runtime
    from colora_ms.models import load_model
    from colora_ms.serving import AdapterBank, Engine

    decoder, tokenizer = load_model("smollm2-135m")
    bank = AdapterBank(decoder, Path(adapter).parent)
    with Engine(decoder, tokenizer, bank, max_length=512) as engine:
        engine.submit("The capital of France is", adapter="one", max_new_tokens=4).result()
        first = runtime.all_compilations()
        random = np.random.default_rng(0)
        handles = []
        for number in range(requests):
            prompt = random.integers(3, 40000, random.integers(1, 300)).tolist()
            adapted = bool(random.integers(2))
            handles.append(engine.submit(prompt, adapter="one" if adapted else None, ignore_eos=True,
                                         contrast=Contrast() if adapted and number % 3 == 0 else None,
                                         max_new_tokens=int(random.integers(1, 40))))
            if number % 5 == 0:
                handles[-1].result()  # now and then the engine runs empty
        for handle in handles:
            handle.result()
    return {"first": first, "later": runtime.all_compilations()}


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
