"""Make the golden values from torch, transformers, peft and sentencepiece.

Two steps, because the peers live in their own environment:

    python tests/goldens/make_goldens.py --write-smollm2 DIR     (environment of colora_ms)
    .venv-peers/bin/python tests/goldens/make_goldens.py --smollm2 DIR --stories DIR2

DIR2 holds the stories260k model's tokenizer.model.  Without --smollm2 or --stories the goldens of
those models are left as they are.  With the environment variable SMOLLM2_GGUF (the GGUF's path),
the weights in DIR are also compared with transformers' own GGUF reader, bit for bit.
"""

import argparse
import json
import math
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.path.insert(0, os.path.join(HERE, "..", ".."))

import rules  # noqa: E402

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TINY = {
    # name: (model type, dtype on disk, settings)
    "llama": ("llama", "float32", dict(
        tie_word_embeddings=False, rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
    "llama_bias": ("llama", "bfloat16", dict(
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True, head_dim=10)),
    "llama_linear": ("llama", "bfloat16", dict(
        tie_word_embeddings=True, rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "llama_yarn": ("llama", "float16", dict(
        tie_word_embeddings=True,
        rope_scaling={"rope_type": "yarn", "factor": 4.0,
                      "original_max_position_embeddings": 32})),
    "qwen2": ("qwen2", "bfloat16", dict(tie_word_embeddings=True, rope_theta=1000000.0)),
    "qwen3": ("qwen3", "bfloat16", dict(tie_word_embeddings=False, rope_theta=1000000.0,
                                        head_dim=16, attention_bias=False)),
}
LENGTH = 40
KEPT_POSITIONS = [0, 1, 2, 7, 15, 31, 32, 39]

PEFT = {
    # name: (tiny model, LoraConfig settings)
    "qv_r8": ("llama", dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
    "all_rslora": ("llama", dict(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear",
        rank_pattern={"q_proj": 6, "layers.1.mlp.down_proj": 2},
        alpha_pattern={"layers.1.self_attn.v_proj": 3, "gate_proj": 9})),
    "save_lm_head": ("llama", dict(r=2, lora_alpha=8, target_modules=["o_proj", "up_proj"],
                                   modules_to_save=["lm_head"])),
    "bias_lora_only": ("llama_bias", dict(r=2, lora_alpha=2, bias="lora_only",
                                          target_modules=["q_proj", "down_proj"])),
}

ROPE_POSITIONS = [0, 1, 2, 31, 100, 1000, 4095]
ROPE_CASES = {
    "default": dict(rope_theta=10000.0),
    "default_1e6": dict(rope_theta=1000000.0, head_dim=128),
    "linear": dict(rope_theta=10000.0, rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "dynamic": dict(rope_theta=10000.0, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
    "llama31": dict(rope_theta=500000.0, head_dim=128, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}),
    "llama32": dict(rope_theta=500000.0, head_dim=64, rope_scaling={
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}),
    "yarn": dict(rope_theta=1000000.0, head_dim=128, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}),
    "yarn_no_original": dict(rope_theta=10000.0, rope_scaling={"rope_type": "yarn", "factor": 8.0}),
    "yarn_mscale": dict(rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0,
        "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}),
    "yarn_attention_factor": dict(rope_theta=10000.0, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9, "truncate": False,
        "original_max_position_embeddings": 1024}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-smollm2", metavar="DIR", help="dequantize SmolLM2 into DIR, stop")
    parser.add_argument("--smollm2", metavar="DIR", help="the folder that --write-smollm2 made")
    parser.add_argument("--stories", metavar="DIR", help="the stories260k model's folder")
    arguments = parser.parse_args()
    if arguments.write_smollm2:
        from colora_ms.models.checkpoint import default_model_path, open_checkpoint, write_hf_folder
        source = open_checkpoint(default_model_path("smollm2-135m"))
        print(write_hf_folder(arguments.write_smollm2, source.config, source.tensors,
                              source.tokenizer_source, overwrite=True))
        return
    # everything is local; without this, peft looks up the tiny models' names on the hub
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    torch.manual_seed(0)
    torch.set_num_threads(2)
    make_rope()
    for name in TINY:
        make_tiny(name)
    for name in PEFT:
        make_tiny_adapter(name)
    if arguments.smollm2:
        make_smollm2(arguments.smollm2)
    make_tokenizer_vectors(arguments.smollm2, arguments.stories)


def make_rope():
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    arrays, cases = {}, {}
    for name, settings in ROPE_CASES.items():
        settings = dict(dict(SIZES, max_position_embeddings=4096, head_dim=64), **settings)
        rotary = LlamaRotaryEmbedding(LlamaConfig(**settings))
        positions = torch.tensor([ROPE_POSITIONS])
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
        half = settings["head_dim"] // 2
        assert torch.equal(cos[..., :half], cos[..., half:])
        arrays[name + ".cos"], arrays[name + ".sin"] = cos[0, :, :half].numpy(), \
            sin[0, :, :half].numpy()
        cases[name] = settings
    np.savez_compressed(os.path.join(HERE, "rope.npz"), positions=ROPE_POSITIONS, **arrays)
    write_json("rope.json", cases)


def make_tiny(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    model_type, dtype, settings = TINY[name]
    # transformers writes defaults into the rope_scaling that it is given
    config = AutoConfig.for_model(model_type, **dict(SIZES, **json.loads(json.dumps(settings))))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("norm.weight"):
                value.copy_(1 + 0.2 * noise)
            elif key.endswith("bias"):
                value.copy_(0.3 * noise)
            elif "embed" in key:
                value.copy_(noise)
            else:
                value.copy_(1.3 * noise / math.sqrt(value.shape[-1]))
    folder = os.path.join(HERE, "tiny", name)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    model = load(folder)
    ids = np.random.RandomState(len(name)).randint(0, SIZES["vocab_size"], (2, LENGTH))
    logits = forward(model, ids)
    greedy = generate(model, ids[:, :8], 24)
    np.savez_compressed(
        os.path.join(folder, "logits.npz"), ids=ids.astype(np.int32), positions=KEPT_POSITIONS,
        logits=logits[:, KEPT_POSITIONS], argmax=logits.argmax(-1).astype(np.int32),
        greedy_ids=greedy[0], greedy_margin=greedy[1])
    print(f"tiny/{name}: logits std {logits.std():.2f}, least greedy margin {greedy[1].min():.4f}")


def make_tiny_adapter(name):
    import torch

    from peft import LoraConfig, PeftModel, get_peft_model
    base, settings = PEFT[name]
    folder = os.path.join(HERE, "peft", name)
    model = get_peft_model(load(os.path.join(HERE, "tiny", base)),
                           LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if not value.requires_grad:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "lora_" in key:
                value.copy_(0.5 * noise / math.sqrt(value.shape[-1]))
            else:
                value.add_(0.1 * noise)
    model.peft_config["default"].base_model_name_or_path = f"tiny/{base}"
    save_adapter(model, folder)
    reloaded = PeftModel.from_pretrained(load(os.path.join(HERE, "tiny", base)), folder)
    store_adapter_logits(os.path.join(folder, "logits.npz"), reloaded,
                         os.path.join(HERE, "tiny", base))


def save_adapter(model, folder):
    """Write a peft model's adapter: its config and tensors only, the same bytes in every run."""
    model.save_pretrained(folder)
    if os.path.exists(os.path.join(folder, "README.md")):
        os.remove(os.path.join(folder, "README.md"))
    # peft writes a set in any order; sorted, the file is the same in every run
    path = os.path.join(folder, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    if isinstance(saved["target_modules"], list):
        saved["target_modules"] = sorted(saved["target_modules"])
    write_json(path, saved)


def store_adapter_logits(path, model, base_folder):
    ids = np.load(os.path.join(base_folder, "logits.npz"))["ids"]
    logits = forward(model, ids)
    with model.disable_adapter():
        base = forward(model, ids)
    assert np.abs(logits - base).max() > 0.1
    np.savez_compressed(path, ids=ids, positions=KEPT_POSITIONS,
                        logits=logits[:, KEPT_POSITIONS],
                        argmax=logits.argmax(-1).astype(np.int32))
    print(f"{os.path.relpath(path, HERE)}: largest change by the adapter "
          f"{np.abs(logits - base).max():.2f}")


def make_smollm2(folder):
    import torch
    from transformers import AutoTokenizer

    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    check_against_own_gguf_reader(model)
    columns = np.sort(np.random.RandomState(0).choice(model.config.vocab_size, 192, replace=False))
    arrays, prompts = {"columns": columns.astype(np.int32)}, []
    for index, text in enumerate(rules.LOGIT_PROMPTS):
        ids = tokenizer(text).input_ids
        keep = np.unique(np.linspace(0, len(ids) - 1, 8).astype(int))
        logits = forward(model, np.array([ids]))[0]
        arrays.update({f"ids{index}": np.array(ids, np.int32), f"positions{index}": keep,
                       f"logits{index}": logits[keep][:, columns],
                       f"argmax{index}": logits.argmax(-1).astype(np.int32)})
        prompts.append(ids)
    for index, text in enumerate(rules.GREEDY_PROMPTS):
        ids = np.array([tokenizer(text).input_ids])
        tokens, margin = generate(model, ids, 32)
        arrays.update({f"greedy_prompt{index}": ids[0].astype(np.int32),
                       f"greedy_ids{index}": tokens[0], f"greedy_margin{index}": margin[0]})
        print(repr(text), "->", repr(tokenizer.decode(tokens[0])), f"{margin.min():.4f}")
    for name, settings in rules.SMOLLM2_ADAPTERS.items():
        adapted = get_peft_model(load(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
        shapes = {key: tuple(value.shape)
                  for key, value in get_peft_model_state_dict(adapted).items()}
        result = set_peft_model_state_dict(adapted, {
            key: torch.from_numpy(rules.adapter_tensor(key, shape))
            for key, shape in shapes.items()})
        assert not result.unexpected_keys
        logits = forward(adapted, np.array([prompts[0]]))[0]
        keep = arrays["positions0"]
        arrays.update({f"{name}.logits": logits[keep][:, columns],
                       f"{name}.argmax": logits.argmax(-1).astype(np.int32)})
        change = np.abs(logits[keep][:, columns] - arrays["logits0"]).max()
        assert change > 0.1
        print(f"smollm2 {name}: {len(shapes)} tensors, largest change by the adapter {change:.2f}")
    np.savez_compressed(os.path.join(HERE, "smollm2.npz"), **arrays)


def check_against_own_gguf_reader(model):
    """transformers reads GGUF too: its weights must be bit-equal to those that colora_ms wrote."""
    import torch
    from transformers import AutoModelForCausalLM
    path = os.environ.get("SMOLLM2_GGUF")
    if not path:
        print("SMOLLM2_GGUF is not set: the weights are not compared with transformers' reader")
        return
    other = AutoModelForCausalLM.from_pretrained(
        os.path.dirname(path), gguf_file=os.path.basename(path), dtype=torch.float32)
    theirs = other.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    print("weights equal transformers' own GGUF reader, bit for bit")


def make_tokenizer_vectors(smollm2, stories):
    path = os.path.join(HERE, "tokenizers.json")
    vectors = json.load(open(path, encoding="utf-8")) if os.path.exists(path) else {}
    vectors["strings"] = rules.AWKWARD_STRINGS
    if smollm2:
        encode = slow_byte_level(os.path.join(smollm2, "tokenizer.json"))
        vectors["smollm2"] = [encode(text) for text in rules.AWKWARD_STRINGS]
    if stories:
        import sentencepiece
        model = sentencepiece.SentencePieceProcessor(
            model_file=os.path.join(stories, "tokenizer.model"))
        # spelled-out special tokens are text for the sentencepiece library, but not for a chat
        vectors["stories260k"] = [None if "<s>" in text else [model.bos_id()] + model.encode(text)
                                  for text in rules.AWKWARD_STRINGS]
    write_json("tokenizers.json", vectors)


def slow_byte_level(path):
    """SmolLM2's encoding by transformers' pure-Python GPT-2 tokenizer.

    Only vocabulary and merges are taken from the file.  Digits are cut off one by one before, and
    special tokens are looked up, as the model's authors define it.
    """
    import tempfile

    import regex
    from transformers import GPT2Tokenizer
    data = json.load(open(path, encoding="utf-8"))
    special = {item["content"]: item["id"] for item in data["added_tokens"]}
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, name) for name in ("vocab.json", "merges.txt")]
        json.dump(data["model"]["vocab"], open(names[0], "w", encoding="utf-8"))
        with open(names[1], "w", encoding="utf-8") as file:
            file.write("#version: 0.2\n" + "".join(
                (line if isinstance(line, str) else " ".join(line)) + "\n"
                for line in data["model"]["merges"]))
        slow = GPT2Tokenizer(*names)
    cut = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")

    def encode(text):
        ids = []
        for part in cut.split(text):
            if part in special:
                ids.append(special[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                ids += slow.convert_tokens_to_ids(slow._tokenize(piece))
        return ids
    return encode


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="eager").eval()


def forward(model, ids):
    """Logits, float32 (rows, length, vocab)."""
    import torch
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(np.asarray(ids, np.int64))).logits.numpy()


def generate(model, ids, count):
    """Greedy continuation without end tokens: (ids (rows, count), lead over the runner-up)."""
    ids = np.asarray(ids, np.int64)
    start, margins = ids.shape[1], []
    for _ in range(count):
        last = forward(model, ids)[:, -1]
        top = np.sort(last, -1)
        margins.append(top[:, -1] - top[:, -2])
        ids = np.concatenate([ids, last.argmax(-1)[:, None]], 1)
    return ids[:, start:].astype(np.int32), np.stack(margins, 1).astype(np.float32)


def write_json(name, value):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
