"""GGUF files written here: read back bit for bit, laid out as llama.cpp wants them, with the same tokenizer."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.errors import CheckpointError, ConfigError, TokenizerError
from colora_ms.models.checkpoint import open_checkpoint
from colora_ms.models.config import DecoderConfig
from colora_ms.models.tokenizer import Tokenizer, load_tokenizer

gguf = pytest.importorskip("gguf")

from colora_ms.models.gguf_writer import GGUF_TYPES, write_gguf  # noqa: E402
from gguf_files import interleave, tiny  # noqa: E402

MODELS = ["llama", "llama_bias", "llama_linear", "llama_yarn", "qwen2", "qwen3"]


def neutral(config):
    """The config without what a GGUF does not store."""
    return dict(config.to_hf(), torch_dtype="float32", pad_token_id=None)


@pytest.mark.parametrize("name", MODELS)
def test_float32_comes_back_bit_for_bit(name, tmp_path):
    source = open_checkpoint(tiny(name))
    path = tmp_path / "sub" / "m.gguf"
    assert write_gguf(path, source.config, source.tensors) == []
    opened = open_checkpoint(str(path))
    want = neutral(source.config)
    if name == "llama_yarn":
        want["rope_scaling"].setdefault("original_max_position_embeddings", source.config.max_position_embeddings)
    assert neutral(opened.config) == want
    assert list(opened.tensors) == list(source.tensors) and opened.tokenizer_source is None
    for key, value in source.tensors.items():
        np.testing.assert_array_equal(opened.tensors[key], value, err_msg=key)
    assert [one.name for one in tmp_path.joinpath("sub").iterdir()] == ["m.gguf"]


def fields(path):
    found = gguf.GGUFReader(str(path)).fields
    return {key: field.contents() for key, field in found.items() if not key.startswith("GGUF.")}


def test_layout_as_the_gguf_package_sees_it(tmp_path):
    """Names, shapes, types, row order and keys, by the gguf package's own reader."""
    source = open_checkpoint(tiny("llama"))
    write_gguf(tmp_path / "m.gguf", source.config, source.tensors, kind="F16", name="tiny")
    reader = gguf.GGUFReader(str(tmp_path / "m.gguf"))
    tensors = {one.name: one for one in reader.tensors}
    config = source.config
    q = np.array(tensors["blk.1.attn_q.weight"].data)
    want = interleave(source.tensors["model.layers.1.self_attn.q_proj.weight"], config.num_attention_heads)
    np.testing.assert_array_equal(q, want.astype(np.float16))
    k = np.array(tensors["blk.0.attn_k.weight"].data)
    want = interleave(source.tensors["model.layers.0.self_attn.k_proj.weight"], config.num_key_value_heads)
    np.testing.assert_array_equal(k, want.astype(np.float16))
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["output.weight"].tensor_type.name == tensors["token_embd.weight"].tensor_type.name == "F16"
    assert tensors["rope_freqs.weight"].data.shape == (config.head_dim // 2,)
    assert float(tensors["rope_freqs.weight"].data.max()) == config.rope_scaling["factor"]
    values = fields(tmp_path / "m.gguf")
    assert values["general.architecture"] == "llama" and values["general.name"] == "tiny"
    assert values["general.type"] == "model" and values["general.file_type"] == 1
    assert values["llama.attention.key_length"] == values["llama.rope.dimension_count"] == 8
    assert values["llama.attention.head_count_kv"] == 2 and values["llama.vocab_size"] == 96
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize("kind", [kind for kind in GGUF_TYPES if kind != "F32"])
def test_other_types_hold_what_the_package_rounds(kind, tmp_path):
    source = open_checkpoint(tiny("qwen2"))
    notes = write_gguf(tmp_path / "m.gguf", source.config, source.tensors, kind=kind)
    opened = open_checkpoint(str(tmp_path / "m.gguf"))
    number, odd = gguf.GGMLQuantizationType[kind], 0
    for key, value in source.tensors.items():
        want = value
        if value.ndim == 2:
            whole = value.shape[1] % gguf.GGML_QUANT_SIZES[number][0] == 0
            odd += not whole
            own = number if whole else gguf.GGMLQuantizationType.F16
            want = gguf.quants.dequantize(gguf.quants.quantize(value, own), own)
        np.testing.assert_array_equal(opened.tensors[key], want, err_msg=key)
    assert (odd > 0) == kind.startswith("Q") == any("are stored in F16" in note for note in notes)


def test_a_tied_model_has_no_head_in_the_file(tmp_path):
    source = open_checkpoint(tiny("qwen3"))
    config = DecoderConfig.from_hf(dict(source.config.to_hf(), tie_word_embeddings=True))
    tensors = {key: value for key, value in source.tensors.items() if key != "lm_head.weight"}
    write_gguf(tmp_path / "m.gguf", config, tensors)
    assert "output.weight" not in [one.name for one in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors]
    assert open_checkpoint(str(tmp_path / "m.gguf")).config.tie_word_embeddings


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    source = open_checkpoint(tiny("qwen3"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write_gguf(path, source.config, source.tensors)
    assert path.read_bytes() == b"mine"
    path.unlink()
    broken = dict(source.tensors.items())
    broken["model.layers.1.mlp.up_proj.weight"] = np.full_like(broken["model.layers.1.mlp.up_proj.weight"], 1e9)
    for kind in ("F16", "Q8_0", "Q4_0"):
        with pytest.raises(CheckpointError, match="up_proj.*cannot hold"):
            write_gguf(path, source.config, broken, kind=kind)
        assert list(tmp_path.iterdir()) == []
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    with pytest.raises(CheckpointError, match="up_proj"):
        write_gguf(path, source.config, broken, kind="BF16")
    with pytest.raises(CheckpointError, match="Did you mean 'Q8_0'"):
        write_gguf(path, source.config, source.tensors, kind="q8_0")
    with pytest.raises(CheckpointError, match="missing"):
        write_gguf(path, source.config, {"model.norm.weight": np.ones(32, np.float32)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, scaling, words", [
    ("qwen3", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}, "for llama only"),
    ("llama", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7}, "attention_factor"),
    ("llama", {"rope_type": "yarn", "factor": 4.0, "truncate": False}, "truncate"),
])
def test_settings_without_a_word_in_llama_cpp_are_refused(name, scaling, words, tmp_path):
    source = open_checkpoint(tiny(name))
    config = DecoderConfig.from_hf(dict(source.config.to_hf(), rope_scaling=scaling))
    with pytest.raises(ConfigError, match=words):
        write_gguf(tmp_path / "m.gguf", config, source.tensors)
    assert list(tmp_path.iterdir()) == []


def test_dynamic_scaling_is_said(tmp_path):
    source = open_checkpoint(tiny("llama_linear"))
    config = DecoderConfig.from_hf(dict(source.config.to_hf(), rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    assert "no dynamic" in write_gguf(tmp_path / "m.gguf", config, source.tensors)[0]


# ---------------------------------------------------------------- tokenizers

def sentencepiece_tokenizer():
    """A small SentencePiece-like tokenizer with byte fallback, as a tokenizer.json has it."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    from colora_ms.models.tokenizer_build import add_template

    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "a", "b", "c", "d", "e", "n", "t", "h", "é", "▁t", "he", "the", "▁the", "an", "and", "▁and", "▁a",
               "th", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    order = [("▁", "t"), ("h", "e"), ("t", "h"), ("t", "he"), ("th", "e"), ("▁", "the"), ("▁t", "he"), ("a", "n"),
             ("an", "d"), ("▁", "and"), ("▁", "a"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab, order, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False)
                                for one in ("<unk>", "<s>", "</s>", "<|end|>")])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    add_template(backend, "<s>", None)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                               "chat_template": "{{ messages[0].content }}"})


def byte_level_tokenizer(rule):
    """A byte-level tokenizer with a few merges, cutting words by one of the known rules."""
    from tokenizers import AddedToken

    from colora_ms.models.detokenizer_steps import byte_alphabet
    from colora_ms.models.tokenizer_build import from_gguf

    pieces = sorted(byte_alphabet(), key=byte_alphabet().get)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "Ġ"), ("'", "s"), ("Ċ", "Ċ")]
    pieces += ["".join(pair) for pair in merges]
    backend, _ = from_gguf({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule,
                            "tokenizer.ggml.tokens": [piece.encode() for piece in pieces],
                            "tokenizer.ggml.merges": [" ".join(pair).encode() for pair in merges]}, rule)
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False)
                                for one in ("<|endoftext|>", "<|im_end|>")])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return Tokenizer(backend, {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"})


def model_for(tokenizer, **more):
    """(config, tensors) of the tiny Llama with as many rows as a tokenizer needs, and some more."""
    source = open_checkpoint(tiny("llama_linear"))
    rows = tokenizer.vocab_size + 5
    config = DecoderConfig.from_hf(dict(source.config.to_hf(), vocab_size=rows, **more))
    tensors = {name: np.resize(np.asarray(source.tensors[name]), shape)
               for name, shape in config.parameter_shapes().items()}
    return config, tensors


TOKENIZERS = {"sentencepiece": sentencepiece_tokenizer, **{
    rule: lambda rule=rule: byte_level_tokenizer(rule) for rule in ("smollm", "gpt-2", "qwen2", "llama-bpe")}}


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def written(request, tmp_path_factory):
    """(the tokenizer's kind, the tokenizer, the one that is read back, the file's path)."""
    tokenizer = TOKENIZERS[request.param]()
    path = tmp_path_factory.mktemp("written") / "m.gguf"
    config, tensors = model_for(tokenizer, eos_token_id=[tokenizer.eos_token_id, tokenizer.vocab_size - 3])
    assert write_gguf(path, config, tensors, tokenizer) == []
    return request.param, tokenizer, load_tokenizer(str(path)), path


def test_tokenizer_metadata(written):
    kind, tokenizer, again, path = written
    values = fields(path)
    assert values["tokenizer.ggml.model"] == ("llama" if kind == "sentencepiece" else "gpt2")
    assert values["tokenizer.ggml.pre"] == ("default" if kind == "sentencepiece" else kind)
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert values["tokenizer.ggml.eot_token_id"] == tokenizer.vocab_size - 3
    assert values["tokenizer.ggml.add_bos_token"] == (kind == "sentencepiece")
    assert values["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 4}]"
    assert set(values["tokenizer.ggml.token_type"][-5:]) == {5}
    assert again.chat_template == tokenizer.chat_template
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert open_checkpoint(str(path)).config.eos_token_ids[:2] == (tokenizer.eos_token_id, tokenizer.vocab_size - 3)


PARTS = st.sampled_from(["the", " the", "and", " and", "12", "1", "  ", "\n", "\n\n", "'s", "é", "\t", "<s>", "</s>",
                         "<|im_end|>",
                         "<think>", "<tool>", "<|end|>", "<|endoftext|>", "北京", "😀", ".", "A"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.one_of(PARTS, st.text(max_size=4)), max_size=8).map("".join))
def test_texts_are_cut_as_before(written, text):
    kind, tokenizer, again, _ = written
    ids = tokenizer.encode(text)
    assert again.encode(text) == ids
    assert again.decode(ids) == tokenizer.decode(ids)
    assert again.decode(ids, False) == tokenizer.decode(ids, False)


def test_a_gguf_keeps_its_own_tables(written, tmp_path):
    _, tokenizer, _, path = written
    source = open_checkpoint(str(path))
    write_gguf(tmp_path / "again.gguf", source.config, source.tensors, source.tokenizer_source)
    one, two = fields(path), fields(tmp_path / "again.gguf")
    assert {key: value for key, value in one.items() if key.startswith("tokenizer.")} == \
        {key: value for key, value in two.items() if key.startswith("tokenizer.")}


def test_merges_that_no_scores_can_order_are_said(tmp_path):
    import json

    from tokenizers import Tokenizer as Backend

    tokenizer = sentencepiece_tokenizer()
    state = json.loads(tokenizer.backend.to_str())
    merges = [list(pair) for pair in state["model"]["merges"]]
    merges.remove(["▁", "the"])  # away from the other merge that makes "▁the"
    state["model"]["merges"] = merges + [["▁", "the"]]
    changed = Tokenizer(Backend.from_str(json.dumps(state)), tokenizer.special_tokens)
    config, tensors = model_for(changed)
    assert "do not follow one score" in write_gguf(tmp_path / "m.gguf", config, tensors, changed)[0]


def test_what_only_transformers_adds_is_said(tmp_path):
    from tokenizers import AddedToken, processors

    tokenizer = byte_level_tokenizer("smollm")
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=["<|im_end|>", "<|endoftext|>", "$A"], special_tokens=[
            (name, tokenizer.backend.token_to_id(name)) for name in ("<|im_end|>", "<|endoftext|>")])
    tokenizer.backend.add_special_tokens([AddedToken("<mask>", special=True, lstrip=True)])
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.special_tokens)
    config, tensors = model_for(tokenizer)
    notes = " ".join(write_gguf(tmp_path / "m.gguf", config, tensors, tokenizer))
    assert "can only put a begin token" in notes and "'<mask>' takes blanks" in notes


def test_tokenizers_that_do_not_fit(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    tokenizer = byte_level_tokenizer("smollm")
    config, tensors = model_for(tokenizer)
    small = DecoderConfig.from_hf(dict(config.to_hf(), vocab_size=40))
    few = {name: value[:40] if value.shape[0] == config.vocab_size else value for name, value in tensors.items()}
    with pytest.raises(TokenizerError, match="only 40 rows"):
        write_gguf(tmp_path / "m.gguf", small, few, tokenizer)
    unigram = Backend(models.Unigram([("a", -1.0), ("b", -2.0)], 0))
    with pytest.raises(TokenizerError, match="Unigram"):
        write_gguf(tmp_path / "m.gguf", config, tensors, Tokenizer(unigram, {}))
    odd = Backend(models.BPE({"a": 0}, []))
    odd.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    odd.decoder = decoders.ByteLevel()
    with pytest.raises(TokenizerError, match="cuts words by a rule"):
        write_gguf(tmp_path / "m.gguf", config, tensors, Tokenizer(odd, {}))
    assert list(tmp_path.iterdir()) == []


def test_a_real_model(shared, tmp_path):
    """stories260k: the tokenizer that is read back cuts texts the same way."""
    folder = str(shared / "data" / "stories260k")
    source = open_checkpoint(folder)
    notes = write_gguf(tmp_path / "m.gguf", source.config, source.tensors, source.tokenizer_source, kind="Q8_0")
    assert [note for note in notes if "F16" not in note] == []
    one, two = load_tokenizer(folder), load_tokenizer(str(tmp_path / "m.gguf"))
    for text in ("Once upon a time, there was a little girl named Lily.", "  two  blanks", "Ünï 😀\n\n", "<s>x</s> y"):
        assert one.encode(text) == two.encode(text)
