"""What of a conversation is learned: turns, weights, ends of turns, borders of tokens; what is said of the data."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from colora_ms.errors import ConfigError, DataError
from colora_ms.training import data
from colora_ms.training.data import IGNORE, Example, TextTemplate
from test_training_layouts import TEMPLATES, tokenizer_of

KINDS = ["byte_level", "sentencepiece"]


def said(*texts, **more):
    """An example of user and assistant in turn; ``m1={...}`` are further fields of message 1."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text, **more.get(f"m{n}", {})}
             for n, text in enumerate(texts)]
    return Example(messages=turns[:-1], answer=turns[-1:], id="e")


def learned(example, tokenizer, loss="last", template=None):
    """The learned stretches of an example as texts, one list a text that is trained on."""
    found = []
    for one in data.encode_example(example, tokenizer, template or data.make_template("chat", tokenizer), loss):
        mask = np.append(one.labels != IGNORE, False)
        edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0))
        assert (one.labels[mask[:-1]] == one.ids[mask[:-1]]).all()
        found.append([tokenizer.decode(one.ids[a:b].tolist(), skip_special_tokens=False)
                      for a, b in zip(edges[::2], edges[1::2])])
    return found


@pytest.mark.parametrize("template, end", [
    ("chatml", "<|im_end|>"), ("llama31", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>"),
    ("qwen25", "<|im_end|>"), ("chatml_generation", "<|im_end|>")])
def test_an_answer_ends_with_what_the_template_writes_and_nothing_else(template, end):
    tokenizer = tokenizer_of("byte_level", template)
    example = said("2 + 2?", "4", "3 + 3?", "six é")
    assert learned(example, tokenizer) == [["six é" + end]]
    assert learned(example, tokenizer, "all") == [["4" + end, "six é" + end]]
    assert end == "</s>" or tokenizer.eos_token_id not in data.encode_example(
        example, tokenizer, data.make_template("chat", tokenizer))[0].labels


def test_a_turn_whose_end_is_no_special_token_keeps_its_white_space_and_that_is_said():
    tokenizer = tokenizer_of("byte_level", "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n\n{% endfor %}"
                             "{% if add_generation_prompt %}[assistant]{% endif %}")
    assert learned(said("q", "a", "r", "b\n"), tokenizer, "all") == [[" a\n\n", " b\n\n\n"]]
    encoded = data.encode_examples([said("q", "a")], tokenizer, data.make_template("chat", tokenizer), 99)
    assert any("is no special token" in text for text in encoded.warnings())
    closed = tokenizer_of("byte_level", "chatml")
    assert data.encode_examples([said("q", "a")], closed, data.make_template("chat", closed), 99).warnings() == []


def test_weights_say_which_turns_carry_a_loss():
    tokenizer = tokenizer_of("byte_level", "chatml")
    chat = data.make_template("chat", tokenizer)
    no, yes = {"weight": 0}, {"weight": 1}
    assert learned(said("q", "a", "r", "b", m1=no, m3=yes), tokenizer, "all") == [["b<|im_end|>"]]
    assert learned(said("q", "a", "r", "b", m3=no), tokenizer, "all") == [["a<|im_end|>"]]
    assert learned(said("q", "a", "r", "b", m3=no), tokenizer) == []
    blocks = tokenizer_of("byte_level", "chatml_generation")
    assert learned(said("q", "a", "r", "b", m1=no), blocks, "all") == [["b<|im_end|>"]]
    assert learned(said("q", "a", "r", "b", m3=no), blocks) == []
    plain = Example(prompt="q", answer=[{"role": "assistant", "content": "a", "weight": 0}])
    assert data.encode_example(plain, tokenizer, TextTemplate()) == []
    same = [data.encode_example(said("q", "a", m1=extra), tokenizer, chat)[0].ids.tolist() for extra in ({}, yes)]
    assert same[0] == same[1], "the template does not see the weight"
    encoded = data.encode_examples([said("q", "a"), said("q", "b", m1=no)], tokenizer, chat, 99)
    assert len(encoded) == 1 and encoded.unlearned == ["e"] and "left out 1 without a loss" in encoded.summary()
    with pytest.raises(DataError, match="none of the 1 examples carries a loss"):
        data.encode_examples([said("q", "b", m1=no)], tokenizer, chat, 99)


def test_templates_that_drop_earlier_reasoning_give_one_example_a_turn():
    tokenizer = tokenizer_of("byte_level", "qwen3")
    thought = {"reasoning_content": "hm"}
    example = said("q", "a", "r", "b", m1=thought, m3=thought)
    assert learned(example, tokenizer) == [["<think>\nhm\n</think>\n\nb<|im_end|>"]]
    assert learned(example, tokenizer, "all") == [["<think>\nhm\n</think>\n\na<|im_end|>"],
                                                  ["<think>\nhm\n</think>\n\nb<|im_end|>"]]
    encoded = data.encode_examples([example], tokenizer, data.make_template("chat", tokenizer), 999, loss="all")
    assert [item.index for item in encoded.items] == [0, 0] and encoded.warnings() == []
    kept = tokenizer_of("byte_level", "chatml_generation")
    assert len(learned(example, kept, "all")) == 1 and len(learned(example, kept, "all")[0]) == 2


def test_a_conversation_that_the_assistant_opens_has_no_loss_on_the_opening():
    tokenizer = tokenizer_of("byte_level", "chatml")
    example = Example(messages=[{"role": "assistant", "content": "hello"}, {"role": "user", "content": "q"}],
                      completion="a")
    assert learned(example, tokenizer, "all") == [["a<|im_end|>"]]


def test_an_answer_of_several_messages_is_learned_but_for_what_the_tools_say():
    tokenizer = tokenizer_of("byte_level", "qwen25")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    example = Example(prompt="q", answer=[call, {"role": "tool", "content": "21"},
                                          {"role": "assistant", "content": "a"}])
    assert learned(example, tokenizer) == [['<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
                                            "a<|im_end|>"]]
    assert example.completion == "a"
    for bad, word in (([{"role": "tool", "content": "x"}], "begin with an assistant"),
                      ([call, {"role": "tool", "content": "x"}],
                      "end with an assistant"), ([], "the answer is")):
        with pytest.raises(DataError, match=word):
            Example(prompt="q", answer=bad)
    with pytest.raises(DataError, match="but the answer's last message says 'a'"):
        dataclasses.replace(example, completion="b")


def test_generation_prompts_that_open_a_thought_are_said():
    source = ("{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
              "{% if add_generation_prompt %}<assistant><think>\n{% endif %}")
    tokenizer = tokenizer_of("byte_level", source)
    assert learned(said("q", "<think>x</think>a"), tokenizer) == [["a</s>"]]
    encoded = data.encode_examples([said("q", "a")], tokenizer, data.make_template("chat", tokenizer), 99)
    assert "in 1 examples the chat template opens the assistant's turn with more" in encoded.warnings()[0]
    assert encoded.report()["notes"] == encoded.warnings()
    source = "{% for m in messages %}{{ messages | length }}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError, match="example e: the chat template writes the conversation before message 1 diff"):
        learned(said("q", "a"), tokenizer_of("byte_level", source))


def test_fields_that_the_template_does_not_write_are_named():
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    example = dataclasses.replace(said("q", "a", m1={"reasoning_content": "hm", **call}), tools=tools)
    for template, unwritten in (("chatml", {"reasoning_content", "tool_calls", "tools"}),
                                ("qwen25", {"reasoning_content"}),
                                ("qwen3", set()), ("chatml_generation", {"tools"})):
        tokenizer = tokenizer_of("byte_level", template)
        encoded = data.encode_examples([example] * 3, tokenizer, data.make_template("chat", tokenizer), 999)
        assert {text.split("does not write ")[1].split(",")[0] for text in encoded.warnings()} == unwritten
        assert len(encoded.warnings()) == len(unwritten)


def test_developers_speak_as_system_where_the_template_does_not_know_them():
    example = Example(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "q"}],
                      completion="a")
    for template, header in (("chatml", "<|im_start|>developer\n"), ("qwen25", "<|im_start|>system\n")):
        tokenizer = tokenizer_of("byte_level", template)
        assert header + "be brief" in data.make_template("chat", tokenizer, system="unused").prompt(example)


