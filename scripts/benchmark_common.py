"""What the benchmark scripts share: the machine, its read bandwidth, Markdown tables, the JSON file, and child
processes.

NumPy, the standard library and colora_ms.versions only, so that the peers' environment (scripts/setup_peers.sh) can
import it too.

The JSON file of every benchmark::

    {"machine": {...}, "versions": {...}, "measures": [{"name": ..., "value": ..., "unit": ...}, ...]}
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

from colora_ms.versions import versions  # noqa: E402,F401


class BenchmarkError(RuntimeError):
    """A benchmark cannot go on; the message says what failed and what to do."""


# -- the machine ------------------------------------------------------------------------------------------------------


def pin(threads):
    """Keep this process and its children on ``threads`` processors, and set the usual thread counts to that number.

    Raises:
        BenchmarkError: the process may not use that many processors.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise BenchmarkError(f"{threads} threads asked for, but this process may use {len(allowed)} processors")
    os.sched_setaffinity(0, allowed[:threads])
    for name in ("COLORA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def machine():
    """The processor, how many processors this process may use, memory, and the load at the moment."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _field(path, name):
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


class ReadBandwidth:
    """Bytes a second at which the threads of the CPU operators read a buffer much larger than the caches.

    Args:
        library: path of the compiled operators (``colora_measure_read`` is one of them).
        megabytes: size of the buffer.
    """

    def __init__(self, library, megabytes=512):
        self._function = ctypes.CDLL(str(library)).colora_measure_read
        self._buffer = np.ones(megabytes << 18, np.float32)
        self._sum = np.zeros(1, np.float32)
        shapes = [(ctypes.c_int64 * 1)(self._buffer.size), (ctypes.c_int64 * 1)(1)]
        self._arguments = (
            2, (ctypes.c_void_p * 2)(self._buffer.ctypes.data, self._sum.ctypes.data), (ctypes.c_int * 2)(1, 1),
            (ctypes.POINTER(ctypes.c_int64) * 2)(*[ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes]),
            (ctypes.c_char_p * 2)(b"float32", b"float32"), None, None)
        self._shapes = shapes

    def __call__(self, repeats=3):
        """The best of ``repeats`` reads."""
        best = math.inf
        for _ in range(repeats):
            start = time.perf_counter()
            if self._function(*self._arguments):
                raise BenchmarkError("colora_measure_read refused its arguments")
            best = min(best, time.perf_counter() - start)
        return self._buffer.nbytes / best


def reset_peak():
    """Start the process's peak memory anew (Linux); returns whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peak_bytes():
    """Peak resident memory of this process since :func:`reset_peak`, or since its start."""
    value = _field("/proc/self/status", "VmHWM")
    return int(value.split()[0]) * 1024 if value else 0


# -- results ----------------------------------------------------------------------------------------------------------


def per_step(short, long, steps):
    """Seconds a decode step, from runs that differ by ``steps`` tokens only; lists of one entry a repeat."""
    return [(b - a) / steps for a, b in zip(short, long)]


def ratio(numerators, denominators):
    """The median over repeats of the ratio within a repeat, so that the machine's drift cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))


def measure(name, value, unit):
    """One entry of the JSON file's measures."""
    return {"name": name, "value": round(float(value), 6), "unit": unit}


def write_json(path, measures, used_versions, **more):
    """Write the file at once (a temporary name, then a rename); ``more`` adds entries beside the three fixed ones."""
    path = Path(path)
    content = {"machine": machine(), "versions": used_versions, "measures": measures, **more}
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, prefix=path.name, delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def run_benchmark(benchmark, arguments):
    """Run ``benchmark(arguments, folder)`` -> (measures, versions, more entries) on the wanted processors, with a
    temporary folder; write its JSON file if asked. A BenchmarkError ends the process with its message."""
    script = Path(sys.argv[0])
    try:
        pin(arguments.threads)
        with tempfile.TemporaryDirectory(prefix=f"{script.stem.replace('_', '-')}-") as folder:
            measures, used, more = benchmark(arguments, Path(folder))
        if arguments.json:
            write_json(arguments.json, measures, used, **more)
    except BenchmarkError as error:
        sys.exit(f"{script.name}: {error}")


def table(head, rows):
    """A Markdown table with aligned columns; None becomes an empty cell, the first column stands at the left."""
    cells = [[str(c) for c in head], *[["" if c is None else str(c) for c in row] for row in rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]

    def line(row):
        return "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


# -- inputs -----------------------------------------------------------------------------------------------------------


def adapter_tensor(key, shape, seed=0):
    """A LoRA matrix from its PEFT name and a seed, equal under every NumPy version (raw bits of PCG64).

    Uniform with standard deviation 0.5 / sqrt(in) for lora_A and 0.02 for lora_B.

    Returns:
        float32 array of ``shape``.
    """
    raw = np.random.PCG64(zlib.crc32(f"{seed} {key}".encode())).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    spread = 0.5 / math.sqrt(shape[-1]) if ".lora_A." in key else 0.02
    return (unit * np.float32(spread * math.sqrt(12.0))).reshape(shape)


# -- child processes --------------------------------------------------------------------------------------------------


class Worker:
    """A child process that answers requests, one JSON line each (its side is :func:`serve`).

    Args:
        command: list of the program and its arguments.
        environment: variables added to this process's own.
        timeout: seconds that one answer may take.
    """

    def __init__(self, command, environment=None, timeout=600):
        self.command = [str(c) for c in command]
        self.timeout = timeout
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                                         text=True, env={**os.environ, **(environment or {})})

    def ask(self, what, **arguments):
        """The answer to one request.

        Raises:
            BenchmarkError: the child failed, ended or took too long; with the end of what it printed.
        """
        try:
            self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], self.timeout)
            line = self._process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = True, ""
        if not line:
            reason = "ended without an answer" if ready else f"gave no answer within {self.timeout} s"
            self.close()
            raise BenchmarkError(f"{' '.join(self.command)} {reason} to {what!r}:\n{self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{' '.join(self.command)} failed at {what!r}:\n{answer['error']}")
        return answer["result"]

    def close(self):
        """End the child."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _tail(self):
        self._log.seek(0)
        return "".join(line[:300] for line in self._log.readlines()[-8:])


def serve(handler):
    """Answer the requests of a :class:`Worker`: ``{"what": name, ...}`` calls ``handler.name(**rest)``.

    What libraries print goes to the standard error, so that it never mixes with the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(handler, request.pop("what"))(**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
