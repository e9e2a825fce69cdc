"""Adapters trained after ``resize_token_embeddings``: more rows in embedding and head, and a tokenizer that fits
them."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from colora_ms.adapters import LoraConfig, adapters_of, inject, load_adapter, load_adapters
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from colora_ms.errors import AdapterError, AdapterWarning
from test_token_rows import build, run

#: name: (tiny model, whether peft stored the resized base's rows, too)
GOLDENS = {"larger": ("llama", False), "larger_stored": ("llama", True), "larger_tied": ("llama_linear", False),
           "larger_tied_stored": ("llama_linear", True), "larger_untrained": ("llama", False),
           "larger_untrained_tied": ("llama_linear", False)}
TOLERANCE = 2e-4
BASE, LARGER = 96, 101
RANDOM = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


def write_tokenizer(folder, size, more=()):
    """A tokenizer of single letters: <unk>, letters, then the tokens in ``more``, ``size`` ids in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = ["<unk>", *(chr(0x4E00 + i) for i in range(size - 1 - len(more)))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(plain)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(more))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>", "eos_token": plain[1]}))


NEW = ["<new0>", "<new1>", "<new2>", "<new3>", "<new4>"]


@pytest.fixture
def adapter(goldens, tmp_path):
    """A function (golden's name, size of the tokenizer beside it) that makes a copy of the folder."""
    def make(name="larger", size=LARGER):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(goldens / "peft" / name, folder)
        if size:
            write_tokenizer(folder, size, NEW if size > BASE else [])
        return folder
    return make


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_equal_pefts(mindspore, goldens, adapter, name):
    base, stored_base = GOLDENS[name]
    net, folder = build(goldens, base), adapter(name)
    stored = np.load(folder / "logits.npz")
    old_ids = np.random.RandomState(0).randint(0, BASE, (2, 12))
    plain = run(net, [-1, -1], old_ids)
    handle = load_adapter(net, folder)
    assert net.config.vocab_size == LARGER
    ours = run(net, handle.slots(2), stored["ids"])
    assert ours.shape[-1] == LARGER
    assert np.abs(ours[:, stored["positions"]] - stored["logits"]).max() < TOLERANCE
    assert (ours.argmax(-1) == stored["argmax"]).all()
    off = run(net, [-1, -1], old_ids)
    assert np.array_equal(off[..., :BASE], plain), "rows without the adapter keep the base's logits to the last bit"
    assert np.isfinite(off).all() and (off[..., BASE:].max(-1) <= off[..., :BASE].max(-1)).all() or stored_base
    if stored_base:
        base_logits = run(net, [-1, -1], stored["ids"])[:, stored["positions"]]
        assert np.abs(base_logits - stored["base"]).max() < TOLERANCE


@pytest.mark.parametrize("name", ["larger", "larger_tied", "larger_tied_stored", "larger_untrained_tied"])
def test_saved_again_merged_and_taken_out(mindspore, goldens, adapter, tmp_path, name):
    net, folder = build(goldens, GOLDENS[name][0]), adapter(name)
    stored = np.load(folder / "logits.npz")
    handle = load_adapter(net, folder)
    handle.save(tmp_path / "again")
    ours, theirs = load_file(tmp_path / "again" / WEIGHTS_FILE), load_file(folder / WEIGHTS_FILE)
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours) and {EMBED, HEAD} <= ours.keys()
    write_tokenizer(tmp_path / "again", LARGER, NEW)
    again = load_adapter(build(goldens, GOLDENS[name][0]), tmp_path / "again")
    for one in (handle, again):
        one.merge()
        merged = run(one.net, one.slots(2), stored["ids"])
        assert np.abs(merged[:, stored["positions"]] - stored["logits"]).max() < TOLERANCE
    handle.unload()
    assert np.array_equal(run(net, [-1, -1], stored["ids"]), merged) or \
        np.abs(run(net, [-1, -1], stored["ids"]) - merged).max() < 1e-4


