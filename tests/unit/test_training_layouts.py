"""The seven layouts of training data: ids against transformers, recognition, columns, and what is refused."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Backend

from colora_ms.errors import DataError
from colora_ms.models.tokenizer import Tokenizer
from colora_ms.training import data
from colora_ms.training.data import IGNORE, Example, Preference

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CASES = json.loads((GOLDENS / "training_data" / "cases.json").read_text(encoding="utf-8"))
TEMPLATES = sorted({case["template"] for case in CASES["cases"]})


def tokenizer_of(kind, template=None):
    """One of the goldens' tokenizers, with one of their chat templates (or a template's source)."""
    path = GOLDENS / "chat_templates" / f"{template}.jinja"
    source = path.read_text(encoding="utf-8") if template in TEMPLATES else template
    return Tokenizer(Backend.from_file(str(GOLDENS / "training_data" / f"{kind}.json")),
                     {"bos_token": "<s>", "eos_token": "</s>", "chat_template": source})


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def quiet(function, *arguments, **options):
    """The result, with the warnings as a list of texts: ``(result, texts)``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(*arguments, **options), [str(one.message) for one in caught]


# -- against transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["last", "all"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_line_of_every_layout_gives_the_ids_of_transformers(tmp_path, template, kind, loss):
    tokenizer = tokenizer_of(kind, template)
    chat = data.make_template("chat", tokenizer)
    compared = 0
    for case in CASES["cases"]:
        if (case["template"], case["tokenizer"]) != (template, kind):
            continue
        (row,), _ = quiet(data.read_jsonl, write(tmp_path / "d.jsonl", CASES["lines"][case["line"]]))
        examples = [row.chosen_example, row.rejected_example] if isinstance(row, Preference) else [row]
        assert len(examples) == len(case["made"])
        for example, made in zip(examples, case["made"]):
            if "error" in made:
                with pytest.raises(DataError, match=r"d.jsonl:1|example 7"):
                    data.encode_example(example, tokenizer, chat, loss)
                continue
            found = data.encode_example(example, tokenizer, chat, loss)
            assert len(found) == len(made[loss]), case["line"]
            for one, (ids, learned) in zip(found, made[loss]):
                assert one.ids.tolist() == ids, case["line"]
                expected = np.full(len(ids), IGNORE)
                for begin, end in learned:
                    expected[begin:end] = ids[begin:end]
                assert one.labels.tolist() == expected.tolist(), (case["line"], tokenizer.decode(ids, False))
                compared += 1
    assert compared >= 12


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_texts_are_closed_documents(tmp_path, kind):
    tokenizer = tokenizer_of(kind, "chatml")
    path = write(tmp_path / "d.jsonl", *({"text": text} for text in CASES["texts"]))
    examples = data.load_examples(str(path))
    for template in (data.TextTemplate(), data.make_template("chat", tokenizer)):
        encoded = data.encode_examples(examples, tokenizer, template, 999)
        assert [item.ids.tolist() for item in encoded.items] == CASES["text_ids"][kind]
        assert all((item.labels == item.ids).all() for item in encoded.items)
    ended = Example(text=CASES["texts"][0] + "</s>")  # as TRL, a text that is closed already is not closed twice
    assert data.encode_example(ended, tokenizer, data.TextTemplate())[0].ids.tolist() == CASES["text_ids"][kind][0]
    with pytest.raises(DataError, match="d.jsonl:1.*no question"):
        data.TextTemplate().prompt(examples[0])


# -- recognition -----------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = {
    "text": {"text": "a document"},
    "completion": {"prompt": "q", "completion": "a"},
    "completion_messages": {"prompt": [USER], "completion": [ANSWER]},
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
}


def test_every_layout_has_a_record_and_the_rows_say_which(tmp_path):
    assert {layout.name for layout in data.LAYOUTS} == set(ROWS)
    for name, row in ROWS.items():
        for extra in ({}, {other: None for one in ROWS.values() for other in one if other not in row}):
            found = data.example_from_record({**row, **extra}, "d:1")
            assert found == data.example_from_record(row, "d:1", layout=name) or extra
            assert isinstance(found, Preference) == (name == "preference")
            if name == "text":
                assert (found.text, found.question, found.completion) == ("a document", "a document", "")
                continue
            example = found.chosen_example if name == "preference" else found
            assert example.question == "q" and example.completion == "a"
        with pytest.raises(DataError, match="d:1: the key .* is missing"):
            data.example_from_record({"id": 3}, "d:1", layout=name)
    with pytest.raises(DataError, match="no layout 'alpacca'.*Did you mean 'alpaca'"):
        data.example_from_record(ROWS["alpaca"], "d:1", layout="alpacca")


