"""Tokenizers: vectors made by other programs, streaming, templates, damaged files."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.errors import CheckpointError, TokenizerError
from colora_ms.models.checkpoint import default_model_path
from colora_ms.models.detokenizer import StreamDecoder
from colora_ms.models.tokenizer import Tokenizer, load_tokenizer

HERE = os.path.dirname(__file__)
STORIES = os.path.join(HERE, "..", "..", "..", "shared", "data", "stories260k")
with open(os.path.join(HERE, "..", "goldens", "tokenizers.json"), encoding="utf-8") as _file:
    VECTORS = json.load(_file)


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_tokenizer(default_model_path("smollm2-135m"))
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def stories(request):
    path = os.path.join(STORIES, request.param)
    if not os.path.isfile(path):
        pytest.skip(f"the stories260k model is not at {STORIES}")
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A small byte-level tokenizer that needs no model: 256 bytes and a few merges."""
    return load_tokenizer(small_byte_level(tmp_path_factory.mktemp("bytes")))


def small_byte_level(folder):
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "¤")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>",
                        "chat_template": "{{ bos_token }}{% for m in messages %}"
                                         "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
                                         "{% if add_generation_prompt %}[assistant] {% endif %}"
                        }).save(str(folder))
    return str(folder)


def streamed(tokenizer, ids, skip=True):
    """The text of a stream, with every piece checked for whole characters."""
    stream, pieces = StreamDecoder(tokenizer, skip), []
    for index in ids:
        pieces.append(stream.push(index))
        pieces[-1].encode("utf-8")
    return "".join(pieces) + stream.flush()


# ---------------------------------------------------------------- vectors

def test_smollm2_equals_the_pure_python_tokenizer_of_transformers(smollm2):
    for text, ids in zip(VECTORS["strings"], VECTORS["smollm2"]):
        assert smollm2.encode(text) == ids, repr(text)
        assert smollm2.decode(ids, skip_special_tokens=False) == text
        assert streamed(smollm2, ids, skip=False) == text


def test_stories260k_equals_the_sentencepiece_library(stories):
    compared = 0
    for text, ids in zip(VECTORS["strings"], VECTORS["stories260k"]):
        if ids is not None:
            assert stories.encode(text) == ids, repr(text)
            assert stories.decode(ids) == text
            assert streamed(stories, ids) == text
            compared += 1
    assert compared > 30
    # the begin token spelled out is the token itself
    assert stories.encode("<s>", add_special_tokens=False) == [stories.bos_token_id]