def test_a_plain_template_refuses_what_it_has_no_place_for():
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for example, word in ((said("q", "a", m1=call), "tool_calls"),
                          (said("q", "a", m1={"reasoning_content": "x"}), "reasoning"),
                          (dataclasses.replace(said("q", "a"), tools=[{"name": "f"}]), "tools"),
                          (said("q", "a", m0={"name": "Ann"}), "name"), (said("q", "a", "r", "b"), "3 messages")):
        with pytest.raises(DataError, match=f"example e: .*cannot render.*{word}.*template: chat"):
            TextTemplate().renderings(example)


@pytest.mark.parametrize("source, text", [
    ("{{ m['content'] + '</s>' }}", "</s>"),  # fails on None
    ("{{ m.content }}</s>", "</s>"),  # would write None
    ("{% if m.content is none %}call{% else %}{{ m.content }}{% endif %}</s>", "call</s>")])
def test_a_call_without_text(source, text):
    tokenizer = tokenizer_of("byte_level", "{% for m in messages %}" + source + "{% endfor %}")
    example = Example(prompt="q", answer=[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}])
    assert example.completion == "" and example.reply[0]["content"] is None
    assert data.make_template("chat", tokenizer).answer(example) == text


# -- one rule for all texts ------------------------------------------------------------------------