@pytest.mark.parametrize("first", sorted(ROWS))
def test_the_lines_of_a_file_have_one_layout(tmp_path, first):
    alike = {"completion", "completion_messages", "messages"}
    for second in ROWS:
        path = write(tmp_path / "d.jsonl", ROWS[first], ROWS[second])
        if first == second or {first, second} <= alike:
            assert len(data.read_jsonl(path)) == 2
        else:
            with pytest.raises(DataError,
                               match=f"d.jsonl:2: the layout is {second}, but that of the lines before it {first}"):
                data.read_jsonl(path)


def test_alpaca_joins_instruction_and_input_and_reads_history_and_system():
    def read(**row):
        return data.example_from_record({"instruction": "Add.", "output": "4", **row}, "d:1")
    assert read(input="2 + 2").prompt == "Add.\n\n2 + 2" and read(input=" ").prompt == read(input=None).prompt == "Add."
    assert [(item["role"], item["content"]) for item in read(input="x", system="s", history=[["a", "b"]]).messages] == \
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "Add.\n\nx")]
    for bad, word in (({"input": 3}, "input is 3"), ({"history": ["a"]}, r"history\[0\]"),
                      ({"output": ""}, "completion is ''"),
                      ({"instruction": ["x"]}, "instruction is")):
        with pytest.raises(DataError, match=word):
            read(**bad)


def test_who_speaks_in_sharegpt():
    roles = {"human": "user", "User": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
             "system": "system", "tool": "tool", "function": "tool", "observation": "tool"}
    for speaker, role in roles.items():
        found = data.example_from_record({"conversations": [
            {"from": "human", "value": "q"}, {"from": speaker, "value": "x"}, {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a", "weight": 1}]}, "d")
        assert found.messages[1]["role"] == role and found.completion == "a"
    for turn, word in (({"from": "alien", "value": "x"}, "conversations.1. is from 'alien'"),
                       ({"value": "x"}, "key 'value'"),
                       ({"from": "gpt", "value": 3}, "content 3"), ({"from": "gpt", "value": None}, "content None"),
                       ({"from": "gpt", "value": "x", "rating": 3}, "conversations.1. has the key 'rating'"),
                       ({"from": "gpt", "content": "x"}, "also role or content"), ("x", "conversations.1. is 'x'"),
                       ({"from": "function_call", "value": "weather()"}, "not valid JSON")):
        with pytest.raises(DataError, match=word):
            data.example_from_record({"conversations": [{"from": "human", "value": "q"}, turn,
                                                        {"from": "gpt", "value": "a"}]}, "d")


# -- preference pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize("row, question, chosen, rejected", [
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.", " green."),
    ({"chosen": "H: hi\nA: I can", "rejected": "H: hi\nA: I cannot"}, "H: hi\nA: I", " can", " cannot"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a", "b"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}, "q", "a", "b"),
    ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}, "q", "a", "b"),
    ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}, "q", "a", "b"),
    ({"prompt": "q", "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]}, "q", "a", "b"),
    ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "q", "a", "b"),
])
def test_pairs_with_and_without_a_prompt(row, question, chosen, rejected):
    pair = data.example_from_record({**row, "id": "p", "score": 2}, "d:1")
    assert (pair.question, pair.id, pair.meta["score"]) == (question, "p", 2)
    assert (pair.chosen_example.completion, pair.rejected_example.completion) == (chosen, rejected)
    assert (pair.chosen_example.id, pair.rejected_example.id) == ("p#chosen", "p#rejected")
    assert pair.chosen_example.question == pair.rejected_example.question == question


@pytest.mark.parametrize("row, word", [
    ({"chosen": "a b", "rejected": "c d"}, "do not begin with the same words"),
    ({"chosen": "a b", "rejected": "a b"}, "are equal"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "are equal"),
    ({"chosen": [ANSWER], "rejected": [USER, ANSWER]}, "do not begin with the same messages"),
    ({"chosen": "a", "rejected": [ANSWER]}, "two texts or two lists"),
    ({"prompt": "other", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}, "with the prompt"),
    ({"prompt": "q", "chosen": "", "rejected": "b"}, "answer chosen is ''"),
    ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
    ({"prompt": [USER], "chosen": [{**ANSWER, "foo": 1}], "rejected": [ANSWER]}, "has the key 'foo'"),
])
def test_pairs_that_are_none(row, word):
    with pytest.raises(DataError, match="d:1: .*" + word):
        data.example_from_record(row, "d:1")


