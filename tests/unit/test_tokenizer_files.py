"""What the files beside a tokenizer say, against transformers' AutoTokenizer; contradictions and refusals."""

import json
import os
import warnings

import pytest

import make_tokenizer_files as made
from colora_ms.errors import TokenizerError
from colora_ms.models.tokenizer import load_tokenizer

with open(os.path.join(made.FOLDER, "cases.json"), encoding="utf-8") as _file:
    GOLDEN = json.load(_file)

# what these folders are warned about
SAID = {"map against config": "eos_token is '</s>' in tokenizer_config.json and '<s>'",
        "map against config with decoder": "'</s>' is used",
        "add_bos_token that does nothing": "add_bos_token: true.*no begin token"}

# these put an end token behind every text; that is left out, because a prompt goes on
ADD_END = {"llama 2", "begin token of the file"}


@pytest.mark.parametrize("name", sorted(GOLDEN["cases"]))
def test_ids_equal_those_of_transformers(name, tmp_path):
    case = GOLDEN["cases"][name]
    made.write_case(tmp_path, case["base"], case["files"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = load_tokenizer(tmp_path)
    if name in SAID:
        assert len(said) == 1
        with pytest.warns(UserWarning, match=SAID[name]):
            load_tokenizer(tmp_path)
    else:
        assert not [str(item.message) for item in said]
    assert tokenizer.eos_token_id == case["eos"]
    assert tokenizer.special_tokens == {key: value for key, value in case["special"].items() if value}
    tokenizer.save(tmp_path / "saved")
    for loaded in (tokenizer, load_tokenizer(tmp_path / "saved")):
        for text, ids, plain in zip(GOLDEN["strings"], case["ids"], case["plain"]):
            assert loaded.encode(text, add_special_tokens=False) == plain, text
            assert loaded.encode(text) == (ids[:-1] if name in ADD_END else ids), text
            assert loaded.encode_offsets(text)[0] == loaded.encode(text)


def folder_of(tmp_path, base, files):
    made.write_case(tmp_path, base, files)
    return tmp_path


@pytest.mark.parametrize("how", ["added_tokens.json", "added_tokens_decoder", "additional_special_tokens",
                                 "extra_special_tokens, object", "extra_special_tokens, list",
                                 "special_tokens_map.json"])
@pytest.mark.parametrize("base", ["bytes", "metaspace", "spm"])
def test_chat_tokens_named_only_beside_the_vocabulary(tmp_path, base, how):
    pair, size = ["<|im_start|>", "<|im_end|>"], made.SIZES[base]
    files = {
        "added_tokens.json": {"added_tokens.json": dict(zip(pair, ("N0", "N1")))},
        "added_tokens_decoder": {"tokenizer_config.json": {
            "added_tokens_decoder": {f"N{i}": made.token(one) for i, one in enumerate(pair)}}},
        "additional_special_tokens": {"tokenizer_config.json": {"additional_special_tokens": pair}},
        "extra_special_tokens, object": {"tokenizer_config.json": {"extra_special_tokens": dict(zip("ab", pair))}},
        "extra_special_tokens, list": {"tokenizer_config.json": {"extra_special_tokens": pair}},
        "special_tokens_map.json": {"special_tokens_map.json": {"additional_special_tokens": pair}}}[how]
    tokenizer = load_tokenizer(folder_of(tmp_path, base, files))
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>", add_special_tokens=False)
    # a blank in front of every text, or only in front of the whole
    inner = tokenizer.encode("user\nhi" if base != "metaspace" else "<s>user\nhi", add_special_tokens=False)
    inner = inner[base == "metaspace":]
    assert ids == [size, *inner, size + 1] and tokenizer.vocab_size == size + 2
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<|im_start|>user\nhi<|im_end|>"
    # that file does not say that they are special
    assert ("<|im_end|>" in tokenizer.decode(ids)) == (how == "added_tokens.json")


CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize("files, part", [
    ({"added_tokens.json": {"<a>": 321}}, "'<a>' the id 321, but the token before it.*has 319; the ids 320 to 320"),
    ({"added_tokens.json": {"<a>": 320, "<b>": 322}}, "'<b>' the id 322.*'<a>', has 320"),
    ({"added_tokens.json": {"<a>": 5}}, "'<a>' the id 5, where the vocabulary has '\\$'"),
    ({"added_tokens.json": {"</s>": 0}}, "'</s>' the id 0, but the vocabulary has it at 1 and '<s>' at 0"),
    ({"added_tokens.json": {"the": 320}}, "'the' the id 320, but the vocabulary has it at"),
    ({"added_tokens.json": {"<a>": 320, "<b>": 320}}, "'<a>' and '<b>' the id 320"),
    ({"added_tokens.json": {"<a>": "320"}}, "expected a token and its id"),
    ({CONFIG: {"added_tokens_decoder": {"320": made.token("<a>"), "321": made.token("<a>")}}},
     "'<a>' the ids 320 and 321"),
    ({CONFIG: {"added_tokens_decoder": {"x": made.token("<a>")}}}, "key 'x', expected a token id"),
    ({CONFIG: {"added_tokens_decoder": {"320": "<a>", "321": 3}}}, "added_tokens_decoder\\[321\\] is 3"),
    ({CONFIG: {"added_tokens_decoder": {"320": {"content": "<a>", "lstrip": 1}}}}, "lstrip 1, expected true or false"),
    ({CONFIG: {"added_tokens_decoder": {"320": {"content": "<a>", "speciall": True}}}}, "unknown key 'speciall'"),
    ({CONFIG: {"added_tokens_decoder": []}}, "added_tokens_decoder is \\[\\]"),
    ({CONFIG: {"bos_token": "<nope>"}}, "bos_token is '<nope>'"), ({CONFIG: {"pad_token": ["x"]}}, "pad_token is"),
    ({CONFIG: {"additional_special_tokens": "<a>"}}, "expected a list of tokens"),
    ({CONFIG: {"extra_special_tokens": {"a": None}}}, "extra_special_tokens\\['a'\\] is None"),
    ({CONFIG: {"add_bos_token": "yes"}}, "add_bos_token is 'yes'"), ({CONFIG: {"tokenizer_class": 3}},
                                                                     "tokenizer_class is 3"),
    ({CONFIG: {"chat_template": 3}}, "chat_template is 3"), ({CONFIG: {"chat_template": [{"name": "x"}]}},
                                                             "chat_template is"),
    ({CONFIG: [1]}, "JSON object"), ({"generation_config.json": {"eos_token_id": ["2"]}}, "eos_token_id '2'"),
    ({"added_tokens.json": {"": 320}}, "expected a token and its id")])
def test_files_that_are_refused(tmp_path, files, part):
    with pytest.raises(TokenizerError, match=part):
        load_tokenizer(folder_of(tmp_path, "bytes", files))


@pytest.mark.parametrize("files, part", [
    ({CONFIG: {"do_lower_case": True, "keep_accents": None, "sp_model_kwargs": {}, "model_max_length": 8}},
     "not read: do_lower_case: true$"),
    ({CONFIG: {"sp_model_kwargs": {"enable_sampling": True}, "fix_it": 1}}, "sp_model_kwargs.*fix_it: 1"),
    ({CONFIG: {"sep_token": "[SEP]"}}, "sep_token is '\\[SEP\\]'.*left out"),
    ({CONFIG: {"added_tokens_decoder": {"320": made.token("<a>")}}, "added_tokens.json": {"<a>": 321}},
     "other ids.*'<a>' \\(321, not 320\\)"),
    ({CONFIG: {"added_tokens_decoder": {"320": made.token("<a>")}}, "added_tokens.json": {"<b>": 321}},
     "added_tokens.json names '<b>'"),
    ({CONFIG: {"added_tokens_decoder": {}}, "special_tokens_map.json": {"additional_special_tokens": ["<b>"]}},
     "special_tokens_map.json names '<b>'"),
    ({CONFIG: {"add_bos_token": False}}, "puts a begin token")])
def test_what_is_said(tmp_path, files, part):
    folder = folder_of(tmp_path, "bytes_bos", files)
    with pytest.warns(UserWarning, match=part) as said:
        tokenizer = load_tokenizer(folder)
    assert len(said) == 1
    assert tokenizer.encode("the")[0] == 0


def test_templates_in_all_their_places(tmp_path):
    folder = folder_of(tmp_path, "bytes", {CONFIG: {"chat_template": [{"name": "default", "template": "old"},
                                                                      {"name": "rag", "template": "rag"}]}})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "additional_chat_templates" / "notes.txt").write_text("x")
    assert load_tokenizer(folder).chat_templates == {"default": "old", "rag": "rag", "tool_use": "tools"}
    (folder / "chat_template.jinja").write_text("new")
    with pytest.warns(UserWarning, match="chat_template.jinja differs"):
        tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == "new"
    tokenizer.save(folder / "saved")
    assert load_tokenizer(folder / "saved").chat_templates == tokenizer.chat_templates


def test_end_tokens_of_the_models_files(tmp_path):
    folder = folder_of(tmp_path, "bytes", {"config.json": {"model_type": "qwen2", "eos_token_id": 1},
                                           "generation_config.json": {"eos_token_id": [1, 7, 1]}})
    assert load_tokenizer(folder).stored_ends == {"config.json": [1], "generation_config.json": [1, 7]}


def test_a_class_default_that_the_vocabulary_lacks_is_no_token(tmp_path):
    folder = folder_of(tmp_path, "bytes", {"config.json": {"model_type": "gemma2"}})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id is None and tokenizer.vocab_size == 320


@pytest.mark.parametrize("text", ["", "the little girl", "the</s>"])
def test_an_end_token_is_never_put_behind_a_prompt(tmp_path, text):
    """Llama-2's config with add_eos_token, a post-processor of tokenizer.json, and a GGUF that say so."""
    import gguf
    import sentencepiece

    import tokenizer_kinds as kinds

    config = dict(made.CASES["llama 2"][1]["tokenizer_config.json"])
    llama2 = tmp_path / "llama2"
    llama2.mkdir()
    made.write_case(llama2, "spm", {"tokenizer_config.json": config})
    processor = tmp_path / "processor"
    processor.mkdir()
    made.write_case(processor, "bytes_bos", {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}})
    library = sentencepiece.SentencePieceProcessor(model_file=os.path.join(made.FOLDER, "spm.model"))
    write = gguf.GGUFWriter.write_header_to_file

    def with_end(writer, *args, **options):
        writer.add_add_eos_token(True)
        return write(writer, *args, **options)
    gguf.GGUFWriter.write_header_to_file = with_end
    try:
        path = kinds.gguf_of_sentencepiece(library, tmp_path / "v.gguf")
    finally:
        gguf.GGUFWriter.write_header_to_file = write
    for source in (llama2, processor, path):
        tokenizer = load_tokenizer(source)
        assert tokenizer.eos_token_id == tokenizer.backend.encode("x").ids[-1]  # the file does put one
        ids = tokenizer.encode(text)
        assert ids == [tokenizer.bos_token_id] + tokenizer.encode(text, add_special_tokens=False)
        assert ids.count(tokenizer.eos_token_id) == text.count("</s>")
        tokenizer.save(tmp_path / "saved")
        again = load_tokenizer(tmp_path / "saved")
        assert again.encode(text) == ids
        assert again.backend.encode("x").ids == tokenizer.backend.encode("x").ids  # what the file says stays there


