"""Parts of benchmark_loading.py on models of real sizes (loading_models.py has the files): seconds until they are
loaded and have answered, and memory beyond the file's; a training step of the largest.

Memory is the peak of the process's resident pages (anonymous and of files) less what stood after ``import mindspore``.
"""

import os
import statistics
import sys
import time
from pathlib import Path

from benchmark_common import BenchmarkError, Worker, measure, peak_bytes, reset_peak
from decode_worker import write_adapter
from loading_models import EIGHT, QWEN, model_path

PROMPT, ANSWER_TOKENS = "The capital of France is", 8
RANK, TRAINED_TOKENS = 8, 128
#: GiB that must be there for the 8B file, its pages and the step.
_ROOM = 12


def _in_memory(path):
    """Read a file through, so that the page cache has it."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def _ask(folder, number, what, **arguments):
    """One process with a cache folder of its own, which is empty."""
    worker = Worker([sys.executable, Path(__file__).with_name("benchmark_loading.py"), "--child"],
                    {"COLORA_CACHE": str(folder / f"cache-{what}-{number}")}, timeout=3600)
    found = worker.ask(what, **arguments)
    worker.close()
    return found


def _figures(rounds, size, short):
    """Measures of rounds of :func:`answer`: seconds, and peaks over the file's size."""
    def middle(name):
        return statistics.median(one[name] for one in rounds)
    return [measure(f"load_s_{short}", middle("load"), "s"), measure(f"first_answer_s_{short}", middle("whole"), "s"),
            measure(f"peak_over_file_{short}", middle("peak") / size, "x"),
            measure(f"loaded_over_file_{short}", middle("loaded") / size, "x")]


def measure_qwen(arguments, folder):
    """Qwen2.5-Coder-1.5B in Q4_K_M: load, first answer, peak."""
    path = model_path(QWEN)
    _in_memory(path)
    rounds = [_ask(folder, number, "answer", model=str(path)) for number in range(arguments.repeats)]
    return _figures(rounds, path.stat().st_size, "1_5b"), {"1.5b": rounds}


def measure_eight(arguments, folder):
    """Llama-3-8B's shape: the same with a LoRA and the contrast, and a QLoRA step."""
    path = model_path(EIGHT)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo") as file:
        free = next((int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")), free)
    if free < _ROOM << 30:
        raise BenchmarkError(f"{free / 2**30:.1f} GiB of memory are available, {_ROOM} are wanted for {path.name}")
    adapter = folder / "adapter-8b"
    write_adapter(adapter, 0, path, RANK)
    _in_memory(path)
    size = path.stat().st_size
    rounds = [_ask(folder, 0, "answer", model=str(path), adapter=str(adapter))]
    step = _ask(folder, 0, "train", model=str(path))
    return [*_figures(rounds, size, "8b"), measure("qlora_first_step_s_8b", step["first"], "s"),
            measure("qlora_step_s_8b", step["second"], "s"),
            measure("qlora_peak_over_file_8b", step["peak"] / size, "x")], {"8b": {"answer": rounds, "train": step}}


# -- in the child -----------------------------------------------------------------------------------------------------


def _start():
    """(seconds since the process began, resident bytes) behind ``import mindspore``."""
    import mindspore  # noqa: F401

    with open("/proc/self/stat") as file:
        began = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as file:
        since = float(file.read().split()[0]) - began
    reset_peak()
    return since, peak_bytes()


def answer(model, adapter=None):
    """{"load": seconds of ``load_model``; "whole": from the process's start to the end of the first answer; "loaded",
    "peak": bytes; "tokens", "second": seconds of a second answer}."""
    since, base = _start()
    begin = time.perf_counter()
    from colora_ms import Contrast, Generator
    from colora_ms.adapters import load_adapters
    from colora_ms.models import load_model

    start = time.perf_counter()
    decoder, tokenizer = load_model(model)
    load, loaded = time.perf_counter() - start, peak_bytes() - base
    handle = load_adapters(decoder, {"one": adapter}) if adapter else None
    generator = Generator(decoder, tokenizer, handle)
    options = {"adapter": "one", "contrast": Contrast()} if adapter else {}
    first = generator.generate(PROMPT, max_new_tokens=ANSWER_TOKENS, ignore_eos=True, **options)[0]
    whole, peak = since + time.perf_counter() - begin, peak_bytes() - base
    start = time.perf_counter()
    generator.generate(PROMPT, max_new_tokens=ANSWER_TOKENS, ignore_eos=True, **options)
    return {"load": load, "whole": whole, "loaded": loaded, "peak": peak, "tokens": list(map(int, first.tokens)),
            "text": first.text, "second": time.perf_counter() - start}


def train(model):
    """{"first", "second": seconds of a QLoRA step, the first one compiles; "losses"; "peak": bytes}."""
    _, base = _start()
    import numpy as np

    from colora_ms import LoraConfig, inject
    from colora_ms.models import load_model
    from colora_ms.training.batching import Batch
    from colora_ms.training.config import OptimizerConfig
    from colora_ms.training.step import Stepper

    decoder, _ = load_model(model)
    inject(decoder, LoraConfig(r=RANK, target_modules="all-linear"))
    stepper = Stepper(decoder, OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_ratio=0.0))
    ids = np.random.default_rng(0).integers(0, 256, (1, TRAINED_TOKENS + 1)).astype(np.int32)
    batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.full(1, TRAINED_TOKENS, np.int32))
    seconds, losses = [], []
    for step in (1, 2):
        start = time.perf_counter()
        losses.append(stepper([batch], step, 2)[0])
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "second": seconds[1], "losses": losses, "peak": peak_bytes() - base}