def test_pairs_are_for_dpo_and_nothing_else_is(tmp_path):
    pairs, lines = write(tmp_path / "p.jsonl", ROWS["preference"]), write(tmp_path / "c.jsonl", ROWS["completion"])
    with pytest.raises(DataError, match="p.jsonl:1 is a preference pair.*train: dpo"):
        data.load_examples(str(pairs))
    assert [pair.id for pair in data.load_preferences(str(pairs))] == ["p.jsonl:1"]
    with pytest.raises(DataError, match="c.jsonl:1 is no preference pair.*chosen and rejected"):
        data.load_preferences(str(lines))
    assert data.without_overlap(data.load_preferences(str(pairs)) * 2 + [Example(prompt="z", completion="z")],
                                data.load_examples(str(lines)))[1] == 2


# -- columns ---------------------------------------------------------------------------------------


def test_columns_that_are_not_read_are_named_once(tmp_path):
    rows = [{**ROWS["messages"], "source": "web", "score": 0.5, "empty": None, "id": n} for n in range(3)]
    examples, said = quiet(data.read_jsonl, write(tmp_path / "d.jsonl", *rows))
    assert len(said) == 1
    assert "d.jsonl: the columns source, score are not read (layout messages reads messages, tools" in said[0]
    assert examples[0].meta == {"source": "web", "score": 0.5, "empty": None} and examples[2].id == "2"
    for columns in (["messages"], {"messages": "messages"}, ["messages", "tools", "id"]):
        examples, said = quiet(data.read_jsonl, tmp_path / "d.jsonl", columns=columns)
        assert not said and examples[0].completion == "a" and examples[0].id == "0"


def test_columns_are_all_that_is_read_under_whatever_name(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write(tmp_path / "d.jsonl", {"dialog": [USER, ANSWER], "tools": tools, "text": "x", "messages": "old"})
    source = {"kind": "jsonl", "path": str(path)}
    (found,), said = quiet(data.load_examples, source, {"messages": "dialog"})
    assert found.completion == "a" and found.tools == () and not said
    (found,), _ = quiet(data.load_examples, {**source, "columns": {"messages": "dialog", "tools": "tools"}}, ["text"])
    assert found.tools == tuple(tools)
    (found,), _ = quiet(data.load_examples, {**source, "messages_key": "dialog", "columns": ["dialog"]})
    assert found.completion == "a" and found.tools == ()
    (found,), said = quiet(data.load_examples, {**source, "messages_key": "dialog"})
    assert found.tools == tuple(tools) and "columns text, messages are not read" in said[0]
    for columns, word in ((["messages", "score"], "columns has 'score', which the layout messages does not read"),
                          (["mesages"], "is missing"), ([], "columns is"), ({"messages": 3}, "columns is"),
                          ("x", "columns is"),
                          ({"messages": "dialogue"}, "'dialogue' is missing.*Did you mean 'dialog'")):
        rows = [{"messages": [USER, ANSWER], "dialog": 1, "score": 1}]
        with pytest.raises(DataError, match=word):
            data.load_examples({"kind": "jsonl", "path": str(write(tmp_path / "e.jsonl", *rows)), "columns": columns})
    with pytest.raises(DataError, match="both say where prompt is"):
        data.load_examples({**source, "prompt_key": "q", "columns": {"prompt": "p", "completion": "c"}})
    generated = data.with_columns([str(path), {"kind": "reasoning_gym", "task": "x"}, {**source, "columns": ["a"]}],
                                  ["text"])
    assert [one.get("columns") for one in generated] == [["text"], None, ["a"]]


# -- messages --------------------------------------------------------------------------------------


def read_message(**message):
    """The answer of a line that holds this message."""
    return data.example_from_record({"messages": [USER, {"role": "assistant", **message}]}, "d:1").reply[-1]


def a_call(arguments, **more):
    return {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}, **more}]}


