"""``colora-ms serve`` as a process: it answers, and a signal ends it cleanly while a stream is running."""

import http.client
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_folder(tmp_path):
    """A tiny Llama with a tokenizer whose tokens are numbers."""
    folder = tmp_path / "tiny-llama"
    shutil.copytree(ROOT / "tests" / "goldens" / "tiny" / "llama", folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def process(model_folder):
    """(process, host:port, the lines that it prints from then on) of a server on a free port."""
    command = [sys.executable, "-m", "colora_ms", "serve", "--model", str(model_folder), "--port", "0", "--rows", "2",
               "--max-length", "64", "--chunk", "1", "--no-warm-up"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    lines = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in started.stdout], daemon=True).start()
    said = ""
    try:
        while "serving tiny-llama" not in said:
            said = lines.get(timeout=120)
        yield started, said.rsplit("http://", 1)[1].strip(), lines
    finally:
        started.kill()
        started.wait()


def ask(address, **body):
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps({"model": "tiny-llama", "prompt": "5 6 7", **body}),
                       {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server(process, number):
    server, address, lines = process
    answer = ask(address, max_tokens=3, ignore_eos=True)
    assert answer.status == 200 and json.loads(answer.read())["usage"]["completion_tokens"] == 3
    stream = ask(address, max_tokens=60, ignore_eos=True, stream=True)
    assert stream.readline().startswith(b"data: ")
    start = time.monotonic()
    server.send_signal(number)
    rest = stream.read()
    assert server.wait(30) == 0, list(lines.queue)
    assert time.monotonic() - start < 30
    assert rest.rstrip().endswith(b"data: [DONE]")
    with pytest.raises(ConnectionRefusedError):
        ask(address)
    assert not [line for line in lines.queue if "Traceback" in line]