def test_sentencepiece_model_against_its_own_library():
    """Mistral's and the tests' own models may not be there; the stories260k one is enough."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = os.path.join(STORIES, "tokenizer.model")
    if not os.path.isfile(path):
        pytest.skip(f"the stories260k model is not at {STORIES}")
    library, ours = sentencepiece.SentencePieceProcessor(model_file=path), load_tokenizer(path)
    assert ours.vocab_size == library.vocab_size()
    assert (ours.bos_token_id, ours.eos_token_id) == (library.bos_id(), library.eos_id())

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=40).filter(lambda text: "<" not in text))
    def same(text):
        assert ours.encode(text, add_special_tokens=False) == library.encode(text)
    same()


def test_special_tokens(smollm2):
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert smollm2.vocab_size == 49152
    assert smollm2.encode("<|im_end|>") == [2]
    assert smollm2.decode([1, 19556, 2]) == "Hello"
    assert smollm2.decode([1, 19556, 2], skip_special_tokens=False) == \
        "<|im_start|>Hello<|im_end|>"


# ---------------------------------------------------------------- text in, text out

@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_survives(byte_level, text):
    ids = byte_level.encode(text, add_special_tokens=False)
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert streamed(byte_level, ids, skip=False) == text


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 270), max_size=24), skip=st.booleans())
def test_streaming_any_ids_equals_decoding_them(byte_level, ids, skip):
    """Random bytes are mostly no UTF-8: the replacement characters must fall in the same places."""
    assert streamed(byte_level, ids, skip) == byte_level.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 511), max_size=24))
def test_streaming_sentencepiece_ids(stories, ids):
    assert streamed(stories, ids) == stories.decode(ids)


def test_a_character_is_held_back_until_it_is_whole(byte_level, stories):
    for tokenizer in (byte_level, stories):
        ids = tokenizer.encode("a🤗b", add_special_tokens=False)
        stream = tokenizer.stream()
        pieces = [stream.push(index) for index in ids]
        assert "".join(pieces) == "a🤗b" and pieces.count("") >= 3
        assert all("\ufffd" not in piece for piece in pieces)
        # the end of the text in the middle of a character
        stream = tokenizer.stream()
        assert "".join(stream.push(index) for index in ids[:-2]) == "a"
        # a U+FFFD a byte token, as the SentencePiece library; of a byte-level token one for the beginning of a
        # character
        assert stream.flush() == "\ufffd" * (1 if tokenizer is byte_level else 3)
        assert stream.flush() == ""


def test_a_stream_can_be_used_again_after_flush(stories):
    ids = stories.encode("Once upon", add_special_tokens=False)
    stream = stories.stream()
    for _ in range(2):
        assert "".join(map(stream.push, ids)) + stream.flush() == "Once upon"


def test_ids_of_numpy_and_ids_beyond_the_vocabulary(byte_level):
    ids = byte_level.encode("hello")
    assert byte_level.decode(np.array(ids, np.int32)) == "hello"
    assert byte_level.decode(ids + [99999]) == "hello"
    assert streamed(byte_level, ids + [99999]) == "hello"


@pytest.mark.parametrize("ids", [[-1], [1.5], ["1"], [True], [1 << 40], [None]])
def test_things_that_are_no_ids(byte_level, ids):
    with pytest.raises(TokenizerError, match="not a token id"):
        byte_level.decode(ids)
    with pytest.raises(TokenizerError, match="not a token id"):
        byte_level.stream().push(ids[0])


@pytest.mark.parametrize("text, part", [(None, "NoneType"), (b"x", "bytes"),
                                        ("a\ud800b", "position 1"), (["a"], "list")])
def test_things_that_are_no_text(byte_level, text, part):
    with pytest.raises(TokenizerError, match=part):
        byte_level.encode(text)


# ---------------------------------------------------------------- chat templates

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "2+2?"}]


def test_smollm2_chat_template(smollm2):
    system = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
              "Face<|im_end|>\n")
    turns = ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
             "<|im_start|>user\n2+2?<|im_end|>\n")
    assert smollm2.apply_chat_template(CHAT) == system + turns + "<|im_start|>assistant\n"
    assert smollm2.apply_chat_template(CHAT, add_generation_prompt=False) == system + turns
    own = [{"role": "system", "content": "Be brief."}] + CHAT[:1]
    assert smollm2.apply_chat_template(own, add_generation_prompt=False) == \
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_chat_template_of_a_folder(byte_level):
    assert byte_level.apply_chat_template(CHAT[:1]) == "<s>[user] Hi\n[assistant] "


@pytest.mark.parametrize("messages, part", [
    ([], "at least one"), (None, "list"), ("hi", "list"), ([3], r"messages\[0\]"),
    ([{"role": "user"}], r"messages\[0\]"), ([{"role": 1, "content": ""}], r"messages\[0\]")])
def test_messages_of_a_wrong_form(byte_level, messages, part):
    with pytest.raises(TokenizerError, match=part):
        byte_level.apply_chat_template(messages)


@pytest.mark.parametrize("template, part", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "template"), ("{% for %}", "template"),
    ("{{ messages.append(1) }}", "template"), ("{{ range(10**9) | list }}", "template"),
    ("{{ 1 // 0 }}", "template"), ("{{ undefined_name.x }}", "undefined")])
def test_templates_that_fail_or_misbehave(byte_level, template, part):
    tokenizer = Tokenizer(byte_level.backend, {"chat_template": template})
    with pytest.raises(TokenizerError, match=part):
        tokenizer.apply_chat_template(CHAT)


def test_model_without_template(byte_level):
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer(byte_level.backend, {}).apply_chat_template(CHAT)


def test_template_file_wins_and_lists_name_a_default(tmp_path):
    folder = small_byte_level(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["chat_template"] = [{"name": "tool_use", "template": "no"},
                               {"name": "default", "template": "yes"}]
    path.write_text(json.dumps(values), encoding="utf-8")
    assert load_tokenizer(folder).apply_chat_template(CHAT) == "yes"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content | tojson }}")
    assert load_tokenizer(folder).apply_chat_template(CHAT) == '"Hi"'


# ---------------------------------------------------------------- saving and loading

def test_saved_tokenizer_reads_back(smollm2, tmp_path):
    smollm2.save(str(tmp_path / "out"))
    again = load_tokenizer(str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == ["tokenizer.json", "tokenizer_config.json"]
    for text, ids in zip(VECTORS["strings"], VECTORS["smollm2"]):
        assert again.encode(text) == ids
    assert again.special_tokens == smollm2.special_tokens
    assert again.chat_template == smollm2.chat_template


def test_saved_sentencepiece_reads_back_in_transformers(stories, tmp_path):
    transformers = pytest.importorskip("transformers")
    stories.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text, ids in zip(VECTORS["strings"], VECTORS["stories260k"]):
        if ids is not None:
            assert theirs(text).input_ids == ids
            assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_a_stored_truncation_does_not_cut_prompts(tmp_path):
    folder = small_byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst",
                            "stride": 0}
    values["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right",
                         "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                         "pad_token": "!"}
    path.write_text(json.dumps(values), encoding="utf-8")
    text = "hello wonderful world"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama_class_sets_the_begin_token(tmp_path):
    """transformers' Llama classes add <s> by flag, whatever tokenizer.json says."""
    folder = small_byte_level(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    plain = load_tokenizer(folder).encode("he")
    for change, expected in (({}, [261]), ({"add_bos_token": False}, []),
                             ({"add_eos_token": True}, [261])):
        path.write_text(json.dumps(dict(values, tokenizer_class="LlamaTokenizerFast", **change)),
                        encoding="utf-8")
        got = load_tokenizer(folder).encode("he")
        assert got == expected + plain  # never an end token behind a prompt
    assert load_tokenizer(folder).encode("he", add_special_tokens=False) == plain


def test_missing_and_damaged_sources(tmp_path):
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="no file or folder"):
        load_tokenizer(str(tmp_path / "x"))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load_tokenizer(None)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(TokenizerError, match="vocab.txt"):
        load_tokenizer(str(tmp_path / "vocab.txt"))
    for text in ("", "{}", "[1]", '{"version": "1.0"}', "\udcff"):
        (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(TokenizerError, match="tokenizer.json"):
            load_tokenizer(str(tmp_path))
    folder = small_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<nope>"}')
    with pytest.raises(TokenizerError, match="bos_token is '<nope>'"):
        load_tokenizer(folder)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 3}')
    with pytest.raises(TokenizerError, match="bos_token is 3"):
        load_tokenizer(folder)
    (tmp_path / "tokenizer_config.json").write_text('{')
    with pytest.raises(TokenizerError, match="not valid JSON"):
        load_tokenizer(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="cannot be written"):
        load_tokenizer(small_byte_level(tmp_path / "other")).save(str(tmp_path / "file" / "x"))


