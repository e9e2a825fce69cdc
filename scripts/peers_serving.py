"""transformers + peft with rows of many adapters, in the peers' environment; the other side of benchmark_serving.py.

    python peers_serving.py        answers requests on the standard input (benchmark_common.serve)

Rows are mixed by peft's ``adapter_names=``, which runs every linear once an adapter. The token loop is written out.
"""

from pathlib import Path

from benchmark_common import serve
from peers_decode import Peer, Torch, transformers_model


class Mixed(Torch):
    """transformers + peft; case "base", "single" or "mixed": rows without adapter, with one, with one each."""

    cases = ("base", "single", "mixed")

    def load(self, model, adapters, threads):
        """adapters: PEFT folders, one a row."""
        self.adapters, self.threads = adapters, threads
        return Peer.load(self, model, adapters[0], ".", threads, 0.1, 0.5)

    def prepare(self, model, adapter, folder):
        import torch

        from peft import PeftModel

        torch.set_num_threads(self.threads)
        self.torch = torch
        self.model = PeftModel.from_pretrained(transformers_model(model), self.adapters[0], adapter_name="a0")
        for i, path in enumerate(self.adapters[1:], 1):
            self.model.load_adapter(str(Path(path)), adapter_name=f"a{i}")
        self.model.eval()
        self.names = None

    def decode(self, case, prompts, tokens):
        rows = range(len(prompts))
        self.names = {"base": ["__base__" for _ in rows], "single": None, "mixed": [f"a{i}" for i in rows]}[case]
        with self.torch.inference_mode():
            return self._greedy(self.torch.tensor(prompts), tokens)

    def _forward(self, ids, past):
        mixed = {} if self.names is None else {"adapter_names": self.names}
        out = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1, **mixed)
        return out.logits[:, -1], out.past_key_values


if __name__ == "__main__":
    serve(Mixed())
