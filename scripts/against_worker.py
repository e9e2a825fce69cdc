"""One revision in a process of its own, for benchmark_against.py: the package that PYTHONPATH names, by its public API
only.

    against_worker.py worker               answers questions on standard input, see ``benchmark_common.serve``
    against_worker.py first-token ADAPTER  loads model and adapter, says "first token" when there is one
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, peak_bytes, reset_peak, serve

# benchmark_common puts this checkout in front and reads the versions there; what is measured may be another one.
sys.path = [one for one in sys.path if Path(one or ".").resolve() != ROOT]
sys.path[:0] = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
for _module in [name for name in sys.modules if name.split(".")[0] == "colora_ms"]:
    del sys.modules[_module]

RATE = 1e-4


class Revision:
    """The handler of the questions."""

    def load(self, weight_format: str, adapters: dict, adapter_format: str, rows: int, chunk: int) -> str:
        """Load the model and its adapters; chunk: most tokens of a graph call, so that all runs use the same graph.

        Returns:
            the folder of the package.
        """
        import colora_ms
        from colora_ms import Generator

        self.generator = Generator.from_pretrained("smollm2-135m", adapters, weight_format=weight_format,
                                                   adapter_format=adapter_format, max_rows=max(rows, 2), chunk=chunk)
        return str(Path(colora_ms.__file__).resolve().parent)

    def encode(self, texts: list, tokens: int) -> list:
        """The first ``tokens`` ids of each text."""
        return [list(map(int, self.generator.encode(text)))[:tokens] for text in texts]

    def run(self, prompts: list, adapters: list, tokens: int) -> dict:
        """Answer all prompts with ``tokens`` tokens each -> {"seconds", "tokens", "peak_bytes"}."""
        reset_peak()
        start = time.perf_counter()
        # A callback makes the number of tokens that a graph call may take the same in all runs.
        answers = self.generator.generate(prompts, adapter=adapters, max_new_tokens=tokens, ignore_eos=True,
                                          on_text=lambda index, text: None)
        return {"seconds": time.perf_counter() - start, "tokens": [list(map(int, one.tokens)) for one in answers],
                "peak_bytes": peak_bytes()}

    def load_training(self, adapter: str, rows: int, tokens: int) -> str:
        """A LoRA training of rows of random ids, its first step made; returns the folder of the package."""
        import colora_ms
        from colora_ms.adapters import load_adapter
        from colora_ms.models import load_model
        from colora_ms.training.batching import Batch
        from colora_ms.training.config import OptimizerConfig
        from colora_ms.training.step import Stepper

        decoder, _ = load_model("smollm2-135m")
        load_adapter(decoder, adapter, "trained", trainable=True)
        ids = np.random.default_rng(0).integers(0, 40000, (rows, tokens + 1)).astype(np.int32)
        self.batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.full(rows, tokens, np.int32))
        self.stepper = Stepper(decoder, OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_ratio=0.0))
        self.done = 0
        self.train(1)
        return str(Path(colora_ms.__file__).resolve().parent)

    def train(self, steps: int) -> dict:
        """Make steps -> {"seconds": of each, "peak_bytes"}."""
        reset_peak()
        seconds = []
        for _ in range(steps):
            self.done += 1
            start = time.perf_counter()
            self.stepper([self.batch], self.done, 10**6)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "peak_bytes": peak_bytes()}


def first_token(adapter: str) -> None:
    """What a user's script does: load the model and an adapter, ask for a contrastive answer, stop at its first
    token."""
    from colora_ms import Contrast, Generator

    generator = Generator.from_pretrained(adapters={"one": adapter})
    generator.generate("The capital of France is", adapter="one", contrast=Contrast(), max_new_tokens=1)
    print("first token", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        serve(Revision())
    else:
        first_token(sys.argv[2])
