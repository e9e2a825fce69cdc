"""Choosing a contrast: the test of the best of many, settled items, the rule that answers "off"."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms.decoding import Contrast
from colora_ms.decoding.completion import TokenRecord
from colora_ms.errors import ConfigError, DataError, DecodingError
from colora_ms.evaluation.significance import best_of_many, mcnemar
from colora_ms.evaluation.tuning import DEFAULT_GRID, choose_contrast, compare_contrasts


def outcomes(text):
    return {str(i): c == "1" for i, c in enumerate(text)}


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.text("01", min_size=n, max_size=n), min_size=2, max_size=4)))
@settings(max_examples=60, deadline=None)
def test_best_of_many_counts_all_sign_patterns(texts):
    baseline, others = outcomes(texts[0]), [outcomes(t) for t in texts[1:]]
    found = best_of_many(baseline, others)
    gains = [[int(o[k]) - int(baseline[k]) for k in baseline] for o in others]
    totals = [sum(g) for g in gains]
    best = max(totals)
    assert found.best == totals.index(best) and found.gain == best
    reached = [max(sum(s * x for s, x in zip(signs, g)) for g in gains) >= best
               for signs in itertools.product((-1, 1), repeat=len(baseline))]
    assert found.p_value == pytest.approx(sum(reached) / len(reached))


def test_one_candidate_is_the_one_sided_mcnemar_test():
    baseline, other = outcomes("0" * 9 + "1" * 3 + "11"), outcomes("1" * 9 + "0" * 3 + "11")
    assert best_of_many(baseline, [other]).p_value == pytest.approx(mcnemar(baseline, other).p_value / 2)


def test_many_random_candidates_raise_p():
    rng = np.random.default_rng(0)
    baseline = {i: bool(x) for i, x in enumerate(rng.random(200) < 0.5)}
    others = [{i: bool(x) for i, x in enumerate(rng.random(200) < 0.5)} for _ in range(40)]
    found = best_of_many(baseline, others)
    alone = mcnemar(baseline, others[found.best]).p_value
    assert alone < 0.1 and found.p_value > 5 * alone
    assert best_of_many(baseline, others) == found  # seeded


def test_best_of_many_is_rarely_fooled():
    # Under the hypothesis p <= 0.1 comes at most about one time in ten.
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        draws = rng.random((6, 40)) < 0.5
        rows = [{i: bool(x) for i, x in enumerate(row)} for row in draws]
        hits += best_of_many(rows[0], rows[1:], rounds=400).p_value <= 0.1
    assert 2 <= hits <= 24


def test_best_of_many_refuses():
    with pytest.raises(DataError, match="at least one decoder"):
        best_of_many({"a": True}, [])
    with pytest.raises(DataError, match="same items"):
        best_of_many({"a": True}, [{"b": True}])
    assert best_of_many({"a": True}, [{"a": True}]).p_value == 1.0


# -- a generator whose answers are known ----------------------------------------------------------


class Known:
    """Answers by contrast: items "s…" have one valid token; "good" contrasts mend "f…" items, all break "b…" items."""

    def __init__(self, good):
        self.good, self.asked = good, []

    def generate(self, prompts, adapter, contrast, max_new_tokens, stop, records):
        assert adapter == "a" and records
        self.asked.append((contrast, list(prompts)))
        return [self.answer(prompt, contrast) for prompt in prompts]

    def answer(self, prompt, contrast):
        on = contrast.beta > 0
        right = prompt[0] in "sb" if not on else prompt[0] == "s" or prompt[0] == "f" and contrast == self.good
        assert not (on and prompt[0] == "s"), "a settled item was decoded again"
        record = TokenRecord(1 if right else 2, 2 if on else 1, 1 if prompt[0] == "s" else 3, 0.0, 0.0, 0.0, 0.0)
        return SimpleNamespace(text="7" if right else "8", tokens=(1,), records=(record,))


def examples(**counts):
    return [SimpleNamespace(id=f"{kind}{i}", question=f"{kind}{i}", completion="7")
            for kind, count in counts.items() for i in range(count)]


TEMPLATE = SimpleNamespace(digest="t", request=lambda example: example.question)
GOOD = Contrast(0.1, 1.0, "margin")


def compare(folder=None, good=GOOD, **counts):
    generator = Known(good)
    found = compare_contrasts(generator, examples(**counts), "a", DEFAULT_GRID, template=TEMPLATE, folder=folder)
    return generator, found


def test_settled_items_are_decoded_once_and_counted():
    generator, found = compare(s=10, f=6, b=1)
    assert found.settled == 10 and found.accuracy == 11 / 17
    best = next(r for r in found.results if r.contrast == GOOD)
    assert best.accuracy == 16 / 17 and (best.test.second_only, best.test.first_only) == (6, 1)
    assert best.changed == 6 and best.tokens == 17
    probe = generator.asked[0][0]
    assert probe.beta == 0 and probe.alpha == min(c.alpha for c in DEFAULT_GRID)


def test_the_choice_is_off_unless_the_gain_is_beyond_noise():
    few = choose_contrast(compare(s=10, f=3)[1])
    assert few.contrast is None and few.best.contrast == GOOD and few.p_value == pytest.approx(1 / 8)
    many = choose_contrast(compare(s=10, f=8)[1])
    assert many.contrast == GOOD and many.p_value == pytest.approx(1 / 256) and "margin" in many.summary()
    assert choose_contrast(compare(s=10, f=8)[1], level=0.001).contrast is None
    harmful = choose_contrast(compare(s=4, b=12, good=None)[1])
    assert harmful.contrast is None and harmful.gain < 0 and "off" in harmful.summary()
    nothing = choose_contrast(compare(s=5)[1])
    assert nothing.contrast is None and nothing.gain == 0
    json.dumps([few.to_json(), many.to_json()])
    with pytest.raises(ConfigError, match="level is 0"):
        choose_contrast(compare(s=2)[1], level=0)


def test_an_interrupted_comparison_goes_on(tmp_path):
    first, whole = compare(tmp_path, s=3, f=4, b=2)
    second, again = compare(tmp_path, s=3, f=4, b=2)
    assert first.asked and not second.asked
    assert again.table() == whole.table() and "margin, alpha 0.1, beta 1" in whole.table()
    with pytest.raises(ConfigError, match="no contrast"):
        compare_contrasts(first, examples(s=1), "a", [], template=TEMPLATE)


def test_refused_items_are_told():
    class Refuses(Known):
        def generate(self, prompts, *args, **options):
            if any(prompt == "f1" for prompt in prompts):
                raise DecodingError("the prompt f1 is too long")
            return super().generate(prompts, *args, **options)

    found = compare_contrasts(Refuses(GOOD), examples(s=2, f=3), "a", DEFAULT_GRID, template=TEMPLATE)
    assert found.refused == 1 and found.to_json()["refused"] == 1
    assert "1 of 5 items were refused and count as wrong for every decoder." in found.table()
    assert all(not result.outcomes["f1"] for result in found.results) and "refused" not in compare(s=2, f=3)[1].table()


def test_the_command_line_grid():
    from colora_ms.cli.tune_contrast import grid

    assert grid() == list(DEFAULT_GRID)
    assert grid([0.1, 0.3], [0.5], ["fixed", "copies"]) == [
        Contrast(0.1, 0.5), Contrast(0.3, 0.5), Contrast(0.1, 0.5, skip_copies=True),
        Contrast(0.3, 0.5, skip_copies=True)]
    assert len(grid(betas=[1.0])) == 5
    with pytest.raises(DecodingError, match="beta=-1"):
        grid(betas=[-1.0])
