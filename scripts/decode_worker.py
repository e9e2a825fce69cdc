"""This project in a process of its own, for benchmark_decode.py; and the adapter that all benchmarks use.

    decode_worker.py worker                answers questions on standard input, see ``benchmark_common.serve``
    decode_worker.py first-token ADAPTER   loads model and adapter, says "first token" when there is one
"""

import json
import sys
import time

import numpy as np

from benchmark_common import ROOT, adapter_tensor, peak_bytes, reset_peak, serve

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

ADAPTER, RANK, LORA_ALPHA = "benchmark", 16, 16
ALPHA, BETA = 0.1, 0.5
PROMPT_TOKENS = 16
KINDS = {"base": "base", "lora": "LoRA greedy", "cold": "CoLD"}


def write_adapter(folder, seed=0, model="smollm2-135m", rank=RANK):
    """The benchmark's LoRA for a model, a PEFT folder of ``adapter_tensor``s; another seed gives another adapter."""
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    from colora_ms.models.safetensors_file import write_safetensors

    shapes = {}
    for name, shape in open_checkpoint(resolve_model(model)).config.parameter_shapes().items():
        if name.endswith("_proj.weight"):
            prefix = "base_model.model." + name.removesuffix(".weight")
            shapes[f"{prefix}.lora_A.weight"] = (rank, shape[1])
            shapes[f"{prefix}.lora_B.weight"] = (shape[0], rank)
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", shapes, lambda key: adapter_tensor(key, shapes[key], seed))
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model),
        "inference_mode": True,
        "r": rank, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}))


class Ours:
    """This project in one weight format; the handler of the questions."""

    def load(self, weight_format, adapter, chunk):
        """adapter: PEFT folder or None. chunk: most tokens of a run but one, so that all runs use the same graph."""
        from colora_ms.adapters import load_adapter
        from colora_ms.kernels import backend
        from colora_ms.models import load_model

        self.decoder, self.tokenizer = load_model(weight_format=weight_format)
        self.adapters = load_adapter(self.decoder, adapter, ADAPTER) if adapter else None
        self.chunk, self.generators = chunk, {}
        config = self.decoder.config
        return {"backend": backend(), "bytes": self.weight_bytes(), "layers": config.num_hidden_layers,
                "hidden": config.hidden_size, "inner": config.intermediate_size, "vocab": config.vocab_size,
                "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
                "head_dim": config.head_dim}

    def weight_bytes(self):
        """Bytes of all linears' weights, scales and biases ("base"; the tied head once), and of the adapter's
        matrices."""
        cells = [cell for _, cell in self.decoder.cells_and_names() if hasattr(cell, "operands")]
        found = {"base": {}, "adapter": {}}
        for cell in cells:
            (_, tensors, bias), adapter = cell.operands()
            for name, group in (("base", tensors + bias), ("adapter", adapter)):
                found[name].update({id(tensor): int(tensor.size) * tensor.itemsize for tensor in group})
        return {name: sum(sizes.values()) for name, sizes in found.items()}

    def encode(self, texts):
        return [self.tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]

    def run(self, case, prompts, tokens):
        from colora_ms import Contrast, Generator

        rows = len(prompts) * (2 if case == "cold" else 1)
        reset_peak()
        if rows not in self.generators:
            self.generators[rows] = Generator(self.decoder, self.tokenizer, self.adapters, max_rows=max(rows, 2),
                                              chunk=self.chunk)
        start = time.perf_counter()
        # A callback makes the number of tokens that a graph call may take the same in all runs (``chunk``).
        answers = self.generators[rows].generate(
            prompts, adapter=None if case == "base" else ADAPTER,
            contrast=Contrast(ALPHA, BETA) if case == "cold" else None,
            max_new_tokens=tokens, ignore_eos=True, on_text=lambda index, text: None)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": [list(map(int, a.tokens)) for a in answers], "peak_bytes": peak_bytes()}

    def logits(self, prompts, path):
        """For --check: logits of a prefill and 8 given tokens (with and without the adapter) into ``path``."""
        from colora_ms.decoding.stepwise import Stepper

        stepper = Stepper(self.decoder, 2, 64)
        logits = []
        for prompt, forced in zip(prompts[:4], prompts[4:8]):
            stepper.use([0, -1])
            logits += [stepper.append([ids, ids]) for ids in (prompt, *([token] for token in forced[:8]))]
        np.save(path, np.stack(logits))

    def answers(self, prompts, tokens, contrast):
        """For --check: the greedy or contrastive tokens of all prompts, four at a time."""
        from colora_ms import Contrast, Generator

        generator = Generator(self.decoder, self.tokenizer, self.adapters, max_rows=8 if contrast else 4)
        found = []
        for i in range(0, len(prompts), 4):
            found += generator.generate(prompts[i:i + 4], adapter=ADAPTER, max_new_tokens=tokens, ignore_eos=True,
                                        contrast=Contrast(ALPHA, BETA) if contrast else None)
        return [list(map(int, a.tokens)) for a in found]


def first_token(adapter):
    """What a user's script does: load the model and an adapter, ask for a contrastive answer, stop at its first
    token."""
    from colora_ms import Contrast, Generator

    generator = Generator.from_pretrained(adapters={ADAPTER: adapter})
    generator.generate("The capital of France is", adapter=ADAPTER, contrast=Contrast(), max_new_tokens=1)
    print("first token", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        serve(Ours())
    else:
        first_token(sys.argv[2])