def proto(field, value):
    """One length-delimited or varint field of a protobuf message."""
    def varint(number):
        out = b""
        while number > 0x7F:
            out += bytes([number & 0x7F | 0x80])
            number >>= 7
        return out + bytes([number])
    if isinstance(value, bytes):
        return varint(field << 3 | 2) + varint(len(value)) + value
    return varint(field << 3) + varint(value)


def piece(text, kind=1):
    return proto(1, proto(1, text.encode()) + b"\x15" + struct.pack("<f", -1.0) + proto(3, kind))


@pytest.mark.parametrize("data, part", [
    (b"", "no pieces"), (b"\xff" * 40, "64 bits"), (b"hello world", "not a usable"),
    (proto(1, b"\x0a\x7f"), "middle"), (piece("a") + proto(2, proto(3, 1)), "byte-pair"),
    (piece("a") + proto(2, proto(3, 2)) + proto(3, proto(2, b"map")), "character map"),
    (piece("a") + piece("a") + proto(2, proto(3, 2)), "ids 0 and 1")])
def test_hostile_sentencepiece_models(data, part, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=part):
        load_tokenizer(str(path))


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 7900), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_sentencepiece_models_never_do_worse_than_an_error(tmp_path, changes):
    source = os.path.join(STORIES, "tokenizer.model")
    if not os.path.isfile(source):
        pytest.skip(f"the stories260k model is not at {STORIES}")
    path = shutil.copy(source, tmp_path / "tokenizer.model")
    with open(path, "r+b") as file:
        for position, value in changes:
            file.seek(position)
            file.write(bytes([value]))
    try:
        load_tokenizer(str(path)).encode("Once upon a time")
    except TokenizerError:
        pass


