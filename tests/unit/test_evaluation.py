"""Scoring, intervals, paired tests, and the resumable evaluation loop."""

import json
import math
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms.errors import ConfigError, DataError, DecodingError
from colora_ms.evaluation import scoring
from colora_ms.evaluation.evaluate import EvaluationResult, evaluate, file_digest
from colora_ms.evaluation.significance import mcnemar, wilson_interval

# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("She has 9 eggs.\n#### 18", 18),
    ("#### 1,234,567", 1234567),
    ("#### $70,000", 70000),
    ("#### -5", -5),
    ("#### \u22125", -5),
    ("#### $-5.50", Fraction(-11, 2)),
    ("#### -$5.50", Fraction(-11, 2)),
    ("#### 18 dollars\n#### 20", 18),
    ("#### 18\nQuestion: 7 and 8", 18),
    ("####18.", 18),
    ("#### 3/4", Fraction(3, 4)),
    ("#### .5", Fraction(1, 2)),
    ("#### about 12 apples", 12),
    ("#### none\n5", None),
    ("The answer is 42.", 42),
    ("The answer is 42.0.", 42),
    ("It costs $1,200.50 in total.", Fraction(2401, 2)),
    ("That leaves 16-3=13", 13),
    ("16 - 3", 3),
    ("so x = -3", -3),
    ("the result is (-3)", -3),
    ("between 3-5", 5),
    ("50%", 50),
    ("he gets 1/3", Fraction(1, 3)),
    ("1/0", 1),
    ("on 12/31/2024", 2024),
    ("He drives 20km/h", 20),
    ("1,2,3", 3),
    ("12,34", 34),
    ("1,234,56", 56),
    ("no number", None),
    ("", None),
    ("minus", None),
    ("- 7", -7),
    ("the answer - 7", 7),
    ("the answer is -7", -7),
    ("x = - 7", -7),
    ("10% - 3", 3),
    ("(5) -3", 3),
    ("x-3", 3),
    ("$-0.25", Fraction(-1, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("1,000/4", 250),
    ("007", 7),
])
def test_extract_number(text, expected):
    assert scoring.extract_number(text) == expected


def test_extract_number_survives_endless_digits():
    assert scoring.extract_number("1" * 100000) is not None
    assert scoring.extract_number("0." + "3" * 100000) is not None
    assert scoring.extract_number("1/" + "7" * 100000) is not None
    assert scoring.extract_number("1," * 20000 + "5") == 5


@settings(max_examples=200, deadline=None)
@given(st.integers(-10**12, 10**12), st.sampled_from(["{}", "${}", "{} apples", "{}.", "= {}"]))
def test_any_integer_is_read_back_with_and_without_commas(value, form):
    for text in (str(value), f"{value:,}"):
        if form == "${}" and value < 0:
            text = "-$" + text[1:]
            assert scoring.extract_number("#### " + text) == value
            continue
        assert scoring.extract_number("#### " + form.format(text)) == value
        assert scoring.extract_number("first 3, then " + form.format(text)) == value


@settings(max_examples=100, deadline=None)
@given(st.decimals(-10**6, 10**6, places=3))
def test_format_number_is_read_back(value):
    value = Fraction(value)
    assert scoring.extract_number("#### " + scoring.format_number(value)) == value


def test_format_number():
    shown = [scoring.format_number(Fraction(*pair)) for pair in
             [(12, 1), (-1, 2), (1, 3), (1, 1000), (-7, 4)]]
    assert shown == ["12", "-0.5", "1/3", "0.001", "-1.75"]
    assert scoring.format_number(None) == ""


def gold(completion):
    return SimpleNamespace(completion=completion)