def test_adapters_of_both_vocabularies_in_one_batch(mindspore, goldens, adapter):
    folders = {"larger": adapter("larger"), "qv_r8": goldens / "peft" / "qv_r8",
               "save_lm_head": goldens / "peft" / "save_lm_head", "tokens": goldens / "peft" / "tokens"}
    handle = load_adapters(build(goldens, "llama"), folders)
    stored = {name: np.load(folder / "logits.npz") for name, folder in folders.items()}
    ids = np.concatenate([one["ids"][:1] for one in stored.values()])
    ours = run(handle.net, handle.slots(4, list(folders)), ids)
    for row, (name, one) in zip(ours, stored.items()):
        width = one["logits"].shape[-1]
        assert np.abs(row[one["positions"]][:, :width] - one["logits"][0]).max() < TOLERANCE, name
    alone = run(handle.net, handle.slots(4, "larger"), ids)
    assert np.array_equal(ours[0], alone[0])


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["larger", "larger_tied"])
def test_on_other_weight_formats(mindspore, goldens, adapter, name, weight_format):
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(goldens / "tiny" / GOLDENS[name][0])
    net = Decoder(checkpoint.config, checkpoint.tensors, weight_format=weight_format)
    ids = np.random.RandomState(0).randint(0, BASE, (2, 12))
    plain = run(net, [-1, -1], ids)
    handle = load_adapter(net, adapter(name))
    assert np.array_equal(run(net, [-1, -1], ids)[..., :BASE], plain)
    assert np.isfinite(run(net, handle.slots(2), ids + LARGER - BASE)).all()


def test_new_rows_are_the_mean_of_the_base(mindspore, goldens, adapter):
    net = build(goldens, "llama")
    before = net.model.embed_tokens.weight.asnumpy()
    load_adapter(net, adapter("larger")).unload()
    after = net.model.embed_tokens.weight.asnumpy()
    assert np.array_equal(after[:BASE], before) and np.abs(after[BASE:] - before.mean(0)).max() < 1e-6


# -- tokenizers, generators, training, servers ------------------------------------------------------------------------

@pytest.fixture
def model_folder(goldens, tmp_path):
    """A tiny model with a tokenizer."""
    shutil.copytree(goldens / "tiny" / "llama", tmp_path / "model")
    write_tokenizer(tmp_path / "model", BASE)
    return tmp_path / "model"


def test_a_generator_takes_the_adapters_tokenizer(mindspore, adapter, model_folder, goldens):
    from colora_ms.decoding import Contrast, Generator

    made = Generator.from_pretrained(str(model_folder),
                                     adapters={"a": str(adapter()), "b": str(goldens / "peft" / "qv_r8")})
    prompt = "<new1> " + chr(0x4E00 + 3)
    assert made.encode(prompt) == [97, 4]
    answers = made.generate([prompt, prompt, prompt, prompt], adapter=["a", None, "b", "a"], max_new_tokens=4,
                            ignore_eos=True,
                            contrast=[None, None, None, Contrast(0.1, 0.5)])
    ids = [97, 4]
    for token in answers[0].tokens:
        assert run(made.decoder, made.adapters.slots(1, "a"), [ids])[0, -1].argmax() == token
        ids.append(token)
    plain = Generator.from_pretrained(str(model_folder), adapters={"b": str(goldens / "peft" / "qv_r8")})
    assert plain.tokenizer.vocab_size == BASE and plain.decoder.config.vocab_size == BASE
    words = " ".join(chr(0x4E00 + i) for i in (3, 14, 15))
    one, other = (g.generate([words], adapter="b", max_new_tokens=5, ignore_eos=True)[0].tokens for g in (made, plain))
    assert one == other, "an adapter of the base's vocabulary answers as before"


def test_the_command_line_generates_with_new_tokens(mindspore, adapter, model_folder, capsys):
    from colora_ms.cli import main

    assert main(["generate", "--model", str(model_folder), "--adapter", str(adapter()), "--max-new-tokens", "3",
                 "<new1> <new2>"]) == 0
    assert capsys.readouterr().out.strip() != ""


