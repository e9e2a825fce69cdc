"""Make test_lora_matching_peft.json: which modules peft adapts for a table of configs, with which rank and scaling.

Run it where torch, transformers and peft are installed (scripts/setup_peers.sh): ``python lora_matching_goldens.py``.
"""

import json
import os
import warnings

CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR", "exclude_modules": ["k_proj"]},
    {},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["1.self_attn.q_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["lm_head", "embed_tokens"]},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r".*layers\.(1|2)\..*proj"},
    {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
    {"target_modules": r"(?i).*Q_PROJ"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [3], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj", "model.layers.5.mlp.up_proj"], "layers_to_transform": [3]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.[0-9]\..*"},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "0.self_attn.o_proj"]},
    {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": "all-linear", "r": 4, "lora_alpha": 3,
     "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
     "alpha_pattern": {"v_proj": 5}},
    {"target_modules": "all-linear", "r": 4, "use_rslora": True,
     "rank_pattern": {r"^model\.layers\.1\..*": 2, "q_proj": 3, r"(1|2)\.mlp\.up_proj": 9},
     "alpha_pattern": {r".*up_proj": 2, r"model.layers.0.self_attn.[qk]_proj": 1}},
    {"target_modules": ["q_proj", "k_proj"],
     "rank_pattern": {"layers.1.self_attn.q_proj": 1, "11.self_attn.k_proj": 6}},
    {"target_modules": ["proj"]},
    {"target_modules": "q_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["input_layernorm"]},
    {"target_modules": "all-linear", "modules_to_save": ["mlp", "self_attn"]},
    # The first pattern that matches holds: the order is part of the meaning.
    {"target_modules": ["down_proj"], "r": 4, "alpha_pattern": {"model.layers.1.mlp.down_proj": 64, "down_proj": 8}},
    {"target_modules": ["down_proj"], "r": 4, "alpha_pattern": {"down_proj": 8, "model.layers.1.mlp.down_proj": 64}},
    {"target_modules": ["down_proj", "q_proj"], "rank_pattern": {r"layers\.[12]\..*": 3, "q_proj": 5, ".*": 2},
     "alpha_pattern": {"z|down_proj": 6, "q_proj": 1}},
    # More than the model has.
    {"target_modules": ["q_proj", "c_attn", "layers.99.self_attn.k_proj"]},
    {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 4, "nope": 2}, "alpha_pattern": {"zzz": 3}},
    {"target_modules": ["q_proj"], "layers_to_transform": [3, 12, 40]},
    {"target_modules": ["q_proj"], "layers_to_transform": [12, 40]},
    {"target_modules": ["c_attn"]},
]


def main():
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft import LoraConfig, get_peft_model

    def model():
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=12,
                                            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False))

    warnings.simplefilter("ignore")
    base = dict(model().named_modules())
    names = [name for name in base if name]
    cases = []
    for settings in CASES:
        try:
            adapted = get_peft_model(model(), LoraConfig(**settings)).base_model.model
        except ValueError:
            cases.append({"config": settings, "error": True})
            continue
        targets, saved = {}, set()
        for name, module in adapted.named_modules():
            if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling:
                targets.setdefault(f"{module.r['default']} {module.scaling['default']!r}", []).append(names.index(name))
            if type(module).__name__ == "ModulesToSaveWrapper":
                for key in module.modules_to_save["default"].state_dict():
                    saved.add(names.index(f"{name}.{key}".rsplit(".", 1)[0]))
        cases.append({"config": settings, "targets": targets, "saved": sorted(saved)})
    kinds = {kind: [names.index(name) for name, module in base.items() if name and type(module).__name__.endswith(cls)]
             for kind, cls in (("linear", "Linear"), ("embedding", "Embedding"), ("norm", "RMSNorm"))}
    path = os.path.join(os.path.dirname(__file__), "test_lora_matching_peft.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"names": names, "kinds": kinds, "cases": cases}, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