def test_scorers():
    score = scoring.scorer("number")("so 3 * 6 = $18.00", gold("... #### 18"))
    assert (score.correct, score.predicted, score.expected) == (True, "18", "18")
    assert not scoring.score_number("no idea", gold("no number either")).correct
    assert scoring.score_exact(" abc\n", gold("abc")).correct
    assert not scoring.score_exact("Abc", gold("abc")).correct
    assert scoring.score_normalised(' "The  Answer." ', gold("the answer")).correct
    assert not scoring.score_normalised("", gold("x")).correct
    assert not scoring.score_normalised(".", gold(".")).correct
    assert scoring.scorer(scoring.score_exact) is scoring.score_exact
    with pytest.raises(ConfigError, match="Did you mean 'number'"):
        scoring.scorer("numbers")


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct, total", [(0, 10), (10, 10), (5, 10), (37, 100), (1, 1319)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_interval_equals_scipy(correct, total, confidence):
    stats = pytest.importorskip("scipy.stats")
    want = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, total, confidence) == pytest.approx((want.low, want.high),
                                                                        abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
       st.floats(0.5, 0.999))
def test_wilson_bounds_solve_the_score_equation(pair, confidence):
    from statistics import NormalDist
    correct, total = pair
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = wilson_interval(correct, total, confidence)
    p = correct / total
    assert 0 <= low <= p <= high <= 1
    for bound in (low, high):  # |p - bound| = z * sqrt(bound (1 - bound) / n)
        assert abs(p - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / total), abs=1e-9)


def test_wilson_refuses():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for arguments in ((3, 2), (-1, 2), (1, 2, 1.0), (1, 2, 0)):
        with pytest.raises(ConfigError):
            wilson_interval(*arguments)


