"""Calls of tools in an answer's text: the formats, broken ones, and any cut of the text into pieces."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colora_ms.serving.http.calls import FORMATS, Call, CallReader, format_of

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x </tool_call> y"}}\n</tool_call>'
READ = ("f", {"a": "x </tool_call> y"})

#: (format, what the model writes, texts and calls)
CASES = [
    ("hermes", f"Let me see.\n{CALL}\n{CALL} done ", ["Let me see.", READ, READ, "done "]),
    ("hermes", " a <tool_ca b  ", [" a <tool_ca b  "]),
    ("hermes", "<tool_call>{broken</tool_call> t", ["<tool_call>{broken</tool_call> t"]),
    ("hermes", f"<tool_call>{{broken</tool_call>{CALL}", ["<tool_call>{broken</tool_call>", READ]),
    ("hermes", f'<tool_call>{{"no": 1}}</tool_call>{CALL}', ['<tool_call>{"no": 1}</tool_call>', READ]),
    ("hermes", 'x<tool_call>{"name":"f","arguments":{}}', ["x", ("f", {})]),
    ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name":"f","argu', ['<tool_call>{"name":"f","argu']),
    ("hermes", "<tool_call>", ["<tool_call>"]),
    ("hermes", "  ", ["  "]),
    ("llama3", ' {"name": "f", "parameters": {"x": 1}}', [("f", {"x": 1})]),
    ("llama3", '{"name": "f", "parameters": {}}; {"name":"g","parameters":{"u":[1]}}', [("f", {}), ("g", {"u": [1]})]),
    ("llama3", '{"name": "h", "parameters": {}}', ['{"name": "h", "parameters": {}}']),  # no tool of this name
    ("llama3", '{"name": "f", "parameters": {}} is how', ['{"name": "f", "parameters": {}} is how']),
    ("llama3", '{"a": 1} b', ['{"a": 1} b']),
    ("llama3", 'ok <|python_tag|>{"name": "h", "parameters": {}}', ["ok", ("h", {})]),
    ("llama3", '<|python_tag|>brave.call(query="x")', ['<|python_tag|>brave.call(query="x")']),
    ("llama3", '{"name": "f", "para', ['{"name": "f", "para']),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a":1}},{"name":"g","arguments":{}}]',
     [("f", {"a": 1}), ("g", {})]),
    ("mistral", 'hi[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}', ["hi", ("f", {"a": 1}), ("g", {})]),
    ("mistral", '[TOOL_CALLS]f{"a":1}', [("f", {"a": 1})]),
    ("mistral", "[TOOL_CALLS] nothing here", ["[TOOL_CALLS] nothing here"]),
    ("mistral", "[TOOL_CALLS][1]", ["[TOOL_CALLS][1]"]),
]


def read(form, text, cuts=(), most=None):
    """Texts, joined, and (name, arguments) of calls."""
    reader = CallReader(FORMATS[form], {"f", "g"}, most)
    places = [0, *sorted(cuts), len(text)]
    parts = [part for begin, end in zip(places, places[1:]) for part in reader.push(text[begin:end])] + reader.end()
    found = []
    for part in parts:
        if isinstance(part, Call):
            found.append((part.name, json.loads(part.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("form, text, wanted", CASES)
def test_an_answer_whole_and_a_character_at_a_time(form, text, wanted):
    assert read(form, text) == wanted
    assert read(form, text, range(1, len(text))) == wanted


@given(case=st.sampled_from(CASES), data=st.data())
def test_no_cut_changes_what_is_read(case, data):
    form, text, wanted = case
    assert read(form, text, data.draw(st.lists(st.integers(0, len(text)), max_size=6))) == wanted


@given(form=st.sampled_from(sorted(FORMATS)), data=st.data(),
       pieces=st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "f",
                                        '{"name": "f",', ' "arguments": {}}', "[", "]", "{}", " ", "\n", "word", ";"]),
                       max_size=12))
def test_nothing_is_lost_of_any_text(form, data, pieces):
    """Any cut gives the same; and without calls, the very text."""
    text = "".join(pieces)
    wanted = read(form, text)
    assert read(form, text, data.draw(st.lists(st.integers(0, len(text)), max_size=5))) == wanted
    if all(isinstance(part, str) for part in wanted):
        assert "".join(wanted) == text


def test_text_comes_at_once_and_a_call_when_it_is_whole():
    reader = CallReader(FORMATS["hermes"], {"f"})
    assert reader.push("Well, <tool") == ["Well,"] and reader.push("box> ") == [" <toolbox>"]
    assert reader.push('<tool_call>{"name": "f", "arguments": {}}') == []
    call, = reader.push("</tool_call>")
    assert (call.name, call.arguments) == ("f", "{}") and re.fullmatch("call_[0-9a-f]{24}", call.id)


def test_at_most_so_many_calls():
    assert read("hermes", f"a {CALL}{CALL} b", most=1) == ["a", READ]
    assert read("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g"}]', most=1) == [("f", {})]


def test_ids_of_mistral_are_what_its_templates_ask_for():
    reader = CallReader(FORMATS["mistral"], {"f"})
    call, other = reader.push('[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "f", "id": "abcDEF123"}]')
    assert re.fullmatch("[A-Za-z0-9]{9}", call.id) and other.id == "abcDEF123"


@pytest.mark.parametrize("name, form", [("qwen25", "hermes"), ("qwen3", "hermes"), ("llama31", "llama3"),
                                        ("chatml", None), ("gemma", None)])
def test_a_templates_format(goldens, name, form):
    found = format_of((goldens / "chat_templates" / f"{name}.jinja").read_text())
    assert (found and found.name) == form