def test_arguments_that_are_a_json_text_are_parsed():
    for arguments in ('{"x": [1, null], "y": "é"}', {"x": [1, None], "y": "é"}):
        made = read_message(content=None, **a_call(arguments))
        assert made["content"] is None and made["tool_calls"][0]["function"]["arguments"] == {"x": [1, None], "y": "é"}
    again = read_message(**made)  # what is checked once may be checked again
    assert again == made
    place = r"d:1: messages\[1\].tool_calls\[0\].function"
    for text, word in (("{x: 1}", place + ".arguments is the text '{x: 1}', which is not valid JSON"),
                        ("", "not valid JSON"), ("3", "arguments 3"), ('"x"', "arguments 'x'"),
                        (7, "arguments 7"),
                        ("[" * 100000, "not valid JSON")):
        with pytest.raises(DataError, match=word):
            read_message(content="x", **a_call(text))


@pytest.mark.parametrize("source, given, text", [
    ("{{ m.tool_calls[0].function.arguments | tojson }}", '{"x":1}', '{"x": 1}'),
    ("{{ m.tool_calls[0].function.arguments }}", '{"x":1}', '{"x":1}'),  # and not {'x': 1}
    ("{{ m.tool_calls[0].function.arguments }}", {"x": None}, '{"x": null}'),
    ("{{ 'a' + m.tool_calls[0].function.arguments + 'b' }}", '{"x":1}', 'a{"x":1}b'),
    ("{% for k, v in m.tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", '{"x":1}', "x=1"),
    ("{{ m.tool_calls[0] | tojson }}", {"x": "é"},
     '{"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}')])
def test_arguments_are_json_however_a_template_writes_them(source, given, text):
    tokenizer = tokenizer_of("byte_level",
                             "{{ '?' }}{% for m in messages if m.role == 'assistant' %}" + source + "</s>{% endfor %}")
    example = Example(messages=[USER], answer=[{"role": "assistant", "content": "", **a_call(given)}])
    assert data.make_template("chat", tokenizer).answer(example) == text + "</s>"


@pytest.mark.parametrize("message, word", [
    ({"content": "a", "reasoning": "x"}, r"messages\[1\] has the key 'reasoning'.*Did you mean 'reasoning_content'"),
    ({"content": "a", "tool_call": []}, "has the key 'tool_call'.*Did you mean 'tool_calls'"),
    ({"content": "a", "refusal": "no"}, "has the key 'refusal'"),
    ({"content": 3}, "content 3"), ({}, "content None"), ({"content": None, "tool_calls": []}, "content None"),
    ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content part of the type 'image_url'"),
    ({"content": ["a"]}, "content part of the type 'a'"),
    ({"content": [{"type": "text"}]}, "content part {'type': 'text'}"),
    ({"content": [{"type": "text", "text": "a", "cache": 1}]}, "content part"),
    ({"content": "a", "name": 3}, "name 3"), ({"content": "a", "reasoning_content": ["x"]}, "reasoning_content"),
    ({"content": "a", "weight": 0.5}, "weight 0.5, expected 0"), ({"content": "a", "weight": True}, "weight True"),
    ({"content": "a", "weight": "1"}, "weight '1'"),
    ({"content": "a", "tool_calls": {}}, "tool_calls|content"),
    ({"content": "a", "tool_calls": ["f"]}, r"tool_calls\[0\] is 'f'"),
    ({"content": "a", **a_call({}, kind="x")}, r"tool_calls\[0\] has the key 'kind'"),
    ({"content": "a", "tool_calls": [{"type": "code", "function": {"name": "f"}}]}, "type 'code'"),
    ({"content": "a", "tool_calls": [{"function": {"arguments": {}}}]}, "name None"),
    ({"content": "a", "tool_calls": [{"function": {"name": "f", "parameters": {}}}]}, "has the key 'parameters'"),
    ({"content": "a", "tool_calls": [{"function": {"name": "f"}, "name": "f"}]}, "beside its function"),
    ({"content": "a", "function_call": {"name": "f"}, **a_call({})}, "both function_call and tool_calls"),
])
def test_what_is_not_read_of_a_message_is_refused_by_name(message, word):
    if word == "tool_calls|content":  # an empty object says nothing, like an empty list
        assert "tool_calls" not in read_message(**message)
        return
    with pytest.raises(DataError, match="d:1: .*" + word):
        read_message(**message)