# ---------------------------------------------------------------- inside a GGUF

def write_gguf_vocabulary(path, model, pieces, types, **more):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    for name, value in more.items():
        getattr(writer, "add_" + name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_sentencepiece_inside_a_gguf(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    source = os.path.join(STORIES, "tokenizer.model")
    if not os.path.isfile(source):
        pytest.skip(f"the stories260k model is not at {STORIES}")
    library = sentencepiece.SentencePieceProcessor(model_file=source)
    size = library.vocab_size()
    kinds = [2 if library.is_unknown(i) else 3 if library.is_control(i) else
             6 if library.is_byte(i) else 1 for i in range(size)]
    path = write_gguf_vocabulary(
        tmp_path / "v.gguf", "llama", [library.id_to_piece(i).encode() for i in range(size)], kinds,
        token_scores=[library.get_score(i) for i in range(size)], bos_token_id=1, eos_token_id=2)
    tokenizer = load_tokenizer(path)
    for text, ids in zip(VECTORS["strings"], VECTORS["stories260k"]):
        if ids is not None:
            assert tokenizer.encode(text) == ids
            assert streamed(tokenizer, ids) == text


def test_byte_level_inside_a_gguf(tmp_path):
    from tokenizers import pre_tokenizers
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["12", "he", "ll", "hell", "<s>", "[PAD]"]
    kinds = [1] * (len(pieces) - 2) + [3, 5]
    more = dict(tokenizer_pre="smollm", token_merges=["1 2", "h e", "l l", "he ll"],
                bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 2)

    def load(**change):
        return load_tokenizer(write_gguf_vocabulary(tmp_path / "v.gguf", "gpt2", pieces, kinds,
                                                    **dict(more, **change)))
    names = [pieces.index(item) for item in ("hell", "o", "1", "2")]
    assert load().encode("hello12") == names
    assert load(add_bos_token=True).encode("hello12") == [len(pieces) - 2] + names
    # unused rows are no text, the rows of the model's embedding exist all the same
    assert load().vocab_size == len(pieces) - 1
    # cut as Llama 3 does it: digits in groups, whole words looked up first, begin token by default
    llama3 = load(tokenizer_pre="llama-bpe")
    assert llama3.encode("12 1") == [len(pieces) - 2] + [
        pieces.index(item) for item in ("12", "Ġ", "1")]
    for change, part in ((dict(tokenizer_pre="smolm"), "Did you mean 'smollm'"),
                         (dict(token_merges=["1 2 3"]), "not two pieces"),
                         (dict(token_merges=["h zz"]), "do not fit"),
                         (dict(bos_token_id=9999), "bos_token_id is 9999")):
        with pytest.raises(TokenizerError, match=part):
            load(**change)