@pytest.mark.parametrize("b, c", [(0, 0), (0, 1), (1, 0), (5, 6), (4, 10), (0, 20), (7, 7),
                                  (12, 30), (600, 650), (0, 1200)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    stats = pytest.importorskip("scipy.stats")
    first = [True] * b + [False] * c + [True, False]
    second = [False] * b + [True] * c + [True, False]
    test = mcnemar(first, second)
    assert (test.both, test.first_only, test.second_only, test.neither) == (1, b, c, 1)
    want = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert test.p_value == pytest.approx(want, rel=1e-9)
    assert test.difference == pytest.approx((c - b) / (b + c + 2))
    assert mcnemar(second, first).p_value == test.p_value
    assert f"{c} fixed, {b} broken" in test.summary()


def test_mcnemar_refuses_other_items():
    with pytest.raises(DataError, match="3 and 2 outcomes"):
        mcnemar([True] * 3, [True] * 2)
    with pytest.raises(DataError, match="2 stand in one result only, for example a, b"):
        mcnemar({"a": True}, {"b": True})
    with pytest.raises(DataError, match="at least one"):
        mcnemar([], [])
    with pytest.raises(DataError, match="two dictionaries or two lists"):
        mcnemar({"a": True}, [True])


# -- the loop --------------------------------------------------------------------------------------


class Template:
    digest = "t1"

    def request(self, example):
        return "Q " + example.id


class Calculator:
    """Answers "Q n" with n + 1, wrongly for multiples of 4; refuses what it is told to."""

    def __init__(self, refuse=(), stop_after=None):
        self.calls, self.refuse, self.stop_after = [], set(refuse), stop_after

    def generate(self, prompts, **options):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((list(prompts), options))
        for prompt in prompts:
            if prompt in self.refuse:
                raise DecodingError(f"the prompt {prompt!r} is too long")
        numbers = [int(prompt.split()[1]) for prompt in prompts]
        return [SimpleNamespace(text=f"#### {n + 1 if n % 4 else n}", tokens=[1, 2, 3],
                                records=[{"token": 1}]) for n in numbers]


def examples_of(count):
    return [SimpleNamespace(id=str(n), completion=f"#### {n + 1}", question=str(n))
            for n in range(count)]


def test_speed_leaves_out_the_batches_that_compile(monkeypatch):
    compiled = []
    monkeypatch.setattr("colora_ms.evaluation.evaluate.all_compilations", lambda: len(compiled))

    class Compiles(Calculator):
        def generate(self, prompts, **options):
            if not self.calls or len(prompts) == 2:
                compiled.append(len(prompts))
                time.sleep(0.2)
            time.sleep(0.001)
            return super().generate(prompts, **options)

    result = evaluate(Compiles(), examples_of(10), "number", template=Template(), batch_size=4)
    assert compiled == [4, 2]
    assert result.tokens_per_second > 4 * 3 / 0.1


def test_evaluate_scores_and_writes(tmp_path):
    seen = []
    generator = Calculator()
    path = tmp_path / "deep" / "items.jsonl"
    result = evaluate(generator, examples_of(10), "number", template=Template(), path=path,
                      batch_size=4, options={"adapter": "a", "max_new_tokens": 5},
                      model_hash="m", adapter_hash="h", keep_records=True,
                      progress=lambda *state: seen.append(state))
    assert isinstance(result, EvaluationResult)
    assert result.accuracy == 0.7 and result.refused == 0
    assert result.interval == wilson_interval(7, 10)
    assert [item["id"] for item in result.items] == [str(n) for n in range(10)]
    assert [len(prompts) for prompts, _ in generator.calls] == [4, 4, 2]
    assert generator.calls[0][1] == {"adapter": "a", "max_new_tokens": 5}
    assert [state[:2] for state in seen] == [(4, 10), (8, 10), (10, 10)]
    assert seen[-1][2] == 7 and result.tokens_per_second > 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["setup"]["template"] == "t1" and lines[0]["setup"]["adapter"] == "h"
    assert len(lines) == 11 and lines[1]["records"] == [{"token": 1}]
    summary = json.loads((tmp_path / "deep" / "items.summary.json").read_text())
    assert summary["accuracy"] == 0.7 and summary["items"] == 10 and summary["mean_tokens"] == 3
    assert summary["setup"] == lines[0]["setup"]
    assert "70.0 % of 10" in result.summary()


def test_evaluate_resumes_and_cuts_half_a_line(tmp_path):
    path = tmp_path / "items.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Calculator(stop_after=2), examples_of(10), template=Template(), path=path,
                 batch_size=3)
    assert len(path.read_text().splitlines()) == 7
    with open(path, "a") as handle:
        handle.write('{"id": "6", "corr')
    generator = Calculator()
    result = evaluate(generator, examples_of(10), template=Template(), path=path, batch_size=3)
    assert [prompt for prompts, _ in generator.calls for prompt in prompts] == \
        [f"Q {n}" for n in range(6, 10)]
    fresh = evaluate(Calculator(), examples_of(10), template=Template(), batch_size=3)
    assert result.outcomes == fresh.outcomes
    assert len(path.read_text().splitlines()) == 11
    again = Calculator()
    assert evaluate(again, examples_of(10), template=Template(), path=path).accuracy == 0.7
    assert again.calls == []


def test_evaluate_refuses_a_file_of_another_setup(tmp_path):
    path = tmp_path / "items.jsonl"
    evaluate(Calculator(), examples_of(4), template=Template(), path=path)
    before = path.read_bytes()
    for change, word in [({"adapter_hash": "x"}, "adapter was '', now 'x'"),
                         ({"options": {"beta": 1.0}}, "options was"),
                         ({"scorer": "exact"}, "scorer was 'number', now 'exact'")]:
        with pytest.raises(DataError, match=word):
            evaluate(Calculator(), examples_of(4), template=Template(), path=path, **change)
    with pytest.raises(DataError, match="examples was"):
        evaluate(Calculator(), examples_of(5), template=Template(), path=path)
    assert path.read_bytes() == before
    evaluate(Calculator(), examples_of(5), template=Template(), path=path, resume=False)
    path.write_text("hello\n")
    with pytest.raises(DataError, match="not an evaluation of this package"):
        evaluate(Calculator(), examples_of(4), template=Template(), path=path)
    assert path.read_text() == "hello\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the evaluation"):
        evaluate(Calculator(), examples_of(4), template=Template(), path=tmp_path / "file" / "x")


def test_evaluate_counts_refused_prompts_as_wrong():
    result = evaluate(Calculator(refuse={"Q 5"}), examples_of(8), template=Template(), batch_size=4)
    assert result.refused == 1 and not result.outcomes["5"]
    assert "too long" in result.items[5]["refused"] and "1 refused" in result.summary()
    assert [result.outcomes[str(n)] for n in (4, 6, 7)] == [False, True, True]
    with pytest.raises(DecodingError, match="too long"):
        evaluate(Calculator(refuse={f"Q {n}" for n in range(8)}), examples_of(8),
                 template=Template(), batch_size=4)


