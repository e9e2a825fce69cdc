"""A tiny model on disk, and a way to run a job of two workers that cannot outlive its time."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 150  # seconds of one job; it takes about 10 on two idle cores

sys.path.insert(0, str(ROOT / "tests" / "unit"))
sys.path.insert(0, str(ROOT / "tests" / "distributed"))


def pytest_collection_modifyitems(items):
    if shutil.which("msrun", path=str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")) is None:
        for item in items:
            if Path(__file__).parent in Path(item.fspath).parents:
                item.add_marker(pytest.mark.skip(reason="msrun is not installed"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder: random Llama of two layers, byte-level tokenizer."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.hf_folder import write_hf_folder
    from test_tokenizer import small_byte_level

    config = DecoderConfig(model_type="llama", vocab_size=264, hidden_size=32, intermediate_size=48,
                           num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
                           eos_token_ids=(262,))
    random = np.random.default_rng(7)
    tensors = {name: (random.standard_normal(shape) * 0.3 + ("norm" in name)).astype(np.float32)
               for name, shape in config.parameter_shapes().items()}
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_hf_folder(folder, config, tensors, small_byte_level(tmp_path_factory.mktemp("tokenizer")))
    return folder


class Running:
    """A started script; ``wait`` and ``poll_until`` have a time limit and end the job when it is over."""

    def __init__(self, script, *arguments, stdin=None):
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / script), *map(str, arguments)], text=True,
            stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHON": sys.executable})
        self.deadline = time.monotonic() + LIMIT

    def wait(self):
        """(exit code, output)."""
        try:
            output, _ = self.process.communicate(timeout=max(1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.close()
            pytest.fail(f"the job took more than {LIMIT} s")
        return self.process.returncode, output

    def poll_until(self, condition):
        """Wait for ``condition()`` to be true while the job runs; returns its value."""
        while time.monotonic() < self.deadline:
            value = condition()
            if value:
                return value
            if self.process.poll() is not None:
                pytest.fail("the job ended too early: " + self.process.stdout.read())
            time.sleep(0.05)
        self.close()
        pytest.fail(f"the condition did not come true in {LIMIT} s")

    def close(self):
        if self.process.poll() is None:
            # The launcher ends its workers on the first signal, and is killed only if that does not help.
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.stdout.close()


@pytest.fixture
def start():
    """Starts a script of ``scripts/``; whatever runs at the end of the test is ended."""
    started = []

    def run(script, *arguments, **options):
        started.append(Running(script, *arguments, **options))
        return started[-1]
    yield run
    for job in started:
        job.close()
