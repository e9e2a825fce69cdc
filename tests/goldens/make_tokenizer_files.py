"""Make tests/goldens/tokenizer_files/: small tokenizers, folders around them, and transformers' ids.

    PYTHONPATH=. .venv/bin/python tests/goldens/make_tokenizer_files.py --bases
    PYTHONPATH=DIR .venv-peers/bin/python tests/goldens/make_tokenizer_files.py

The first step trains the tokenizers (bytes.json, metaspace.json, spm.model) and is only needed to make other ones.
DIR holds the protobuf package, which transformers needs to convert a tokenizer.model.
"""

import json
import os
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.path.join(HERE, "tokenizer_files")
FAST, LLAMA = "PreTrainedTokenizerFast", "LlamaTokenizer"

STRINGS = ["", "the little girl", "<|im_start|>user\nhi<|im_end|>", " <|im_start|> user <|im_end|> \n",
           "a <mask> b<mask>c",
           "<s>the</s> little", "x</s>y", "[PAD][PAD] the [PAD]", "<tool> <tool>\tname</tool>", "  two  blanks  ",
           "\n\nnew\n",
           "é e\u0301 한국어 😀", "the<extra_0>girl<extra_1> named", "word<w> <w>word <w> .", "▁the ▁", "<|im_start|>",
           "Answer: 42 "]


def token(content, **flags):
    """An entry of added_tokens_decoder."""
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False,
            "special": True, **flags}


#: name -> (base, {file: content}); "N" + offset stands for the id behind the base's last plus offset
CASES = {
    "plain": ("bytes", {}),
    "config without tokens": ("bytes", {"tokenizer_config.json": {"tokenizer_class": FAST}}),
    "added_tokens_decoder": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "eos_token": "<|im_end|>", "added_tokens_decoder": {
            "N0": token("<|im_start|>"), "N1": token("<|im_end|>"), "N2": token("<tool>", special=False,
                                                                                normalized=True)}}}),
    "added_tokens_decoder with flags": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "mask_token": "<mask>", "added_tokens_decoder": {
            "N0": token("<mask>", lstrip=True), "N1": token("<|im_start|>", rstrip=True),
            "N2": token("<w>", single_word=True), "N3": token("<tool>", special=False, rstrip=True, lstrip=True)}}}),
    "flags of a token that is there": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "added_tokens_decoder": {"0": token("<s>", rstrip=True), "1": token("</s>",
                                                                                                     lstrip=True)}}}),
    "added_tokens.json": ("bytes", {"added_tokens.json": {"<|im_start|>": "N0", "<|im_end|>": "N1"},
                                    "tokenizer_config.json": {"tokenizer_class": FAST, "eos_token": "<|im_end|>"}}),
    "added_tokens.json in another order": ("bytes", {"added_tokens.json": {"<|im_end|>": "N1", "[PAD]": "N2",
                                                                           "<|im_start|>": "N0"}}),
    "pad token in the map": ("bytes", {"added_tokens.json": {"[PAD]": "N0"},
                                       "special_tokens_map.json": {"pad_token": "[PAD]"},
                                       "tokenizer_config.json": {"tokenizer_class": FAST}}),
    "additional_special_tokens": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}}),
    "additional as objects": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "additional_special_tokens": [
            {"__type": "AddedToken", **token("<|im_end|>", lstrip=True)}, {"__type": "AddedToken",
                                                                           **token("<mask>")}]}}),
    "additional in the map": ("bytes", {"special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>",
                                                                                                  "<|im_end|>"]},
                                        "tokenizer_config.json": {"tokenizer_class": FAST,
                                                                  "additional_special_tokens": ["<mask>"]}}),
    "extra_special_tokens": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "extra_special_tokens": {"image_token": "<extra_0>", "end_token": "<extra_1>"},
        "additional_special_tokens": ["<|im_start|>"]}}),
    "a word becomes special": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "additional_special_tokens": ["the"], "eos_token": "er"}}),
    "map against config": ("bytes", {"special_tokens_map.json": {"eos_token": "<s>"},
                                     "tokenizer_config.json": {"tokenizer_class": FAST, "eos_token": "</s>"}}),
    "map against config with decoder": ("bytes", {"special_tokens_map.json": {"eos_token": "<s>"},
    "tokenizer_config.json": {
        "tokenizer_class": FAST, "eos_token": "</s>", "added_tokens_decoder": {"N0": token("<mask>")}}}),
    "split_special_tokens": ("bytes", {"tokenizer_config.json": {"tokenizer_class": FAST,
                                                                 "split_special_tokens": True}}),
    "add_prefix_space": ("bytes", {"tokenizer_config.json": {"tokenizer_class": FAST, "add_prefix_space": True}}),
    "llama class": ("bytes", {"tokenizer_config.json": {"tokenizer_class": LLAMA + "Fast", "bos_token": "<s>",
                                                        "eos_token": "</s>", "unk_token": None}}),
    "llama class without begin": ("bytes_bos", {"tokenizer_config.json": {
        "tokenizer_class": LLAMA, "add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": None}}),
    "llama class by model_type": ("metaspace", {"config.json": {"model_type": "llama"}}),
    "begin token of the file": ("bytes_bos", {"tokenizer_config.json": {"tokenizer_class": FAST, "bos_token": "<s>"}}),
    "add_bos_token that does nothing": ("bytes", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "add_bos_token": True, "bos_token": "<s>"}}),
    "metaspace with chat tokens": ("metaspace", {"tokenizer_config.json": {
        "tokenizer_class": FAST, "added_tokens_decoder": {"N0": token("<|im_start|>"), "N1": token("<|im_end|>")}}}),
    "model": ("spm", {"tokenizer_config.json": {"tokenizer_class": LLAMA}}),
    "model with added tokens": ("spm", {"added_tokens.json": {"<|im_start|>": "N0", "<|im_end|>": "N1"},
                                        "tokenizer_config.json": {"tokenizer_class": LLAMA}}),
    "model with pad token in the map": ("spm", {
        "added_tokens.json": {"[PAD]": "N0"}, "special_tokens_map.json": {"pad_token": "[PAD]"},
        "tokenizer_config.json": {"tokenizer_class": LLAMA}}),
    "model with decoder, not legacy": ("spm", {"tokenizer_config.json": {
        "tokenizer_class": LLAMA, "legacy": False, "added_tokens_decoder": {
            "0": token("<unk>"), "1": token("<s>"), "2": token("</s>"), "N0": token("<|im_start|>"),
            "N1": token("<|im_end|>"), "N2": token("<tool>", special=False)}}}),
    "model without prefix": ("spm", {"tokenizer_config.json": {"tokenizer_class": LLAMA, "add_prefix_space": False}}),
    "model, not legacy, without prefix": ("spm", {"tokenizer_config.json": {
        "tokenizer_class": LLAMA, "add_prefix_space": False, "legacy": False, "add_bos_token": False}}),
    "both files, prefix in the config": ("spm+metaspace", {"tokenizer_config.json": {
        "tokenizer_class": LLAMA, "add_prefix_space": True, "legacy": False}}),
    "both files": ("spm+metaspace", {"tokenizer_config.json": {"tokenizer_class": LLAMA}}),
    "llama 2": ("spm", {"tokenizer_config.json": {
        "tokenizer_class": LLAMA, "add_bos_token": True, "add_eos_token": True, "legacy": False, "pad_token": None,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False,
                      "single_word": False},
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False,
                      "single_word": False}, "unk_token": "<unk>",
                      "model_max_length": 1000000000000000019884624838656}}),
}


