"""Loaders of GSM8K and the commonsense sets, few-shot prompts, resumable multiple choice and perplexity."""

import json
import math

import pytest

from colora_ms.errors import ConfigError, DataError
from colora_ms.evaluation import benchmarks
from colora_ms.evaluation.likelihood import multiple_choice, perplexity
from colora_ms.evaluation.scoring import score_number
from colora_ms.training.templates import ChatTemplate, TextTemplate
from test_evaluation_likelihood import VOCAB, Chain

GSM8K = [
    {"question": "48 clips in April, half in May. Together?",
     "answer": "May: 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"},
    {"question": "What is 2 times 600?", "answer": "2 * 600 = <<2*600=1200>>1,200\n#### 1,200"},
]


@pytest.fixture
def gsm8k(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(map(json.dumps, GSM8K)) + "\n\n")
    return path


def test_gsm8k_problems(gsm8k):
    first, second = benchmarks.read_gsm8k(gsm8k)
    assert first.completion == "May: 48/2 = 24 clips.\nTogether 48+24 = 72.\n#### 72"
    assert first.question == GSM8K[0]["question"]
    assert len(benchmarks.read_gsm8k(gsm8k, limit=1)) == 1
    assert "<<48/2=24>>" in benchmarks.read_gsm8k(gsm8k, calculator=True)[0].completion
    assert score_number("It is 600 + 600 = 1200 in all.", second).correct
    assert not score_number("#### 12", second).correct


