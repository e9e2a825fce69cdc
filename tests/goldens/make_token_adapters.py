"""Make the golden adapters that train single token rows, that stay tied to a tied head, or that enlarge the vocabulary.

    .venv-peers/bin/python tests/goldens/make_token_adapters.py

Needs the tiny models that make_goldens.py made.  Writes folders under peft/.
"""

import math
import os
import sys
import warnings

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

from make_goldens import KEPT_POSITIONS, SIZES, forward, load, save_adapter  # noqa: E402

LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
ROWS = [3, 90, 7]
PEFT = {
    # name: (tiny model, LoraConfig settings); llama has a head of its own, llama_linear and qwen2 a tied one
    "tokens": ("llama", dict(LORA, trainable_token_indices=ROWS)),
    "tokens_tied": ("llama_linear", dict(LORA, trainable_token_indices=ROWS)),
    "tokens_both": ("llama", dict(LORA, trainable_token_indices={"embed_tokens": ROWS, "lm_head": [5, 7]})),
    "tokens_tied_apart": ("llama_linear", dict(LORA, trainable_token_indices={"embed_tokens": ROWS, "lm_head": [5, 7]})),
    "tokens_tied_head": ("qwen2", dict(LORA, trainable_token_indices={"lm_head": ROWS})),
    "tokens_tied_ensured": ("qwen2", dict(LORA, ensure_weight_tying=True,
                                          trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS})),
    "save_tied": ("llama_linear", dict(LORA, modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "save_tied_embedding": ("qwen2", dict(LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
}

MORE = 5
LARGER = {
    # name: (tiny model, LoraConfig settings, whether peft finds the base's config and so stores the base's rows too)
    "larger": ("llama", dict(LORA, modules_to_save=["embed_tokens", "lm_head"]), False),
    "larger_stored": ("llama", dict(LORA, modules_to_save=["embed_tokens", "lm_head"]), True),
    "larger_tied": ("llama_linear", dict(LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True), False),
    "larger_tied_stored": ("llama_linear", dict(LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
    "larger_untrained": ("llama", LORA, True),
    "larger_untrained_tied": ("llama_linear", LORA, True),
}


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    torch.manual_seed(0)
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    for name, (base, settings) in PEFT.items():
        make(name, base, settings)
    for name, (base, settings, stored) in LARGER.items():
        make_larger(name, base, settings, stored)


def train(model, name):
    """Put other values into what is trained."""
    import torch
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=generator)
                if "lora_" in key:
                    value.copy_(0.5 * noise / math.sqrt(value.shape[-1]))
                else:
                    value.add_(0.3 * noise)


def make(name, base, settings):
    from peft import LoraConfig, PeftModel, get_peft_model
    folder, base_folder = os.path.join(HERE, "peft", name), os.path.join(HERE, "tiny", base)
    model = get_peft_model(load(base_folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    train(model, name)
    model.peft_config["default"].base_model_name_or_path = f"tiny/{base}"
    save_adapter(model, folder)
    reloaded = PeftModel.from_pretrained(load(base_folder), folder)
    store_logits(os.path.join(folder, "logits.npz"), reloaded, ROWS + [5])
    merged(reloaded, os.path.join(folder, "logits.npz"))
    print(name, sorted(key for key in stored_names(folder) if "lora_" not in key))


def make_larger(name, base, settings, stored):
    from peft import LoraConfig, get_peft_model
    import torch
    folder, base_folder = os.path.join(HERE, "peft", name), os.path.join(HERE, "tiny", base)
    torch.manual_seed(sum(map(ord, name)))
    model = load(base_folder)
    model.resize_token_embeddings(SIZES["vocab_size"] + MORE)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    train(model, name)
    model.peft_config["default"].base_model_name_or_path = base_folder if stored else "tiny/none"
    save_adapter(model, folder)
    rename_base(folder, base)
    store_logits(os.path.join(folder, "logits.npz"), model, range(SIZES["vocab_size"], SIZES["vocab_size"] + MORE))
    print(name, {key: shape for key, shape in stored_names(folder).items() if "lora_" not in key})


def rename_base(folder, base):
    """The base's path of this machine does not belong into a golden."""
    import json
    path = os.path.join(folder, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    values["base_model_name_or_path"] = f"tiny/{base}"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def stored_names(folder):
    from safetensors.numpy import load_file
    return {key: value.shape for key, value in load_file(os.path.join(folder, "adapter_model.safetensors")).items()}


def store_logits(path, model, special):
    """Logits with the adapter and without it, on ids among which the special ones are frequent."""
    random = np.random.RandomState(len(path) % 7)
    ids = random.randint(0, SIZES["vocab_size"], (2, 40))
    ids[:, ::3] = random.choice(list(special), ids[:, ::3].shape)
    logits = forward(model, ids)
    with model.disable_adapter():
        base = forward(model, ids)
    assert np.abs(logits - base).max() > 0.1
    np.savez_compressed(path, ids=ids.astype(np.int32), positions=KEPT_POSITIONS, logits=logits[:, KEPT_POSITIONS],
                        argmax=logits.argmax(-1).astype(np.int32), base=base[:, KEPT_POSITIONS])


def merged(model, path):
    """peft's own merge gives the same logits."""
    stored = np.load(path)
    plain = model.merge_and_unload()
    off = np.abs(forward(plain, stored["ids"])[:, stored["positions"]] - stored["logits"]).max()
    print(f"  merged by peft: off by {off:.2g}")


if __name__ == "__main__":
    main()
