"""Make the golden values of LoRA's options (DoRA, PiSSA, OLoRA, a bias on lora_B) and of combined adapters, from peft.

    .venv-peers/bin/python tests/goldens/make_adapter_options.py

Needs the tiny models that make_goldens.py made.  Writes folders under peft/ and combine.npz.
"""

import math
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import rules  # noqa: E402
from make_goldens import forward, load, save_adapter, store_adapter_logits  # noqa: E402

PEFT = {
    # name: (tiny model, LoraConfig settings)
    "dora": ("llama", dict(r=3, lora_alpha=6, use_dora=True, target_modules="all-linear")),
    "dora_bias": ("llama_bias", dict(r=2, lora_alpha=3, use_dora=True, use_rslora=True, bias="lora_only",
                                     target_modules=["q_proj", "o_proj", "down_proj"])),
    "lora_bias": ("llama_bias", dict(r=2, lora_alpha=3, lora_bias=True,
                                     target_modules=["q_proj", "gate_proj"])),
    "pissa": ("llama", dict(r=3, lora_alpha=6, init_lora_weights="pissa",
                            target_modules=["q_proj", "up_proj", "down_proj"])),
    "olora": ("llama", dict(r=3, lora_alpha=2, init_lora_weights="olora", use_rslora=True,
                            target_modules=["q_proj", "up_proj", "down_proj"])),
    "dora_pissa": ("llama", dict(r=2, lora_alpha=4, init_lora_weights="pissa", use_dora=True,
                                 target_modules=["q_proj", "down_proj"])),
}


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for name in PEFT:
        make_adapter(name)
    make_combinations()


def make_adapter(name):
    """A folder as make_goldens.py makes them; start.npz holds what initialisations did, gradients.npz gradients."""
    import torch

    from peft import LoraConfig, PeftModel, get_peft_model
    base, settings = PEFT[name]
    folder, base_folder = os.path.join(HERE, "peft", name), os.path.join(HERE, "tiny", base)
    model = get_peft_model(load(base_folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    if settings.get("init_lora_weights"):
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        start = {"residual": layer.base_layer.weight, "down": layer.lora_A["default"].weight,
                 "up": layer.lora_B["default"].weight}
        if settings.get("use_dora"):
            start["magnitude"] = layer.lora_magnitude_vector["default"].weight
        start = {key: value.detach().numpy().copy() for key, value in start.items()}
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if not value.requires_grad:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "magnitude" in key:
                value.mul_(1 + 0.3 * noise)
            elif "lora_" in key and not settings.get("init_lora_weights") and value.ndim > 1:
                value.copy_(0.5 * noise / math.sqrt(value.shape[-1]))
            else:
                value.add_(0.2 * noise)
    model.peft_config["default"].base_model_name_or_path = f"tiny/{base}"
    save_adapter(model, folder)
    reloaded = PeftModel.from_pretrained(load(base_folder), folder)
    store_adapter_logits(os.path.join(folder, "logits.npz"), reloaded, base_folder)
    ids = np.load(os.path.join(folder, "logits.npz"))["ids"]
    assert np.abs(forward(reloaded, ids) - forward(model, ids)).max() < 1e-3
    if settings.get("init_lora_weights"):
        np.savez_compressed(os.path.join(folder, "start.npz"), **start)
    elif settings.get("use_dora"):
        store_gradients(model, os.path.join(folder, "gradients.npz"))


def store_gradients(model, path):
    """Gradients of sum(logits * noise) for six ids a row; peft takes the norm of the weight for a constant."""
    import torch
    ids = np.random.RandomState(3).randint(0, 96, (2, 6))
    noise = np.random.RandomState(4).randint(-8, 9, (2, 6, 96)).astype(np.float32)
    model.zero_grad()
    (model(input_ids=torch.from_numpy(ids)).logits * torch.from_numpy(noise)).sum().backward()
    found = {key.replace(".default", ""): value.grad.numpy() for key, value in model.named_parameters()
             if value.requires_grad and ".layers.0." in key and ("q_proj" in key or "down_proj" in key)}
    np.savez_compressed(path, ids=ids.astype(np.int32), noise=noise, **found)
    print(f"{os.path.relpath(path, HERE)}: {len(found)} gradients")


def make_combinations():
    """For each case of rules.COMBINATIONS the change of some weights by peft's combined adapter."""
    import torch

    from peft import LoraConfig, get_peft_model
    arrays = {}
    model = None
    for name, settings in rules.COMBINED.items():
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        if model is None:
            model = get_peft_model(load(os.path.join(HERE, "tiny", "llama")), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            name = key.removesuffix(".weight").rsplit(".", 1)[-1]
            if "lora_" in key and name in rules.COMBINED:
                value.copy_(torch.from_numpy(rules.combined_tensor(name, key, tuple(value.shape))))
    for case, (names, weights, options) in rules.COMBINATIONS.items():
        model.base_model.add_weighted_adapter(names, weights, case, **options)
        for short, module in rules.COMBINED_MODULES.items():
            layer = model.get_submodule("base_model.model." + module)
            held = layer.lora_embedding_A if "embed" in module else layer.lora_A
            if case in held:
                arrays[f"{case}.{short}"] = layer.get_delta_weight(case).detach().numpy()[:24]
        model.delete_adapter(case)
    np.savez_compressed(os.path.join(HERE, "combine.npz"), **arrays)
    print(f"combine.npz: {len(arrays)} changes of weights, largest {max(np.abs(v).max() for v in arrays.values()):.2f}")


if __name__ == "__main__":
    main()