def write_case(folder, base, files):
    """Lay out the folder of a case."""
    size = 0
    for part in base.split("+"):
        name = {"spm": "spm.model"}.get(part, part + ".json")
        with open(os.path.join(FOLDER, name), "rb") as file:
            data = file.read()
        target = "tokenizer.model" if part == "spm" else "tokenizer.json"
        with open(os.path.join(folder, target), "wb") as file:
            file.write(data)
        size = size or SIZES[part]
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(resolve(content, size), file, ensure_ascii=False)


def resolve(value, size):
    """Replace the ids that are counted from the vocabulary's end."""
    if isinstance(value, dict):
        return {str(resolve(key, size)): resolve(item, size) for key, item in value.items()}
    if isinstance(value, str) and len(value) == 2 and value[0] == "N" and value[1].isdigit():
        return size + int(value[1])
    return value


#: Here the fast tokenizer loses "<|im_end|>" (it looks for "▁<|im_end|>"), so the slow one has the right ids.
SLOW = {"model with added tokens"}

SIZES = {"bytes": 320, "bytes_bos": 320, "metaspace": 420, "spm": 400}


def make_bases():
    sys.path.insert(0, os.path.join(HERE, "..", "unit"))
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    import tokenizer_kinds as kinds
    for name in ("bytes", "bytes_bos"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(kinds.CORPUS, trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False))
        if name == "bytes_bos":
            backend.post_processor = processors.Sequence([
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 0),
                                                                                                      ("</s>", 1)])])
        backend.save(os.path.join(FOLDER, name + ".json"), pretty=False)
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.train_from_iterator(kinds.CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=[AddedToken(one, special=True) for one in ("<unk>", "<s>", "</s>")]
        + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False, limit_alphabet=60))
    backend.save(os.path.join(FOLDER, "metaspace.json"), pretty=False)
    kinds.sentencepiece_model(os.path.join(FOLDER, "spm.model"))


def main():
    if "--bases" in sys.argv:
        make_bases()
        return
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    found = {}
    for name, (base, files) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_case(folder, base, files)
            known = "config.json" in files or "tokenizer_class" in files.get("tokenizer_config.json", {})
            fast = (AutoTokenizer if known else PreTrainedTokenizerFast).from_pretrained(folder)
            case = {"base": base, "files": files, "class": type(fast).__name__,
                    "ids": [fast(text).input_ids for text in STRINGS],
                    "plain": [fast(text, add_special_tokens=False).input_ids for text in STRINGS],
                    "special": fast.special_tokens_map, "eos": fast.eos_token_id}
            if base == "spm":
                slow = AutoTokenizer.from_pretrained(folder, use_fast=False)
                ids = [slow(text).input_ids for text in STRINGS]
                print(name, "slow and fast differ on", [text for text, one, two in zip(STRINGS, ids, case["ids"])
                                                        if one != two])
                if name in SLOW:
                    case.update(ids=ids, plain=[slow(text, add_special_tokens=False).input_ids for text in STRINGS])
            found[name] = case
    with open(os.path.join(FOLDER, "cases.json"), "w", encoding="utf-8") as file:
        json.dump({"strings": STRINGS, "cases": found}, file, ensure_ascii=False, indent=None, separators=(",", ":"))
        file.write("\n")
    print(len(found), "folders")


if __name__ == "__main__":
    main()
