"""Nothing of the training data goes in silence: messages that a template leaves out, turns without a loss, doubled
keys."""

import json

import pytest

from colora_ms.errors import DataError
from colora_ms.training import data
from colora_ms.training.data import Example
from test_training_layouts import quiet, tokenizer_of, write
from test_training_turns import learned

ONLY_TWO = ("{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n{% elif m.role == 'assistant' %}"
            "Assistant: {{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% "
            "endif %}")
CALL_OR_TEXT = ("{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
                "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")


def conversation(*turns):
    """An example of (role, content, further fields) turns whose last one is the answer."""
    said = [{"role": role, "content": content, **(more[0] if more else {})} for role, content, *more in turns]
    return Example(messages=said[:-1], answer=said[-1:], id="e")


def warnings_of(template, *examples, loss="last", system=None):
    tokenizer = tokenizer_of("byte_level", template)
    return data.encode_examples(list(examples), tokenizer, data.make_template("chat", tokenizer, system), 999,
                                loss=loss).warnings()


@pytest.mark.parametrize("content", ["SECRET", "a", "q"])  # short ones also stand elsewhere in the text
def test_messages_that_the_template_does_not_write_are_named(content):
    example = conversation(("system", content), ("user", "q"), ("assistant", "calling"), ("tool", "RESULT 42"),
                           ("assistant", "42"))
    said = warnings_of(ONLY_TWO, example, example)
    assert len(said) == 2 and all("does not write the text of a message of role" in text for text in said)
    assert "'system'" in said[0] and "'tool'" in said[1]
    assert warnings_of("chatml", example) == []
    assert "'system'" in warnings_of(ONLY_TWO, conversation(("user", "q"), ("assistant", "a")), system="MY SYSTEM")[0]


def test_a_text_beside_calls_that_the_template_leaves_out_is_named():
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    plain = conversation(("user", "q"), ("assistant", "plain"))
    both = conversation(("user", "q"), ("assistant", "Let me look it up.", call))
    said = warnings_of(CALL_OR_TEXT, plain, both)
    assert len(said) == 1 and "'assistant' beside tool_calls" in said[0]
    assert warnings_of(CALL_OR_TEXT, plain) == []
    assert not any("beside tool_calls" in text for text in warnings_of("qwen25", plain, both))


def test_turns_that_carry_no_loss_unasked_are_named():
    opening = conversation(("assistant", "Hi!"), ("user", "q"), ("assistant", "a"))
    assert warnings_of("chatml", opening) == []
    assert warnings_of("chatml", opening, loss="all") == ["an assistant's message that opens a conversation is not "
                                                          "learned"]
    silent = conversation(("user", "q"), ("assistant", " "), ("user", "r"), ("assistant", "a"))
    tokenizer = tokenizer_of("byte_level", "chatml")
    assert learned(silent, tokenizer, "all") == [["a<|im_end|>"]]
    assert warnings_of("chatml", silent, loss="all") == ["an assistant's message that says nothing is not learned"]
    weighted = conversation(("user", "q"), ("assistant", "one", {"weight": 1}), ("user", "r"), ("assistant", "two"))
    assert "of weight 1 (data.loss: all learns it) is not learned" in warnings_of("chatml", weighted)[0]
    assert warnings_of("chatml", weighted, loss="all") == []


def test_generation_blocks_hold_an_opening_turn_as_in_transformers():
    tokenizer = tokenizer_of("byte_level", "chatml_generation")
    opening = conversation(("assistant", "Hi!"), ("user", "q"), ("assistant", "a"))
    found = learned(opening, tokenizer, "all")
    assert len(found) == 1 and [text.split("<|im_end|>")[0] for text in found[0]] == ["Hi!", "a"]
    assert [text.split("<|im_end|>")[0] for text in learned(opening, tokenizer)[0]] == ["a"]


@pytest.mark.parametrize("line, words", [
    ('{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' is given twice"),
    ('{"messages": [{"role": "user", "content": "x", "content": "y"}, {"role": "assistant", "content": "z"}]}',
     "the key 'content' is given twice"),
    ('{"prompt": "a", "completion": "b", "n": ' + "1" * 5000 + "}", "d.jsonl:1: not valid JSON"),
    ('{"prompt": "a", "completion": null}', "'completion' is null, which counts as absent"),
])
def test_lines_that_python_would_take_silently_or_die_of(tmp_path, line, words):
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        data.read_jsonl(tmp_path / "d.jsonl")


@pytest.mark.parametrize("arguments, words", [('{"x": NaN}', "not valid JSON"), ('{"x": 1e400}', "not valid JSON"),
                                              ('{"a": 1, "a": 2}', "'a' is given twice")])
def test_arguments_that_are_no_json(tmp_path, arguments, words):
    call = {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    path = write(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "q"},
                                                     {"role": "assistant", "content": None, **call}]})
    with pytest.raises(DataError, match=words):
        data.read_jsonl(path)


@pytest.mark.parametrize("option, words", [
    ({"limit": "1"}, "limit '1', expected a whole number"), ({"limit": 0}, "limit 0"), ({"limit": True}, "limit True"),
    ({"limit": 1.5}, "limit 1.5"), ({"path": 5}, "path 5, expected a path"), ({"path": "a\0b"}, "expected a path"),
    ({"kind": ["jsonl"]}, "has the kind"), ({"prompt_key": ["a"]}, "expected the name of a column"),
    ({"columns": ["prmpt"]}, "'prmpt' is missing, which columns names.*Did you mean 'prompt'"),
])
def test_options_of_a_source_of_a_wrong_kind(tmp_path, option, words):
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(DataError, match=words):
        data.load_examples({"kind": "jsonl", "path": str(path), **option})


def test_pairs_that_repeat_their_prompt_do_not_double_it(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "Q: hi\nA:", "chosen": "Q: hi\nA: yes", "rejected": "Q: hi\nA: no"})
    (pair,), _ = quiet(data.read_jsonl, path)
    assert (pair.prompt, pair.chosen_example.completion,
            pair.rejected_example.completion) == ("Q: hi\nA:", " yes", " no")


def test_a_text_that_cannot_be_encoded_is_named_by_its_example(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "7", "prompt": "p", "completion": "\ud800"}) + "\n")
    (example,) = data.read_jsonl(tmp_path / "d.jsonl")
    tokenizer = tokenizer_of("byte_level", "chatml")
    with pytest.raises(DataError, match="example 7: .*unpaired surrogate"):
        data.encode_examples([example], tokenizer, data.make_template("chat", tokenizer), 99)
