"""Steps 10 and 11, in a process of its own: a small model generates, and says what it compiled.

    child_model.py OUT.json [--target Ascend|CPU] [--layers 1] [--format bfloat16] [--prompts 4] [--experts]

Without an adapter, with an adapter of zeros, with two adapters, with a contrast, by Generator. The same on the CPU's
own operators is what a device is compared with: tokens, and by how much each won.
"""
import argparse
import json
import time
from pathlib import Path

import child
import numpy as np

CASES = ("base", "zero", "one", "two", "contrast")
SIZES = dict(model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, max_position_embeddings=256, eos_token_ids=(2,))
#: With routed experts in the MLP's place, and one that every token has; adapters go elsewhere.
EXPERTS = dict(model_type="qwen2_moe", attention_bias=True, experts=8, experts_per_token=2, expert_size=128,
               shared_size=256, normalised_experts=True)
NO_EXPERTS = r".*(self_attn|shared_expert)\.[a-z]+_proj"


class Words:
    """A tokenizer whose text is ids."""

    eos_token_id = 2

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def build(layers, weight_format, adapters=True, experts=False):
    """(decoder, handle of the adapters zero, one and two) of fixed random weights."""
    from mindspore import Tensor

    from colora_ms.adapters import LoraConfig, inject
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    config = DecoderConfig(num_hidden_layers=layers, **{**SIZES, **(EXPERTS if experts else {})})
    rng = np.random.default_rng(11)
    weights = {name: (rng.standard_normal(shape) * (0.3 if name.endswith(".gate.weight") else 0.08)
                      + ("norm" in name)).astype(np.float32)
               for name, shape in config.parameter_shapes().items()}
    decoder = Decoder(config, weights, weight_format=weight_format)
    if not adapters:
        return decoder, None
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=NO_EXPERTS if experts else "all-linear")
    handle = inject(decoder, lora, adapter_name="zero", slots=3)
    handle.add_adapter("one", lora)
    handle.add_adapter("two", lora)
    for parameter in handle.trainable_params():
        values = rng.standard_normal(parameter.shape).astype(np.float32) * 0.1
        if "lora_B" in parameter.name:
            values[0] = 0
        parameter.set_data(Tensor(values).astype(parameter.dtype))
    return decoder, handle


def answers(decoder, handle, prompts, tokens=8):
    """case -> [{"tokens", "margins"}] of each prompt; a margin is what the best token had before the second."""
    from colora_ms import Contrast, Generator

    rng = np.random.default_rng(5)
    asked = [rng.integers(3, 500, size).tolist() for size in (1, 5, 17, 40)[:prompts]]
    generator, found = Generator(decoder, Words(), handle, max_rows=8), {}
    for case in CASES:
        contrast = Contrast(0.1, 0.5) if case == "contrast" else None
        adapter = {"base": None, "contrast": "one"}.get(case, case)
        child.say(start=case)
        began = time.time()
        done = generator.generate(asked, adapter=adapter, contrast=contrast, max_new_tokens=tokens, ignore_eos=True,
                                  logprobs=2)
        child.say(done=case, seconds=round(time.time() - began, 3), wrong=None)
        found[case] = [{"tokens": list(one.tokens), "margins": [at.tops[0][1] - at.tops[1][1] if len(at.tops) > 1
                                                                 else 99.0 for at in one.logprobs]} for one in done]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", default="Ascend")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--format", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--experts", action="store_true", help="routed experts in the MLP's place")
    options = parser.parse_args()
    import mindspore as ms

    ms.set_device(options.target)
    from colora_ms import ascend_settings, runtime
    from colora_ms.kernels import backend

    began = time.time()
    decoder, handle = build(options.layers, options.format, experts=options.experts)
    found = answers(decoder, handle, options.prompts, 8 if options.prompts > 1 else 4)
    options.out.write_text(json.dumps({
        "answers": found, "kernels": backend(), "graphs": runtime.all_compilations(),
        "seconds": round(time.time() - began, 2), "settings": ascend_settings.report()}))


if __name__ == "__main__":
    main()