def test_the_answer_behind_a_blank_is_learned_as_the_joint_text_has_it(shared):
    from colora_ms.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "data" / "stories260k"))
    example, template = Example(prompt="Question: which one?", completion="the adapter"), TextTemplate()
    (made,) = data.encode_example(example, tokenizer, template)
    assert made.ids.tolist() == tokenizer.encode("Question: which one?\nAnswer: the adapter") + [tokenizer.eos_token_id]
    pieces = [tokenizer.backend.id_to_token(int(index)) for index in made.labels if index != IGNORE]
    assert pieces[0] == "▁the" and "".join(pieces) == "▁the▁adapter</s>" and made.spanning == ""


def test_tokens_that_span_the_border_are_said_above_one_percent():
    tokenizer = tokenizer_of("byte_level")
    template = TextTemplate("{prompt}{completion}")
    good, bad = Example(prompt="a", completion=" the", id="g"), Example(prompt="the litt", completion="le girl", id="b")
    (made,) = data.encode_example(bad, tokenizer, template)
    first = tokenizer.decode([int(made.labels[made.labels != IGNORE][0])])
    assert made.spanning and first in " little" and not "le girl".startswith(first)
    encoded = data.encode_examples([bad] + [good] * 98, tokenizer, template, 99)
    assert encoded.spanning == encoded.report()["spanning"] == 1
    (text,) = encoded.warnings()
    assert "in 1 of 99 examples one token holds the end of the prompt" in text and "the litt" in text
    assert "at the beginning of the answer" in text
    assert data.encode_examples([bad] + [good] * 99, tokenizer, template, 99).warnings() == []


def test_long_documents_are_skipped_refused_or_cut_into_windows():
    tokenizer = tokenizer_of("byte_level")
    text = "the little girl named Lily said: the little dog is here " * 5
    documents = [Example(text=text, id="long"), Example(text="short", id="short"),
                 Example(prompt=text, completion="x", id="asked")]
    whole = data.encode_example(documents[0], tokenizer, TextTemplate())[0].ids
    encoded = data.encode_examples(documents, tokenizer, TextTemplate(), 16)
    assert encoded.skipped == ["long", "asked"] and len(encoded) == 1
    encoded = data.encode_examples(documents, tokenizer, TextTemplate(), 16, on_long="windows")
    cut = [item for item in encoded.items if item.index == 0]
    assert encoded.skipped == ["asked"] and all(2 <= len(item) <= 16 for item in cut)
    predicted = np.concatenate([item.labels[1:] for item in cut])
    assert predicted.tolist() == whole[1:].tolist(), "every token but the first is predicted once"
    with pytest.raises(DataError, match="example long has"):
        data.encode_examples(documents, tokenizer, TextTemplate(), 16, on_long="error")
    with pytest.raises(ConfigError, match="loss is 'first', expected one of last, all"):
        data.encode_examples(documents, tokenizer, TextTemplate(), 16, loss="first")


# -- properties ------------------------------------------------------------------------------------

words = st.text("aelt hi\n.é<", min_size=1, max_size=14).filter(str.strip)
fields = st.fixed_dictionaries({}, optional={
    "reasoning_content": words, "weight": st.integers(0, 1), "tool_calls": st.just(
        [{"type": "function", "function": {"name": "f", "arguments": {"x": "<é>"}}}])})