@pytest.mark.parametrize("line, words", [
    ("nonsense", ":1 is not a GSM8K line"), ('{"question": "q"}', ":1 is not a GSM8K line"),
    ('{"question": "q", "answer": "5"}', "no final number"), ("", "holds no GSM8K problem"),
])
def test_bad_gsm8k_files(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        benchmarks.read_gsm8k(path)


def test_few_shot_prompt(gsm8k):
    shots = benchmarks.read_gsm8k(gsm8k)
    plain = TextTemplate("Question: {prompt}\nAnswer: {completion}")
    template = benchmarks.FewShotTemplate(plain, shots[:1])
    prompt = template.request(shots[1])
    assert prompt == ("Question: 48 clips in April, half in May. Together?\nAnswer: May: 48/2 = 24 clips.\nTogether "
                      "48+24 = 72.\n#### 72\n\nQuestion: What is 2 times 600?\nAnswer:")
    assert template.answer(shots[1]) == plain.answer(shots[1])
    assert len({template.digest, plain.digest, benchmarks.FewShotTemplate(plain, shots).digest}) == 3
    assert any(stop in prompt for stop in benchmarks.FEW_SHOT_STOP)
    with pytest.raises(ConfigError, match="at least one worked example"):
        benchmarks.FewShotTemplate(plain, [])


def test_few_shot_prompts_are_plain_text(gsm8k):
    class Tokenizer:
        def apply_chat_template(self, messages, add_generation_prompt):
            return str(messages)

    with pytest.raises(ConfigError, match="not from the chat template"):
        benchmarks.FewShotTemplate(ChatTemplate(Tokenizer()), benchmarks.read_gsm8k(gsm8k))


COMMONSENSE = [
    {"instruction": "Please choose the correct answer to the question: Which unit is a mass?\n\nAnswer1: meters "
                    "Answer2: grams Answer3: Answer1: twice\n\nAnswer format: answer1/answer2/answer3", "input": "",
     "output": "the correct answer is answer2", "answer": "answer2"},
    {"instruction": "Please answer the following question with true or false, question: is ice cold?\n\nAnswer format: "
     "true/false", "input": "", "output": "the correct answer is true", "answer": "true"},
]


@pytest.fixture
def commonsense(tmp_path):
    path = tmp_path / "arc" / "test.json"
    path.parent.mkdir()
    path.write_text(json.dumps(COMMONSENSE))
    return path


def test_commonsense_items(commonsense):
    arc, boolq = benchmarks.read_commonsense(commonsense)
    assert arc.context == "Question: Which unit is a mass?\nAnswer:" and arc.id == "arc-1"
    assert arc.choices == (" meters", " grams", " Answer1: twice") and arc.answer == 1
    assert boolq.context == "Question: is ice cold?\nAnswer:"
    assert boolq.choices == (" true", " false") and boolq.answer == 0
    arc, boolq = benchmarks.read_commonsense(commonsense, "label")
    assert arc.choices[1] == " the correct answer is answer2" and arc.context == COMMONSENSE[0]["instruction"] + "\n"
    assert len(benchmarks.read_commonsense(commonsense, limit=1)) == 1
    with pytest.raises(ConfigError, match="'letter'"):
        benchmarks.read_commonsense(commonsense, "letter")


@pytest.mark.parametrize("change, words", [
    ({"answer": "answer9"}, "arc-1 has not the layout"), ({"instruction": "no format"}, "has not the layout"),
    ({"instruction": "q question: x Answer1: a Answer format: answer1/answer2"}, "2 answers are announced, 1"),
    ({"instruction": "q question: x Answer1: Answer2: b Answer format: answer1/answer2"}, "an answer is empty"),
])
def test_bad_commonsense_items(commonsense, change, words):
    commonsense.write_text(json.dumps([COMMONSENSE[0] | change]))
    with pytest.raises(DataError, match=words):
        benchmarks.read_commonsense(commonsense)


@pytest.mark.parametrize("name, count, labels", [("ARC-Easy", 2376, {3, 4, 5}), ("boolq", 3270, {2})])
def test_the_real_sets_are_read_whole(shared, name, count, labels):
    for form in ("text", "label"):
        items = benchmarks.read_commonsense(shared / "data" / name / "test.json", form)
        assert len(items) == count and {len(item.choices) for item in items} == labels
        assert not any("Answer format" in text for item in items for text in item.choices)


def test_the_real_gsm8k_is_read_whole(shared):
    problems = benchmarks.read_gsm8k(shared / "data" / "gsm8k" / "test.jsonl")
    assert len(problems) == 1319 and not any("<<" in problem.completion for problem in problems)
    assert all(score_number(problem.completion, problem).correct for problem in problems)


class Letters:
    """Ids by letter."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) % VOCAB for c in text]


def test_choices_resume(tmp_path, commonsense):
    items = benchmarks.read_commonsense(commonsense)
    chain, path = Chain(), tmp_path / "out.jsonl"
    whole = benchmarks.evaluate_choices(chain, Letters(), items, path=path, normalise="byte")
    direct = multiple_choice(chain, Letters(), items, "byte")
    assert whole.outcomes == direct.outcomes and whole.interval == direct.interval
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])  # the second item was being written
    chain.calls.clear()
    again = benchmarks.evaluate_choices(chain, Letters(), items, path=path, normalise="byte")
    assert again == whole and sum(map(len, chain.calls)) == 2
    assert json.loads(path.with_suffix(".summary.json").read_text())["items"] == 2
    with pytest.raises(DataError, match="another setup"):
        benchmarks.evaluate_choices(chain, Letters(), items, path=path, normalise="token")
    with pytest.raises(DataError, match="same id"):
        benchmarks.evaluate_choices(chain, Letters(), items * 2)


def test_perplexity_resumes(tmp_path):
    text, chain, path = "the cat sat on the mat and the dog sat on the cat " * 3, Chain(), tmp_path / "ppl.jsonl"
    options = dict(window=20, stride=8, path=path)
    whole = benchmarks.evaluate_perplexity(chain, Letters(), text, **options)
    direct = perplexity(chain, Letters().encode(text), 20, 8)
    assert (whole.perplexity, whole.tokens) == (direct.perplexity, direct.tokens)
    assert whole.word_perplexity == pytest.approx(math.exp(direct.loss * direct.tokens / 39))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:6]) + "\n")
    chain.calls.clear()
    assert benchmarks.evaluate_perplexity(chain, Letters(), text, **options) == whole
    assert len(chain.calls) == len(lines) - 6
    with pytest.raises(DataError, match="another setup"):
        benchmarks.evaluate_perplexity(chain, Letters(), text[:-9], **options)
    with pytest.raises(DataError, match="cannot read"):
        benchmarks.read_text(tmp_path / "nothing.txt")


def test_json_arrays_are_a_training_source(commonsense):
    from colora_ms.training.sources import load_examples

    source = {"kind": "json", "path": str(commonsense), "prompt_key": "instruction", "completion_key": "output"}
    examples = load_examples(source)
    assert [e.completion for e in examples] == ["the correct answer is answer2", "the correct answer is true"]
    assert len(load_examples(source | {"limit": 1})) == 1
    with pytest.raises(DataError, match="'completion' is missing"):
        load_examples(source | {"completion_key": "completion"})
    commonsense.write_text("{}")
    with pytest.raises(DataError, match="no JSON array"):
        load_examples(source)