def test_refused_items_are_told_and_do_not_shorten_the_answers(tmp_path, capsys):
    path = tmp_path / "items.jsonl"
    result = evaluate(Calculator(refuse={"Q 5", "Q 6"}), examples_of(8), template=Template(), batch_size=4, path=path)
    assert "2 refused and counted as wrong (the first is 5: the prompt 'Q 5' is too long)" in result.summary()
    assert result.mean_tokens == 3 and result.to_json()["mean_tokens"] == 3
    summary = json.loads(path.with_suffix(".summary.json").read_text())
    assert summary["refused"] == 2 and summary["items"] == 8 and summary["mean_tokens"] == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [row["id"] for row in rows if "refused" in row] == ["5", "6"]
    # A resumed run tells the same.
    again = evaluate(Calculator(), examples_of(8), template=Template(), batch_size=4, path=path)
    assert again.summary().split("tokens/s")[1] == result.summary().split("tokens/s")[1] and again.refused == 2


def test_tokens_and_changes_are_counted_as_the_generator_gives_them():
    """What a stop string cuts off is not there any more: tokens and records are taken as they come, the text is not
    counted."""
    def record(changed):
        return SimpleNamespace(changed=changed)

    answers = {"Q 0": ("1", [5, 6], [record(True), record(False)]),
               "Q 1": ("a long text of many words", [7], [record(True)]),
               "Q 2": ("", [], []), "Q 3": ("4", [1, 2, 3, 4, 2], [record(False)] * 5)}

    class Cut:
        def generate(self, prompts, **options):
            assert options["stop"] == ["."]
            return [SimpleNamespace(text=answers[p][0], tokens=answers[p][1], records=answers[p][2]) for p in prompts]

    result = evaluate(Cut(), examples_of(4), template=Template(), batch_size=3,
                      options={"stop": ["."], "records": True},
                      keep_records=True)
    assert [item["tokens"] for item in result.items] == [2, 1, 0, 5] and result.mean_tokens == 2
    assert [item.get("changed") for item in result.items] == [1, 1, None, 0] and result.changed_share == 2 / 8
    assert [len(item.get("records", ())) for item in result.items] == [2, 1, 0, 5]


def test_right_answers_without_a_number_are_said_before_they_count_as_wrong():
    words = [SimpleNamespace(id=str(k), prompt="1+1", question="1+1", completion=text)
             for k, text in enumerate(("Tom", "cake", "2"))]
    with pytest.raises(DataError, match="none of the 2 right answers holds a number.*scorer exact"):
        evaluate(Calculator(), words[:2], "number", template=Template())
    with pytest.warns(UserWarning, match="2 of 3 right answers hold no number"):
        evaluate(Calculator(), words, "number", template=Template())


def test_evaluate_refuses_bad_input():
    double = examples_of(2) + examples_of(1)
    for examples, word in [([], "no examples"), (double, "two examples have the id '0'"),
                           ([SimpleNamespace(id="", completion="x")], "needs a name")]:
        with pytest.raises(DataError, match=word):
            evaluate(Calculator(), examples, template=Template())
    with pytest.raises(DataError, match="batch_size is 0"):
        evaluate(Calculator(), examples_of(2), template=Template(), batch_size=0)

    class Short:
        def generate(self, prompts, **options):
            return []
    with pytest.raises(DataError, match="0 completions for 2 prompts"):
        evaluate(Short(), examples_of(2), template=Template())


def test_compare_two_results():
    class Perfect(Calculator):
        def generate(self, prompts, **options):
            return [SimpleNamespace(text=f"#### {int(p.split()[1]) + 1}", tokens=[1], records=())
                    for p in prompts]
    first = evaluate(Calculator(), examples_of(40), template=Template())
    second = evaluate(Perfect(), examples_of(40), template=Template())
    test = first.compare(second)
    assert (test.second_only, test.first_only) == (10, 0)
    assert test.p_value == pytest.approx(2 / 1024)


def test_file_digest_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    one = file_digest(tmp_path)
    assert one == file_digest(tmp_path) and one != file_digest(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_digest(tmp_path) != one
    with pytest.raises(DataError, match="cannot read"):
        file_digest(tmp_path / "absent")