def test_an_id_of_tokenizer_json_that_the_library_would_change(tmp_path):
    folder = folder_of(tmp_path, "bytes", {})
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values["added_tokens"].append({"id": 400, **made.token("<x>")})
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(TokenizerError, match="'<x>' the id 400, but its vocabulary leaves 320"):
        load_tokenizer(folder)


def test_flags_count_for_every_tokenizer_model(tmp_path):
    """Model families with a class of their own (InternLM, Baichuan) have Llama's flags."""
    folder = folder_of(tmp_path, "spm", {"tokenizer_config.json": {"tokenizer_class": "InternLM2Tokenizer",
                                                                   "add_bos_token": False}})
    assert load_tokenizer(folder).encode("the")[0] != 1
    folder = folder_of(tmp_path, "spm", {"tokenizer_config.json": {"tokenizer_class": "InternLM2Tokenizer"}})
    assert load_tokenizer(folder).encode("the")[0] == 1


def test_a_model_file_that_cannot_be_built_leaves_tokenizer_json(tmp_path):
    folder = folder_of(tmp_path, "metaspace", {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer",
                                                                         "add_prefix_space": True}})
    plain = load_tokenizer(folder).encode("the girl")
    (folder / "tokenizer.model").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="tokenizer.json is used as it is"):
        assert load_tokenizer(folder).encode("the girl") == plain


def test_new_tokens_get_ids_in_the_order_of_transformers(tmp_path):
    """A named one first, whatever the list says (checked by hand against transformers 4.57: eos before the list)."""
    made.write_case(tmp_path, "bytes", {"tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}})
    tokenizer = load_tokenizer(tmp_path)
    size = made.SIZES["bytes"]
    assert tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False) == [size + 1, size]
    assert tokenizer.eos_token_id == size
