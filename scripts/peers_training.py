"""The LoRA training step of transformers + peft that benchmark_training.py compares with, inside .venv-peers.

    python peers_training.py        answers requests on the standard input (benchmark_common.serve)

Eager torch on the CPU, float32, torch.optim.AdamW (its fused form where torch has it for the CPU) and gradient
clipping. Torch never enters colora_ms's environment.
"""

import time
from pathlib import Path

from benchmark_common import peak_bytes, reset_peak, serve, versions
from peers_decode import transformers_model


class Peft:
    """transformers + peft; the handler of the requests."""

    def load(self, model, adapter, batch, rate, threads):
        """batch: {"ids", "labels"}, nested lists (rows, tokens) -> {"versions"} or {"missing": what to install}."""
        try:
            import torch

            from peft import PeftModel
        except ImportError as error:
            return {"missing": f"{error}; to install it: bash scripts/setup_peers.sh"}
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = PeftModel.from_pretrained(transformers_model(Path(model)), adapter, is_trainable=True).train()
        self.model.config.use_cache = False
        self.ids = torch.tensor(batch["ids"])
        self.labels = torch.tensor(batch["labels"])
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        try:
            self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0, fused=True)
        except (RuntimeError, TypeError):
            self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0)
        return {"versions": versions("torch", "transformers", "peft"), "trained": sum(p.numel() for p in self.trained)}

    def steps(self, count):
        """-> {"seconds": of each step, "losses", "peak_bytes"}"""
        reset_peak()
        seconds, losses = [], []
        for _ in range(count):
            start = time.perf_counter()
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.labels.flatten())
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    serve(Peft())
