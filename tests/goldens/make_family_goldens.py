"""Goldens of the families: tiny models of transformers whose every setting differs from its neutral value.

Writes ``families/<case>.npz``: the config.json, names and shapes of the folder's tensors (their values follow from
their names, see ``family_rules``), ids, and the logits of full passes: of the prompt, of a greedy answer behind it, and
with a LoRA of PEFT on every linear. ``moves`` says how far the logits move where one setting is read wrongly
(``WRONG``): a golden that does not see the mistake is an error. Needs torch, transformers 4.57 and peft::

    python tests/goldens/make_family_goldens.py [case ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft.utils import get_peft_model_state_dict

from family_rules import tensor
from peft import LoraConfig, get_peft_model

VOCAB, PROMPT, ANSWER = 47, 22, 8
TOLERANCE = 2e-4  # of the tests
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0, "tie_word_embeddings": False}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

#: case: (class, settings)
CASES = {
    "mistral": ("Mistral", {"num_hidden_layers": 2, "head_dim": 12, "sliding_window": 4, "rope_theta": 500.0}),
    "gemma2": ("Gemma2", {"num_hidden_layers": 3, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 20,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
                          "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3", {"num_hidden_layers": 7, "head_dim": 12, "sliding_window": 4,
                               "query_pre_attn_scalar": 20, "final_logit_softcapping": 5.0, "rope_theta": 1000.0,
                               "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                               "tie_word_embeddings": True}),
    # with 64 positions and an original length of 16: the prompt is beyond it
    "phi3_long": ("Phi3", {"num_hidden_layers": 2, "hidden_size": 64, "partial_rotary_factor": 0.75,
                           "rope_scaling": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": None}),
    "phi3_short": ("Phi3", {"num_hidden_layers": 2, "hidden_size": 64, "partial_rotary_factor": 0.75,
                            "rope_scaling": LONGROPE, "original_max_position_embeddings": 40, "sliding_window": None}),
    "phi3_window": ("Phi3", {"num_hidden_layers": 2, "sliding_window": 4}),
    "granite": ("Granite", {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True,
                            "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6,
                            "logits_scaling": 1.7}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 1, 0], "tie_word_embeddings": True}),
    "glm4": ("Glm4", {"num_hidden_layers": 2, "head_dim": 12, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 5, "sliding_window": 4, "logit_scale": 0.3,
                            "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {"num_hidden_layers": 2, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "sliding_window": 5}),
    "qwen2_moe": ("Qwen2Moe", {"num_hidden_layers": 3, "shared_expert_intermediate_size": 28, "norm_topk_prob": False,
                               "mlp_only_layers": [1], "decoder_sparse_step": 1, **MOE}),
    "qwen2_moe_norm": ("Qwen2Moe", {"num_hidden_layers": 1, "shared_expert_intermediate_size": 28,
                                    "norm_topk_prob": True, **MOE}),
    "qwen3_moe": ("Qwen3Moe", {"num_hidden_layers": 3, "head_dim": 12, "norm_topk_prob": True,
                               "decoder_sparse_step": 2, **MOE}),
}

OTHER_WAY = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}

#: case: the mistakes that others made (a setting that is lost, taken at its default, or upside down), each as settings.
WRONG = {
    "mistral": [{"sliding_window": 5}, {"sliding_window": None}, {"rope_theta": 10000.0}],
    "gemma2": [{"sliding_window": 5}, {"query_pre_attn_scalar": 12}, {"query_pre_attn_scalar": 8},
               {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"layer_types": OTHER_WAY},
               {"hidden_activation": "gelu"}],
    "gemma3_text": [{"sliding_window": 5}, {"query_pre_attn_scalar": 12}, {"final_logit_softcapping": None},
                    {"rope_scaling": None}, {"rope_local_base_freq": 1000.0}, {"layer_types": OTHER_WAY}],
    "phi3_long": [{"rope_scaling": {**LONGROPE, "long_factor": LONGROPE["short_factor"]}},
                  {"original_max_position_embeddings": 64}],
    "phi3_short": [{"rope_scaling": {**LONGROPE, "short_factor": LONGROPE["long_factor"]}}],
    "phi3_window": [{"sliding_window": 5}, {"sliding_window": None}],
    "granite": [{"embedding_multiplier": 1.0}, {"attention_multiplier": 1.0}, {"attention_multiplier": 8 ** -0.5},
                {"residual_multiplier": 1.0}, {"logits_scaling": 1.0}, {"logits_scaling": 1 / 1.7}],
    "smollm3": [{"no_rope_layers": [0, 1, 0, 0, 1]}, {"no_rope_layers": [1] * 5}],
    "glm4": [{"partial_rotary_factor": 1.0}],
    "cohere2": [{"sliding_window": 5}, {"sliding_window": 4096}, {"logit_scale": 1.0}, {"layer_types": OTHER_WAY}],
    "olmo2": [{"rms_norm_eps": 1e-2}],
    "mixtral": [{"sliding_window": 6}, {"sliding_window": None}, {"num_experts_per_tok": 1}],
    "qwen2_moe": [{"norm_topk_prob": True}], "qwen2_moe_norm": [{"norm_topk_prob": False}],
    "qwen3_moe": [{"norm_topk_prob": False}],
}


def build(case, wrong=None):
    """(model, config.json, {name: shape}); wrong: settings that are put in the place of the case's own."""
    name, settings = CASES[case]
    if (wrong or {}).get("layer_types") is OTHER_WAY:
        own = build(case)[1]["layer_types"]
        wrong = {"layer_types": [OTHER_WAY[kind] for kind in own]}
    settings = {**settings, **(wrong or {})}
    kind = {"Gemma3": "Gemma3Text"}.get(name, name)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    raised = name.startswith("Gemma")
    state = model.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            if key != "lm_head.weight" or not config.tie_word_embeddings:
                value.copy_(torch.from_numpy(tensor(key, tuple(value.shape), raised)))
    shapes = {key: list(value.shape) for key, value in state.items()
              if key != "lm_head.weight" or not config.tie_word_embeddings}
    values = json.loads(config.to_json_string(use_diff=False))
    values["architectures"] = [type(model).__name__]
    return model, values, shapes


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def make(case):
    """The golden of a case."""
    model, values, shapes = build(case)
    random = np.random.default_rng(len(case))
    ids = random.integers(3, VOCAB, PROMPT).tolist()
    answer = list(ids)
    for _ in range(ANSWER):
        answer.append(int(logits_of(model, answer)[-1].argmax()))
    logits = logits_of(model, answer)
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    lora = {}
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if ".lora_" in key:
                saved = key.replace(".default", "")
                value.copy_(torch.from_numpy(tensor(saved, tuple(value.shape))))
                lora[saved] = list(value.shape)
    assert set(lora) == set(get_peft_model_state_dict(adapted))
    with_lora = logits_of(adapted.eval(), ids)
    # What training needs: the loss of the prompt and its gradients, each by its product with fixed numbers.
    adapted(torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False).loss.backward()
    loss = torch.nn.functional.cross_entropy(torch.tensor(with_lora[:-1]), torch.tensor(ids[1:]))
    slopes = {}
    for key, value in adapted.named_parameters():
        if ".lora_" in key:
            saved = key.replace(".default", "")
            slopes[saved] = float((value.grad.numpy() * tensor(f"probe.{saved}", tuple(value.shape))).sum())
    targets = sorted(adapted.peft_config["default"].target_modules)
    moves = []
    for wrong in WRONG[case]:
        moved = float(np.abs(logits_of(build(case, wrong)[0], answer) - logits).max())
        assert moved > 5 * TOLERANCE, f"{case} does not see {wrong}: its logits move by {moved:.2g}"
        moves.append([", ".join(wrong), moved])
    about = {"moves": moves, "config": values, "shapes": shapes, "lora": lora, "targets": targets, "prompt": PROMPT,
             "loss": float(loss), "slopes": slopes,
             "transformers": transformers.__version__}
    folder = Path(__file__).parent / "families"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / f"{case}.npz", about=np.array(json.dumps(about)), ids=np.array(answer, np.int32),
                        logits=logits.astype(np.float32), lora_logits=with_lora.astype(np.float32))
    spread = logits.max(1) - logits.min(1)
    print(f"{case}: {len(shapes)} tensors, logits spread {spread.mean():.2f}, LoRA moves them by "
          f"{np.abs(with_lora - logits[:PROMPT]).max():.2f}, {(folder / f'{case}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    for one in sys.argv[1:] or CASES:
        make(one)
