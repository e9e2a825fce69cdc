"""Chat templates against transformers' rendering; the places of the assistant's turns; named templates."""

import json
import os

import pytest

import tokenizer_kinds as kinds
from colora_ms.errors import TokenizerError
from colora_ms.models import chat_template
from colora_ms.models.joint import encode_spans
from colora_ms.models.tokenizer import Tokenizer

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens")
with open(os.path.join(GOLDENS, "chat_templates.json"), encoding="utf-8") as _file:
    GOLDEN = json.load(_file)


def source(name):
    with open(os.path.join(GOLDENS, "chat_templates", name), encoding="utf-8") as file:
        return file.read()


@pytest.mark.parametrize("name", sorted({case["template"] for case in GOLDEN["cases"]}))
def test_rendering_equals_transformers(name):
    template, compared, with_spans = source(name), 0, 0
    for case in GOLDEN["cases"]:
        if case["template"] != name:
            continue
        messages, variables = GOLDEN["conversations"][case["name"]]
        variables = {**GOLDEN["special"], **variables}
        settings = {"add_generation_prompt": case["mode"] == "open", "variables": variables}
        if "error" in case:
            with pytest.raises(TokenizerError):
                chat_template.render(template, messages, continue_final_message=case["mode"] == "continue", **settings)
            continue
        assert chat_template.render(template, messages, continue_final_message=case["mode"] == "continue",
                                    **settings) == case["text"], case
        compared += 1
        if case["mode"] != "continue":
            text, spans = chat_template.render_spans(template, messages, **settings)
            assert text == case["text"]
            if "spans" in case:
                assert [list(span) for span in spans] == case["spans"], case
                with_spans += bool(spans)
            assert bool(spans) <= chat_template.marks_generation(template)
    assert compared > 8 and (with_spans > 3) == ("generation" in name)


@pytest.mark.parametrize("template, spans", [
    ("{% generation %}ab{% endgeneration %}", [(0, 2)]),  # transformers 4.57 misses one that begins the text
    ("x{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}-{% endfor %}", [(1, 3), (4, 8)]),
    ("{% macro turn(m) %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endmacro %}"
     "{% for m in messages %}{{ turn(m) }}{% endfor %}", [(1, 3), (5, 9)]),
    ("{% set all %}[{% generation %}a{% endgeneration %}]{% endset %}{{ all }}{{ all }}", [(1, 2), (4, 5)]),
    ("{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}d", [(0, 3)]),
    ("a{% generation %}{% endgeneration %}b", []), ("ab", [])])
def test_where_generation_blocks_lie(template, spans):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a\ufdd0b\ufdd1"[:4]}]
    text, found = chat_template.render_spans(template, messages)
    assert text == chat_template.render(template, messages) and found == spans
    assert chat_template.marks_generation(template) == ("generation" in template)


def test_a_block_that_is_changed_afterwards_has_no_place():
    template = ("{% filter upper %}{% set x %}{% generation %} a {% endgeneration %}{% endset %}"
                "{{ x | trim }}{% endfilter %}")
    messages = [{"role": "user", "content": "Hi"}]
    assert chat_template.render(template, messages) == "A"
    with pytest.raises(TokenizerError, match="places of the assistant's turns"):
        chat_template.render_spans(template, messages)


def test_spans_become_a_mask_of_tokens():
    tokenizer = Tokenizer(kinds.byte_level("qwen2").backend, {
        "bos_token": "<s>", "eos_token": "</s>", "chat_template": source("chatml_generation.jinja")})
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "Lily"},
                {"role": "user", "content": "of"}, {"role": "assistant", "content": "é 😀"}]
    text, spans = tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_spans=True)
    assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    ids, mask = encode_spans(tokenizer, text, spans)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m], skip_special_tokens=False) == \
        "Lily<|im_end|>é 😀<|im_end|>"


def test_named_templates():
    backend = kinds.byte_level().backend
    tokenizer = Tokenizer(backend, {"chat_template": {"default": "d{% generation %}{% endgeneration %}",
                                                      "tool_use": "t"}})
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages) == "d"
    assert tokenizer.apply_chat_template(messages, tools=None) == "d"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}]) == "t"
    assert tokenizer.marks_generation() and not tokenizer.marks_generation(tools=[])
    assert tokenizer.chat_template.startswith("d")
    tokenizer = Tokenizer(backend, {"chat_template": {"rag": "r", "tool_use": "t"}})
    with pytest.raises(TokenizerError, match="rag, tool_use.*'default'"):
        tokenizer.apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages, tools=[]) == "t"


@pytest.mark.parametrize("messages, variables, part", [
    ([{"role": "user", "content": None}], {}, "without content"), ([{"role": "user", "content": 3}], {},
                                                                   "content is 3"),
    ([{"role": "user", "content": [3]}], {}, "list of parts"), ([{"content": "x"}], {}, "'role'"),
    ([{"role": "user", "content": "x"}], {"tools": "weather"}, "tools is 'weather'"),
    ([{"role": "user", "content": "x"}], {"tools": [print]}, "JSON schemas"),
    ([{"role": "user", "content": "x"}], {"documents": ["x"]}, "documents is")])
def test_what_is_refused(messages, variables, part):
    with pytest.raises(TokenizerError, match=part):
        chat_template.render("{{ messages[0].content }}", messages, variables=variables)


def test_continuing_the_last_message():
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text", "text": "yes,"}]}]
    template = "{% for m in messages %}<{{ m.content if m.content is string else m.content[0].text }}>{% endfor %}"
    assert chat_template.render(template, messages, continue_final_message=True) == "<x><yes,"
    assert messages[1]["content"][0]["text"] == "yes,"
    with pytest.raises(TokenizerError, match="choose one"):
        chat_template.render(template, messages, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(TokenizerError, match="no text"):
        chat_template.render(template, [{"role": "assistant", "content": None}], continue_final_message=True)
    with pytest.raises(TokenizerError, match="leaves out"):
        chat_template.render("x", messages, continue_final_message=True)
