"""Worked examples in front of a question: never its own answer, always the same number, the same in every run."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms import cli
from colora_ms.cli import options
from colora_ms.errors import ConfigError, DataError
from colora_ms.evaluation import benchmarks
from colora_ms.evaluation.evaluate import evaluate
from colora_ms.evaluation.likelihood import ChoiceItem
from colora_ms.evaluation.shots import Shots, few_shot_choices, question_key
from colora_ms.training.templates import TextTemplate

PLAIN = TextTemplate("Question: {prompt}\nAnswer: {completion}")


def problems(count, first=0):
    return [benchmarks.Problem(f"p{i}", f"How many are {i} and {i}?", f"{i} + {i} = {2 * i}\n#### {2 * i}")
            for i in range(first, first + count)]


def shown(prompt):
    """The answers that a prompt shows."""
    return [int(part.split("\n")[0]) for part in prompt.split("#### ")[1:]]


def test_a_question_is_shown_others_in_place_of_itself():
    four = problems(4)
    template = benchmarks.FewShotTemplate(PLAIN, four, count=2)
    assert [shown(template.request(one)) for one in four] == [[2, 4], [0, 4], [0, 2], [0, 2]]
    assert shown(template.request(problems(1, 9)[0])) == [0, 2]
    assert template.check(four) == 4 and template.check(problems(5, 2)) == 2


@pytest.mark.parametrize("copy", [
    "how many are 1 and 1?", "  How many\nare  1 and\u00a01 ?", "HOW MANY ARE 1 AND 1",
    "How many are \uff11 and \uff11\uff1f",
    "How many are 1 and\u200b 1?..", "How many are 1 and 1 ?",
])
def test_near_copies_are_the_question_itself(copy):
    asked = benchmarks.Problem("copy", copy, "#### 2")
    template = benchmarks.FewShotTemplate(PLAIN, problems(4), count=2)
    assert shown(template.request(asked)) == [0, 4] and template.request(asked).endswith(f"{copy}\nAnswer:")
    # The copy may stand on the other side, too, and more than once.
    template = benchmarks.FewShotTemplate(PLAIN, [asked, *problems(3), asked], count=2)
    assert shown(template.request(problems(2)[1])) == [0, 4]


def test_other_questions_are_no_copies():
    keys = {question_key(text) for text in ("2 + 3 =", "2 - 3 =", "2 + 3", "23 +", "is it 2.3?", "is it 23?",
                                            "Is it\u00b2?")}
    assert len(keys) == 7
    assert question_key("Stra\u00dfe") == question_key("STRASSE") and question_key(" ?") == ""


def test_too_few_others_are_refused_before_anything_is_generated():
    class Never:
        def generate(self, prompts, **options):
            raise AssertionError("generated")

    three = problems(3)
    template = benchmarks.FewShotTemplate(PLAIN, three)
    assert shown(template.request(problems(1, 9)[0])) == [0, 2, 4]
    for ask in (lambda: template.request(three[1]), lambda: template.check(three),
                lambda: evaluate(Never(), [*problems(1, 9), *three], template=template)):
        with pytest.raises(DataError, match=r"example p\d stands itself among the 3 .* 3 are to be shown, and 2 are"):
            ask()
    for count in (0, -1, True, 1.5, "2"):
        with pytest.raises(ConfigError, match="at least one worked example"):
            benchmarks.FewShotTemplate(PLAIN, three, count=count)
    with pytest.raises(ConfigError, match="8 worked examples are to be shown, there are 3"):
        benchmarks.FewShotTemplate(PLAIN, three, count=8)
    with pytest.raises(ConfigError, match="at least one worked example"):
        Shots([])


def test_the_setup_tells_the_shots(tmp_path):
    class Echo:
        def generate(self, prompts, **options):
            return [SimpleNamespace(text="#### 2", tokens=(1,), records=()) for _ in prompts]

    four, path = problems(4), tmp_path / "x.jsonl"
    made = [benchmarks.FewShotTemplate(PLAIN, shots, count=count)
            for shots, count in ((four, 2), (four, 3), (four[:3], 2), (problems(4, 1), 2), (four[::-1], 2))]
    assert len({template.digest for template in made}) == len(made)
    assert benchmarks.FewShotTemplate(PLAIN, problems(4), count=2).digest == made[0].digest
    result = evaluate(Echo(), four, template=made[0], path=path)
    assert result.setup["shots"] == 2 and result.setup["of"] == 4 and result.setup["template"] == made[0].digest
    assert json.loads(path.with_suffix(".summary.json").read_text())["setup"]["shots"] == 2
    with pytest.raises(DataError, match="shots was 2, now 3"):
        evaluate(Echo(), four, template=made[1], path=path)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["{} ?", " {}", "{}", "{}!"])), min_size=1, max_size=12),
       st.integers(1, 6), st.integers(0, 7))
def test_for_any_list_the_shots_are_the_first_other_ones(pool, count, asked):
    texts = [(form.format(f"q{number}"), f"<{place}:{number}>") for place, (number, form) in enumerate(pool)]
    if count > len(pool):
        with pytest.raises(ConfigError):
            Shots(texts, count)
        return
    shots = Shots(texts, count)
    others = [text for (number, _), (_, text) in zip(pool, texts) if number != asked]
    if len(others) < count:
        with pytest.raises(DataError, match="the asked one stands itself"):
            shots.head(f"Q{asked}", "the asked one")
    else:
        assert shots.head(f"Q{asked}", "x") == shots.head(f" q{asked} .", "x") == "".join(others[:count])


# -- multiple choice -------------------------------------------------------------------------------

def choices(count):
    return [ChoiceItem(f"c{i}", f"Question: number {i}?\nAnswer:", (f" {i}", f" {i + 1}"), i % 2) for i in range(count)]


def test_multiple_choice_with_shots():
    items, own = few_shot_choices(choices(3), choices(4), 2)
    assert own == 3 and [item.id for item in items] == ["c0", "c1", "c2"]
    assert items[0].context == ("Question: number 1?\nAnswer: 2\n\nQuestion: number 2?\nAnswer: 2\n\n"
                                "Question: number 0?\nAnswer:")
    assert [item.choices for item in items] == [item.choices for item in choices(3)]
    assert few_shot_choices(choices(1), choices(9)[5:], 3)[1] == 0
    with pytest.raises(DataError, match="item c0 stands itself among the 2 worked examples, 2 are to be shown, and 1 "
                                        "are"):
        few_shot_choices(choices(2), choices(2), 2)


# -- the command line ------------------------------------------------------------------------------

@pytest.fixture
def told(monkeypatch):
    """The prompts of ``colora-ms evaluate`` with a generator that answers "#### 2"."""
    prompts = []

    class Echo:
        tokenizer = None

        def generate(self, asked, **settings):
            prompts.extend(asked)
            return [SimpleNamespace(text="#### 2", tokens=(1,), records=()) for _ in asked]

    monkeypatch.setattr(options, "generator", lambda arguments, team=None: (Echo(), None))
    monkeypatch.setattr(options, "model_hash", lambda arguments: "m")
    return prompts


def gsm8k(path, items):
    path.write_text("".join(json.dumps({"question": one.prompt, "answer": one.completion}) + "\n" for one in items))
    return str(path)


def test_gsm8k_with_the_test_file_as_shots(told, tmp_path, capsys):
    data = gsm8k(tmp_path / "four.jsonl", problems(4))
    arguments = ["evaluate", "--task", "gsm8k", "--data", data, "--shots", "2", "--shots-data", data,
                 "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(arguments) == 0
    assert [shown(prompt) for prompt in told] == [[2, 4], [0, 4], [0, 2], [0, 2]]
    out = capsys.readouterr().out
    assert "4 of 4 questions stand among the worked examples themselves" in out and "25.0 % of 4" in out
    first = list(told)
    told.clear()
    assert cli.main([*arguments[:-1], str(tmp_path / "again.jsonl")]) == 0 and told == first
    setup = json.loads((tmp_path / "out.summary.json").read_text())["setup"]
    assert setup["shots"] == 2 and setup == json.loads((tmp_path / "again.summary.json").read_text())["setup"]


def test_few_shot_mistakes_are_sentences(told, tmp_path, capsys):
    data = gsm8k(tmp_path / "two.jsonl", problems(2))
    text = tmp_path / "text.txt"
    text.write_text("a b c")
    for arguments, words in [
            (["gsm8k", "--data", data, "--shots", "2", "--shots-data", data],
             "example gsm8k-1 stands itself among the 2"),
            (["gsm8k", "--data", data, "--shots", "3", "--shots-data", data],
             "3 worked examples are to be shown, there"),
            (["gsm8k", "--data", data, "--shots", "1", "--shots-data", data, "--template", "chat"],
             "not from the chat"),
            (["perplexity", "--data", str(text), "--shots", "1", "--shots-data", data], "not for perplexity"),
            (["problems", "--data", data, "--shots", "1", "--shots-data", data], "not for problems"),
            (["choice", "--data", data, "--shots", "1"], "belong together")]:
        assert cli.main(["evaluate", "--task", *arguments]) != 0
        assert words in capsys.readouterr().err and not told


def test_choice_with_the_test_file_as_shots(told, tmp_path, capsys, monkeypatch):
    rows = [{"instruction": f"Please answer the following question with true or false, question: is {i} odd?\n\nAnswer "
             "format: true/false", "answer": "true" if i % 2 else "false"} for i in range(4)]
    data = tmp_path / "boolq.json"
    data.write_text(json.dumps(rows))
    seen = []

    def run(scorer, tokenizer, items, **settings):
        seen.extend(items)
        return SimpleNamespace(accuracy=0.5, interval=(0.0, 1.0))

    monkeypatch.setattr(benchmarks, "evaluate_choices", run)
    monkeypatch.setattr("colora_ms.evaluation.decoder_scorer.DecoderScorer", lambda decoder, slot, rows: None)
    generator = SimpleNamespace(decoder=None, tokenizer=None)
    monkeypatch.setattr(options, "generator", lambda arguments, team=None: (generator, None))
    assert cli.main(["evaluate", "--task", "choice", "--data", str(data), "--shots", "3", "--shots-data",
                     str(data)]) == 0
    assert "4 of 4 questions stand among the worked examples" in capsys.readouterr().out
    for number, item in enumerate(seen):
        assert item.context.count(f"is {number} odd?") == 1 and item.context.endswith(f"is {number} odd?\nAnswer:")
        assert item.context.count("Answer:") == 4
