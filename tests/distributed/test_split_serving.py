"""A server whose model is split over two real processes, against one process; what cannot be split."""

import json
import signal
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from colora_ms.adapters import load_adapters  # noqa: E402
from colora_ms.cli import main  # noqa: E402
from colora_ms.decoding import Contrast, Generator  # noqa: E402
from colora_ms.models import load_model  # noqa: E402
from msrun_launch import free_port  # noqa: E402
from test_tensor_parallel import write_adapter  # noqa: E402

PROMPTS = ["one and two", "f", "five five five"]


def ask(port, **body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


def test_a_server_over_two_workers_answers_like_one_process(start, tiny_folder, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    write_adapter(folder / "a")
    port = free_port()
    job = start("msrun_serve.sh", "-n", 2, "--log-dir", tmp_path / "logs", "--model", tiny_folder, "--adapters", folder,
                "--port", port, "--name", "tiny", "--no-warm-up", "--rows", 4, "--max-length", 64)
    try:
        while True:
            assert job.process.poll() is None, job.wait()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).read()
                break
            except OSError:
                assert time.monotonic() < job.deadline, "the server did not come up"
                time.sleep(0.3)
        common = dict(max_tokens=6, temperature=0)
        found = [ask(port, model="tiny", prompt=PROMPTS[0], **common),
                 ask(port, model="a", prompt=PROMPTS[1], **common),
                 ask(port, model="a", prompt=PROMPTS[2], contrast={"alpha": 0.1, "beta": 0.5}, **common)]
        time.sleep(3)  # it rests in between
        assert ask(port, model="a", prompt=PROMPTS[1], **common) == found[1]
    finally:
        job.process.send_signal(signal.SIGINT)
        job.wait()
    decoder, tokenizer = load_model(str(tiny_folder))
    handle = load_adapters(decoder, {"a": folder / "a"})
    answers = Generator(decoder, tokenizer, handle).generate(
        PROMPTS, adapter=[None, "a", "a"], contrast=[None, None, Contrast(0.1, 0.5)], max_new_tokens=6)
    assert found == [answer.text for answer in answers]
    assert len(set(found)) == 3


def test_one_process_cannot_split(tiny_folder, capsys):
    assert main(["serve", "--model", str(tiny_folder), "--tensor-parallel"]) == 2
    assert "needs several workers" in capsys.readouterr().err