@st.composite
def conversations(draw):
    turns = draw(st.lists(st.tuples(words, words, fields), min_size=1, max_size=4))
    found = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for question, answer, more in turns:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return Example(messages=found[:-1], answer=found[-1:], id="e")


@settings(max_examples=60)
@given(conversations(), st.sampled_from(TEMPLATES), st.sampled_from(KINDS), st.sampled_from(["last", "all"]))
def test_ids_are_the_rendering_and_labels_lie_in_answers(example, template, kind, loss):
    tokenizer = tokenizer_of(kind, template)
    chat = data.make_template("chat", tokenizer)
    whole = [*example.messages, *example.reply]
    weighted = [k for k, item in enumerate(whole) if item["role"] == "assistant" and item.get("weight", 1)
                and (loss == "all" or k == len(whole) - 1)]
    try:
        text = chat.render(whole)
    except DataError:
        if weighted:
            with pytest.raises(DataError):
                data.encode_example(example, tokenizer, chat, loss)
        return
    found = data.encode_example(example, tokenizer, chat, loss)
    assert bool(found) == bool(weighted)
    rendered = {tuple(tokenizer.encode(chat.render(whole[:k + 1]), add_special_tokens=False)): k
                for k in range(1, len(whole))}
    for one in found:
        ids, mask = one.ids.tolist(), one.labels != IGNORE
        assert tuple(ids) in rendered
        assert len(found) > 1 or ids == tokenizer.encode(text, add_special_tokens=False)
        assert (one.labels[mask] == one.ids[mask]).all() and mask.any() and not mask[0]
    if len(found) > 1:
        assert [rendered[tuple(one.ids.tolist())] for one in found] == weighted
    elif found:
        # A stretch for every turn: white space or a header stands between them.
        assert np.sum(np.diff(np.append(mask, False).astype(int)) == -1) == len(weighted) or "mistral" in template


@settings(max_examples=60)
@given(conversations(), st.sampled_from(TEMPLATES), st.sampled_from(KINDS), st.data())
def test_a_shorter_conversation_has_the_same_ids_where_prefixes_agree(example, template, kind, drawn):
    tokenizer = tokenizer_of(kind, template)
    chat = data.make_template("chat", tokenizer)
    whole = [*example.messages, *example.reply]
    ends = [k for k, item in enumerate(whole) if item["role"] == "assistant"]
    k = drawn.draw(st.sampled_from(ends))
    try:
        text, part = chat.render(whole), chat.render(whole[:k + 1])
    except DataError:
        return
    if not text.startswith(part):
        assert template == "qwen3"
        return
    short = Example(messages=whole[:k], answer=whole[k:k + 1], id="e")
    made = [data.encode_example(one, tokenizer, chat, "all") for one in (short, example)]
    if [len(one) for one in made] == [1, 1]:
        (few,), (many,) = made
        edge = len(few.ids) - 1  # what follows may join the last token
        assert few.ids[:edge].tolist() == many.ids[:edge].tolist()
        assert few.labels[:edge].tolist() == many.labels[:edge].tolist()


@settings(max_examples=80)
@given(words, words, st.sampled_from(["{prompt}{completion}", "{prompt}\nA: {completion}",
                                      "Q {prompt} A:{completion}"]),
       st.sampled_from(KINDS))
def test_plain_texts_are_trained_as_the_joint_text_is_encoded(prompt, completion, form, kind):
    tokenizer, template = tokenizer_of(kind), TextTemplate(form)
    example = Example(prompt=prompt, completion=completion)
    (made,) = data.encode_example(example, tokenizer, template)
    text = template.prompt(example) + template.answer(example)
    assert made.ids.tolist() == tokenizer.encode(text) + [tokenizer.eos_token_id]
    mask = made.labels != IGNORE
    begin = int(mask.argmax())
    assert mask[begin:].all() and not mask[:begin].any() and begin >= 1
    _, offsets = tokenizer.encode_offsets(text)
    border = len(template.prompt(example))
    assert all(end <= border for _, end in offsets[:begin])
    assert bool(made.spanning) == bool(begin < len(offsets) and offsets[begin][0] < border)
