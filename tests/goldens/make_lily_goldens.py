"""Make the Lily goldens with peft on torch: folders in PEFT's layout and the logits that peft computes with them.

    .venv-peers/bin/python tests/goldens/make_lily_goldens.py

The base is a random Llama of five layers whose weights follow from ``lily_base.weights``, so that none are stored.
"""

import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import lily_base  # noqa: E402
from make_goldens import save_adapter  # noqa: E402

CASES = {
    "stride2": dict(r=4, stride_A=2, num_B=3, scaling=2.0, target_modules=["q_proj", "v_proj"]),
    # q_proj and o_proj have one shape here: with an expression, peft lets them share.
    "expression": dict(r=3, stride_A=3, num_B=2, scaling=0.5, target_modules=r".*\.(q_proj|o_proj|down_proj)"),
    "some_layers": dict(r=2, stride_A=2, num_B=2, target_modules=["up_proj"], layers_to_transform=[1, 2, 4]),
}


def base():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(**lily_base.SIZES, attn_implementation="eager"))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    values = lily_base.weights(shapes)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return model.eval()


def make(name, settings):
    import torch

    from peft import LilyConfig, get_peft_model
    torch.manual_seed(0)
    model = get_peft_model(base(), LilyConfig(task_type="CAUSAL_LM", init_weights=False, **settings)).eval()
    folder = os.path.join(HERE, "peft_lily", name)
    model.peft_config["default"].base_model_name_or_path = "lily_base"
    save_adapter(model, folder)
    ids = np.random.default_rng(1).integers(3, lily_base.SIZES["vocab_size"], (3, 7)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()).logits.numpy()
        alone = model(torch.from_numpy(ids[:1]).long()).logits.numpy()
        with model.disable_adapter():
            plain = model(torch.from_numpy(ids).long()).logits.numpy()
    assert np.abs(logits - plain).max() > 0.05
    np.savez_compressed(os.path.join(folder, "logits.npz"), ids=ids, logits=logits, alone=alone, base=plain[:1],
                        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad))
    print(f"{name}: largest change by the adapter {np.abs(logits - plain).max():.3f}, by the other rows "
          f"{np.abs(logits[:1] - alone).max():.4f}")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for case, values in CASES.items():
        make(case, values)