def test_training_goes_on_with_new_tokens(mindspore, adapter, model_folder, tmp_path):
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.run import train

    rows = [{"prompt": f"<new{i % 5}>", "completion": f" {chr(0x4E00 + i)} <new{(i + 1) % 5}>"} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TrainingConfig.from_dict({
        "model": str(model_folder), "output": str(tmp_path / "run"), "adapter": {"start_from": str(adapter())},
        "data": {"train": str(tmp_path / "train.jsonl"), "template": "{prompt}{completion}", "batch_size": 8},
        "optimizer": {"learning_rate": 0.02}, "loop": {"steps": 6, "progress": False}})
    result = train(config)
    assert result.losses[-1] < result.losses[0]
    before, after = (load_file(folder / WEIGHTS_FILE) for folder in (adapter(), result.adapter))
    assert before.keys() == after.keys() and not np.array_equal(before[EMBED], after[EMBED])
    from colora_ms.decoding import Generator

    made = Generator.from_pretrained(str(model_folder), adapters={"a": str(result.adapter)})
    assert made.encode("<new3>") == [99], "the run's adapter has the tokenizer beside it"


def test_a_servers_bank_refuses_by_name(mindspore, goldens, adapter, tmp_path):
    from colora_ms.serving.bank import AdapterBank

    folder = adapter()
    (tmp_path / "bank").mkdir()
    shutil.copytree(folder, tmp_path / "bank" / "a")
    bank = AdapterBank(build(goldens, "llama"), tmp_path / "bank", max_loaded=1)
    with pytest.raises(AdapterError, match="it has 101 rows for tokens, this model has 96.*merge"):
        bank.load("a")
    handle = load_adapter(build(goldens, "llama"), goldens / "peft" / "qv_r8", slots=2)
    with pytest.raises(AdapterError, match="its adapter Cells already"):
        handle.load(folder, "late")


# -- refusals and warnings --------------------------------------------------------------------------------------------

def spoil(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("name, size, change, words", [
    ("larger", 99, None, "embedding 101 rows, head 101 rows, tokenizer 99 tokens; the base model has 96 rows"),
    ("larger", 102, None, "tokenizer 102 tokens; the base model has 96"),
    ("larger", BASE, None, "tokenizer 96 tokens; the base model has 96"),
    ("larger", LARGER, lambda t: t.update({HEAD: t[HEAD][:99].copy()}),
     "embedding 101 rows, head 99 rows, tokenizer 101"),
    ("larger", LARGER, lambda t: t.pop(HEAD), "embedding 101 rows, head 96 rows, tokenizer 101 tokens"),
    ("larger", LARGER, lambda t: t.update({EMBED: t[EMBED][:96].copy()}), "embedding 96 rows, head 101 rows"),
    ("larger", 0, lambda t: t.update({HEAD: t[HEAD][:99].copy()}), "embedding 101 rows, head 99 rows, no tokenizer in "
                                                                   "the f"),
    ("larger_tied", LARGER, lambda t: t.update({HEAD: t[HEAD][:99].copy()}), "embedding 101 rows, head 99 rows"),
    ("larger_tied", LARGER, lambda t: t.update({HEAD: t[HEAD] + 1}), "differ by up to 1"),
    ("larger_stored", LARGER, lambda t: t.update({HEAD.replace("weight", "original_module.weight"): t[HEAD] + 1}),
     "is a copy of the base's lm_head but differs"),
    ("larger_stored", LARGER, lambda t: t.update({HEAD.replace("weight", "modules_to_save.weight"): t[HEAD] + 1}),
     "modules_to_save.weight' .* is not part of the adapter"),
    ("larger", LARGER, lambda t: t.update({EMBED: t[EMBED] * np.nan}), "not finite"),
])
def test_tables_that_do_not_agree_are_refused_with_all_numbers(mindspore, goldens, adapter, name, size, change, words):
    net, folder = build(goldens, GOLDENS[name][0]), adapter(name, size)
    if change:
        spoil(folder, change)
    with pytest.raises(AdapterError, match=words):
        load_adapter(net, folder)
    assert adapters_of(net) is None and net.config.vocab_size == BASE and net.model.embed_tokens.weight.shape[0] == BASE


def test_a_table_padded_to_a_multiple_is_taken(mindspore, goldens, adapter):
    folder = adapter("larger", LARGER)
    spoil(folder, lambda t: t.update({key: np.concatenate([t[key], t[key][:3]]) for key in (EMBED, HEAD)}))
    net = build(goldens, "llama")
    load_adapter(net, folder)
    assert net.config.vocab_size == 104
    spoil(folder, lambda t: t.update({key: np.concatenate([t[key], t[key][:24]]) for key in (EMBED, HEAD)}))
    write_tokenizer(folder, BASE)  # 128 rows: padded, without a new token
    load_adapter(build(goldens, "llama"), folder)


def test_an_equal_table_beside_a_smaller_tokenizer_is_the_plain_case(mindspore, goldens, tmp_path):
    """As Qwen pads its embedding: tokens were added inside the rows that the base has."""
    from colora_ms.adapters.vocabulary import tokenizer_for

    inject(build(goldens, "llama"),
           LoraConfig(**RANDOM, modules_to_save=["embed_tokens", "lm_head"])).save(tmp_path / "a")
    write_tokenizer(tmp_path / "a", 94, NEW)
    write_tokenizer(tmp_path / "base", 89)
    from colora_ms.models.tokenizer import load_tokenizer

    net = build(goldens, "llama")
    handle = load_adapter(net, tmp_path / "a")
    assert net.config.vocab_size == BASE
    base = load_tokenizer(tmp_path / "base")
    assert tokenizer_for(base, {"a": tmp_path / "a"}, handle).encode("<new0>") == [89]
    inject(build(goldens, "llama"), LoraConfig(**RANDOM)).save(tmp_path / "b")
    write_tokenizer(tmp_path / "b", 94, NEW)
    handle = load_adapter(build(goldens, "llama"), tmp_path / "b")
    assert tokenizer_for(base, {"b": tmp_path / "b"}, handle) is base, "an adapter that knows no new tokens brings none"


def test_a_missing_tokenizer_is_said(mindspore, goldens, adapter):
    with pytest.warns(AdapterWarning, match="5 tokens more than the model, but no tokenizer"):
        load_adapter(build(goldens, "llama"), adapter("larger", 0))


def test_a_tied_head_that_the_adapter_lacks_is_said(mindspore, goldens, adapter):
    """modules_to_save with the embedding alone, without ensure_weight_tying: the head stays the base's, as in PEFT."""
    folder = adapter("larger_tied")
    spoil(folder, lambda t: t.pop(HEAD))
    values = json.loads((folder / CONFIG_FILE).read_text())
    values["ensure_weight_tying"] = False
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    net = build(goldens, "llama_linear")
    with pytest.warns(AdapterWarning, match="not the head"):
        handle = load_adapter(net, folder)
    assert handle.matched().saved == ("model.embed_tokens",) and handle.matched().ties == {}


def test_two_larger_vocabularies_are_refused(mindspore, goldens, adapter, tmp_path):
    folder = adapter("larger")
    shutil.copytree(folder, tmp_path / "other")
    spoil(tmp_path / "other", lambda t: t.update({key: t[key][:99].copy() for key in (EMBED, HEAD)}))
    write_tokenizer(tmp_path / "other", 99, NEW[:3])
    with pytest.raises(AdapterError, match="different vocabularies .a: 101 rows, b: 99 rows."):
        load_adapters(build(goldens, "llama"), {"a": folder, "b": tmp_path / "other"})


def test_a_smaller_table_names_both_shapes(mindspore, goldens, adapter):
    folder = adapter("larger", 0)
    spoil(folder, lambda t: t.update({key: t[key][:90].copy() for key in (EMBED, HEAD)}))
    with pytest.raises(AdapterError, match=r"has shape \(90, 32\), the config and the model ask for \(96, 32\)"):
        load_adapter(build(goldens, "llama"), folder)
