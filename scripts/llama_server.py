"""llama.cpp's server as a peer of benchmark_serving.py: its model files, its start and its end.

The program is built by ``bash scripts/setup_peers.sh --llama-server``.
"""

import contextlib
import http.client
import os
import re
import socket
import subprocess
import tempfile
import time

from benchmark_common import BenchmarkError

INSTALL = "bash scripts/setup_peers.sh --llama-server (compiles for about 20 minutes)"
#: Our weight formats and llama.cpp's types of as many bits.
KINDS = {"float32": "F32", "int8": "Q8_0"}
#: Seconds that the server may take to load its model.
START = 120


def missing(binary):
    """Why the server cannot be had, or ""."""
    if not binary.is_file():
        return f"{binary.name} is not there; to install it: {INSTALL}"
    done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return f"{binary.name} --version ends with {done.returncode}: {done.stderr[-200:]}; to build it anew, " \
               f"remove it and run {INSTALL}"
    return ""


def version(binary):
    """What ``--version`` calls the program."""
    done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"version:?\s*(.+)", done.stdout + done.stderr)
    return found[1].strip() if found else "unknown"


def write_model(path, kind):
    """SmolLM2-135M as a GGUF file with all matrices in ``kind``, by this project's writer; returns its remarks."""
    from colora_ms.models.checkpoint import default_model_path, open_checkpoint
    from colora_ms.models.gguf_writer import write_gguf

    checkpoint = open_checkpoint(default_model_path())
    return write_gguf(path, checkpoint.config, checkpoint.tensors, checkpoint.tokenizer_source, kind=kind)


def arguments(model, threads, slots, context, port):
    """The command's options.

    ``slots`` sequences of ``context`` tokens each. What llama-server does beyond answering is off: no fetching, no
    copies of idle slots in memory (no prompt of the load begins as another one does, so they would only cost time).
    """
    return ["--model", str(model), "--parallel", str(slots), "--ctx-size", str(slots * context),
            "--threads", str(threads), "--threads-batch", str(threads), "--host", "127.0.0.1", "--port", str(port),
            "--offline", "--cache-ram", "0"]


def context(tokens):
    """The size of a slot that holds so many tokens and one more: llama.cpp has multiples of 256."""
    return -(-(tokens + 1) // 256) * 256


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class LlamaServer:
    """A running server; ``address`` is "host:port".

    Args:
        binary: the program; the others as for :func:`arguments`.

    Raises:
        BenchmarkError: it ended, or was not ready in time; with the end of its log.
    """

    def __init__(self, binary, model, threads, slots, context):
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        # Variables of llama.cpp's own would change what is measured.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_"))}
        self._process = subprocess.Popen([str(binary), *arguments(model, threads, slots, context, port)],
                                         stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + START
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                code = self._process.poll()
                self.close()
                raise BenchmarkError(f"llama-server was not ready within {START} s (exit code {code}):\n{self._tail()}")
            time.sleep(0.1)

    def _ready(self):
        connection = http.client.HTTPConnection(self.address, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def close(self):
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tail(self):
        self._log.seek(0)
        return "".join(line[:300] for line in self._log.readlines()[-8:])
