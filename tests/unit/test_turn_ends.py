"""Which tokens end an answer: every source alone and together, llama.cpp's names, templates with and without an end."""

import json
import os
import types

import pytest

import make_turn_ends as made
import tokenizer_kinds as kinds
from colora_ms.models.tokenizer import Tokenizer, load_tokenizer
from colora_ms.models.turn_ends import TurnEnd, turn_ends

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens")
with open(os.path.join(GOLDENS, "turn_ends.json"), encoding="utf-8") as _file:
    LLAMA_CPP = json.load(_file)


def config(*ids):
    return types.SimpleNamespace(eos_token_ids=ids)


def template(name):
    with open(os.path.join(GOLDENS, "chat_templates", name + ".jinja"), encoding="utf-8") as file:
        return file.read()


def tokenizer_with(special, plain=(), **settings):
    from tokenizers import AddedToken
    backend = kinds.byte_level("gpt2").backend
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", **settings})


@pytest.mark.parametrize("name", sorted(LLAMA_CPP))
def test_a_ggufs_ends_are_those_of_llama_cpp(tmp_path, name):
    pieces = made.write(tmp_path / "v.gguf", name)
    tokenizer = load_tokenizer(str(tmp_path / "v.gguf"))
    ends = turn_ends(config(), tokenizer)
    assert sorted(end.token for end in ends) == sorted(LLAMA_CPP[name])
    assert all(pieces[end.id] == end.token for end in ends)
    for token in LLAMA_CPP[name]:  # one id where a template spells it out, even if the file marks it as a word
        assert tokenizer.encode(f"a{token}b") == tokenizer.encode("a") + [pieces.index(token)] + tokenizer.encode("b")
    for key, token in made.VOCABULARIES[name][1].items():
        assert f"tokenizer.ggml.{key}_token_id" in next(end.sources for end in ends if end.token == token)


def test_the_case_of_a_chat_models_gguf_without_a_template(tmp_path):
    made.write(tmp_path / "v.gguf", "chatml")
    ends = turn_ends(config(257), load_tokenizer(str(tmp_path / "v.gguf")))
    assert ends == (TurnEnd(257, "<|endoftext|>", ("tokenizer.ggml.eos_token_id", "the tokenizer's eos_token",
                                                   "its name in the vocabulary")),
                    TurnEnd(259, "<|im_end|>", ("its name in the vocabulary",)))


@pytest.mark.parametrize("source, special, plain, token", [
    ("chatml", ["<|im_start|>", "<|im_end|>"], [], "<|im_end|>"),
    ("chatml_generation", [], ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    ("plain_generation", [], [], "</s>"),
    ("llama31", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], [], "<|eot_id|>"),
    ("qwen25", ["<|im_start|>", "<|im_end|>"], [], "<|im_end|>"),
    ("mistral", [], ["[INST]", "[/INST]"], "</s>"),
    ("gemma", ["<start_of_turn>", "<end_of_turn>"], [], "<end_of_turn>"),
    ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", [], [], "</s>"),
    # a token of an answer's last part, then the turn's end, then the next turn
    ("{% for m in messages %}<a>{{ m.content }}<b><c>\n{% endfor %}", ["<a>", "<b>", "<c>"], [], "<c>"),
    # the next turn's opening is all that says that this one is over
    ("{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}", ["<u>"], [], "<u>"),
    # the conversation's last turn alone has an end
    ("{% for m in messages %}[{{ m.content }}{% if loop.last %}<fin>{% endif %}{% endfor %}", ["<fin>"], [], "<fin>")])
def test_a_templates_own_turn_end(source, special, plain, token):
    text = source if "{" in source else template(source)
    tokenizer = tokenizer_with(special, plain, chat_template=text)
    found = [end for end in turn_ends(config(), tokenizer) if "the chat template" in end.sources]
    assert [end.token for end in found] == [token]


@pytest.mark.parametrize("source", [
    None, "{{ messages[0].content }}", "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "{% for %}",
    "{% for m in messages %}{{ m.content }}.</s>{% endfor %}"])
def test_templates_without_a_clear_end(source):
    tokenizer = tokenizer_with([], **({} if source is None else {"chat_template": source}))
    assert turn_ends(config(), tokenizer) == (TurnEnd(1, "</s>", ("the tokenizer's eos_token",)),)


def test_an_end_that_is_known_counts_before_the_last_of_several():
    tokenizer = tokenizer_with(["<b>", "<c>"], chat_template="{% for m in messages %}{{ m.content }}<b><c>{% endfor %}")
    b, c = (tokenizer.backend.token_to_id(token) for token in ("<b>", "<c>"))
    assert [end.id for end in turn_ends(config(b), tokenizer)] == [b, 1]
    assert [end.id for end in turn_ends(config(), tokenizer)] == [1, c]


def test_the_union_and_who_says_so(tmp_path):
    tokenizer = tokenizer_with(["<|im_end|>", "<|eot|>"], chat_template=template("chatml"))
    tokenizer.save(tmp_path)
    ids = [tokenizer.backend.token_to_id(token) for token in ("<|im_end|>", "<|eot|>")]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [1, ids[0]]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[0], ids[1]]}))
    tokenizer = load_tokenizer(tmp_path)
    assert turn_ends(config(1, *ids, 9), tokenizer) == (
        TurnEnd(1, "</s>", ("config.json", "the tokenizer's eos_token")),
        TurnEnd(ids[0], "<|im_end|>", ("config.json", "generation_config.json", "the chat template")),
        TurnEnd(ids[1], "<|eot|>", ("generation_config.json",)),
        TurnEnd(9, tokenizer.backend.id_to_token(9), ("the model's config",)))


def test_objects_that_only_name_an_end():
    assert [end.id for end in turn_ends(config(5), types.SimpleNamespace(eos_token_id=2))] == [5, 2]
    assert [end.id for end in turn_ends(config(5, 2), types.SimpleNamespace(eos_token_id=None))] == [5, 2]


def test_the_template_is_rendered_once():
    tokenizer = tokenizer_with(["<|im_end|>"], chat_template=template("chatml"))
    calls = []
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **options: calls.append(1) or render(*args, **options)
    first = turn_ends(config(), tokenizer)
    assert len(calls) == 2 and turn_ends(config(), tokenizer) == first and len(calls) == 2


def test_info_lists_them(capsys, goldens, tmp_path):
    import shutil

    from colora_ms.cli import main
    folder = tmp_path / "model"
    shutil.copytree(goldens / "tiny" / "llama", folder)
    tokenizer_with(["<|im_end|>"], chat_template=template("chatml")).save(folder)
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.split("an answer ends with\n")[1].splitlines()
    assert lines[0].split(maxsplit=2) == ["2", "<|im_start|>", "config.json, generation_config.json"]
    assert lines[1].split(maxsplit=2) == ["1", "</s>", "the tokenizer's eos_token"]
    assert lines[2].split(maxsplit=2) == ["3", "<|im_end|>", "the chat template"]