def test_null_equals_absent_in_messages_calls_and_tools():
    nulls = dict.fromkeys(("name", "tool_calls", "tool_call_id", "reasoning_content", "weight", "function_call",
                           "audio"))
    assert read_message(content="a", **nulls) == {"role": "assistant", "content": "a"}
    call = read_message(content="", **a_call({}, id=None, index=None))["tool_calls"][0]
    assert call == {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {"messages": [{**USER, **nulls}, ANSWER], "functions": None}
    for tools in (None, [], "[]", "null"):
        assert data.example_from_record({**row, "tools": tools}, "d").tools == ()
    schema = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"default": None}}}}
    found = data.example_from_record({**row, "tools": [{"type": "function", "function": {**schema, "strict": None}}]},
                                     "d")
    assert found.tools == ({"type": "function", "function": schema},)
    for tools, word in ((3, "tools is 3"), ([3], "tools is"), ([{"type": "function"}], "no function's name"),
                        ("[", "valid JSON"),
                        ([{"function": "f"}], "no function's name")):
        with pytest.raises(DataError, match=word):
            data.example_from_record({**row, "tools": tools}, "d")


def test_hugging_face_rows_lose_what_the_library_fills_in(tmp_path):
    datasets = pytest.importorskip("datasets")
    tools = [{"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
             for name in ("f", "g")]
    rows = [{"messages": [USER, {**ANSWER, "content": None, "tool_calls": [
        {"type": "function", "function": {"name": tool["function"]["name"], "arguments": {
            tool["function"]["name"]: "x"}}}]}],
        "tools": [tool], "note": None} for tool in tools]
    rows.append({"messages": [USER, ANSWER], "tools": None, "note": None})
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    examples, said = quiet(data.load_examples, {"kind": "datasets", "path": str(tmp_path / "set")})
    assert not said
    for example, row in zip(examples, rows):
        assert example.tools == tuple(row["tools"] or ())
        assert example.messages == (USER,) and example.reply[0]["content"] == row["messages"][-1]["content"]
        calls = row["messages"][-1].get("tool_calls")
        assert example.reply[0].get("tool_calls") == calls


def test_questions_are_compared_whatever_their_layout():
    rows = [ROWS[name] for name in ("completion", "completion_messages", "messages", "sharegpt", "alpaca",
                                    "preference")]
    read = [data.example_from_record(row, f"d:{n}") for n, row in enumerate(rows)]
    other = Example(prompt="other", completion="a")
    assert data.without_overlap([*read, other], [read[0]]) == ([other], 6)
    said = data.example_from_record({"messages": [USER, ANSWER, {"role": "user", "content": "r"}, ANSWER]}, "d")
    assert data.without_overlap([said, other], [read[0]], "last")[1] == 0
    assert data.without_overlap([said, other], [read[0]], "all")[1] == 1, "its answer would be learned"


# -- whatever a file holds -------------------------------------------------------------------------

VALID = [line for line in CASES["lines"].values()] + list(ROWS.values())
junk = st.recursive(st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.sampled_from(
    ["", "x", "user", "assistant", "{}", "[1]", "text"]), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "function", "name", "arguments", "x"]),
        inner,
        max_size=3), max_leaves=8)


def with_junk(value, draw):
    """``value`` with one part, at some depth, replaced by junk."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        made = dict(value) if isinstance(value, dict) else list(value)
        made[key] = with_junk(value[key], draw)
        return made
    return draw(junk)


@settings(max_examples=400)
@given(st.sampled_from(VALID), st.data())
def test_a_damaged_row_is_read_or_refused_with_its_place(row, drawn):
    damaged = with_junk(row, drawn.draw)
    tokenizer = tokenizer_of("byte_level", "chatml")
    try:
        found = data.example_from_record(damaged, "d.jsonl:7")
    except DataError as error:
        assert str(error).startswith("d.jsonl:7: ")
        return
    for example in [found.chosen_example, found.rejected_example] if isinstance(found, Preference) else [found]:
        assert isinstance(example.completion, str) and isinstance(example.question, str)
        for one in data.encode_example(example, tokenizer, data.make_template("chat", tokenizer), "all"):
            assert (one.labels[one.labels != IGNORE] == one.ids[one.labels != IGNORE]).all()


def test_an_array_in_a_file_of_lines_is_explained_and_read_as_json(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([ROWS["alpaca"]] * 2, indent=1))
    with pytest.raises(DataError, match="use kind: json"):
        data.load_examples(str(tmp_path / "d.json"))
    assert len(data.load_examples({"kind": "json", "path": str(tmp_path / "d.json")})) == 2
