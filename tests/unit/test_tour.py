"""The parts of the quick start: its data, the adapter's second strength, the pace of a training, the changed tokens."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from colora_ms.adapters import store
from colora_ms.adapters.peft_format import StoredAdapter
from colora_ms.decoding import Contrast
from colora_ms.decoding.completion import TokenRecord
from colora_ms.errors import AdapterError, ConfigError, DataError
from colora_ms.recipes import pace as pace_module
from colora_ms.recipes.mixed import eight
from colora_ms.recipes.pace import Pace, in_words
from colora_ms.recipes.strength import copy_adapter
from colora_ms.recipes.why import Change, changed_tokens, explain
from colora_ms.training.generated import running_totals
from colora_ms.training.sources import load_examples

# -- running totals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms, size", [(2, 81), (3, 50), (4, 300), (12, 20)])
def test_running_totals_are_what_the_questions_say(terms, size):
    examples = running_totals(size, 7, terms)
    assert len({one.prompt for one in examples}) == len({one.id for one in examples}) == size
    for one in examples:
        digits = [int(digit) for digit in one.prompt.rstrip("=").split("+")]
        assert len(digits) == terms and all(1 <= digit <= 9 for digit in digits)
        assert [int(total) for total in one.completion.split(",")] == np.cumsum(digits)[1:].tolist()
        assert one.meta["answer"] == one.completion.split(",")[-1]


def test_running_totals_depend_on_the_seed_alone_and_are_a_kind_of_source():
    first = running_totals(40, 1)
    assert first == running_totals(40, 1) != running_totals(40, 2)
    assert first == load_examples({"kind": "running_totals", "size": 40, "seed": 1, "terms": 4})
    # Python promises this order for all its versions: the recipe's data is the same everywhere.
    assert [one.prompt for one in first[:2]] == ["3+6+5+2=", "1+6+4+7="]


@pytest.mark.parametrize("changes, text", [
    ({"size": 0}, "size 0"), ({"size": 82}, "from 1 to 81"), ({"size": 2.0}, "size 2.0"),
    ({"terms": 1}, "from 2 to 12"),
    ({"terms": 13}, "terms 13"), ({"seed": -1}, "seed -1"), ({"seed": True}, "seed True"),
    ({"digits": 2}, "has no setting 'digits'")])
def test_running_totals_refuse_what_they_cannot_make(changes, text):
    with pytest.raises(DataError, match=text):
        load_examples({"kind": "running_totals", "size": 4, "seed": 1, "terms": 2, **changes})


# -- a copy at another strength ---------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """A function that writes an adapter folder with the given settings."""
    from safetensors.numpy import save_file

    def make(**settings):
        folder = tmp_path / "adapter"
        folder.mkdir()
        values = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["q_proj"], **settings}
        (folder / store.CONFIG_FILE).write_text(json.dumps(values))
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        save_file({name.format("A"): np.ones((2, 4), np.float32), name.format("B"): np.ones((4, 2), np.float32)},
                  str(folder / store.WEIGHTS_FILE))
        return folder
    return make


def test_a_copy_at_half_the_strength_differs_in_its_scale_alone(adapter, tmp_path):
    source = adapter(alpha_pattern={"layers.0.self_attn.q_proj": 4, "v_proj": 6})
    equal, half = copy_adapter(source, tmp_path / "a" / "equal"), copy_adapter(source, tmp_path / "a" / "half", 0.5)
    assert StoredAdapter(equal).digest() == StoredAdapter(source).digest() != StoredAdapter(half).digest()
    assert (half / store.WEIGHTS_FILE).read_bytes() == (source / store.WEIGHTS_FILE).read_bytes()
    before, after = store.read_config(source), store.read_config(half)
    assert {name for name in before if before[name] != after[name]} == {"lora_alpha", "alpha_pattern"}
    assert after["lora_alpha"] == 8 and after["alpha_pattern"] == {"layers.0.self_attn.q_proj": 2, "v_proj": 3}


def test_half_the_strength_is_half_of_what_the_adapter_adds(tmp_path, tiny_decoder):
    from colora_ms.adapters import LoraConfig, inject, load_adapter

    config = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)
    inject(tiny_decoder(), config, seed=3).save(tmp_path / "full")
    copy_adapter(tmp_path / "full", tmp_path / "half", 0.5)
    added = {}
    for name in ("full", "half"):
        net = tiny_decoder()
        handle = load_adapter(net, tmp_path / name)
        weight = next(parameter for parameter in net.get_parameters() if parameter.name.endswith("q_proj.weight"))
        before = weight.asnumpy().copy()
        handle.merge()
        added[name] = weight.asnumpy() - before
    assert np.abs(added["full"]).max() > 0.01
    np.testing.assert_allclose(2 * added["half"], added["full"], atol=1e-6)


@pytest.mark.parametrize("settings, text", [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"),
                                            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
                                            ({"peft_type": "IA3"}, "its method has no scale")])
def test_what_no_scale_multiplies_is_refused(adapter, tmp_path, settings, text):
    source = adapter(**settings)
    with pytest.raises(AdapterError, match=text):
        copy_adapter(source, tmp_path / "copy", 0.5)
    assert not (tmp_path / "copy").exists()


# -- forecasts --------------------------------------------------------------------------------------------------------


def test_forecasts_leave_compiling_out(monkeypatch):
    compiled = [0]
    monkeypatch.setattr(pace_module, "all_compilations", lambda: compiled[0])
    lines = []
    pace = Pace(100, lines.append, first=5, lines=4)
    for step in range(1, 101):
        compiled[0] += step in (1, 3)  # a graph for each of two batch shapes
        pace.on_step(None, {"step": step, "seconds": 40.0 if step in (1, 3) else 0.5, "loss": 1.0})
    assert pace.compiling == 80 and pace.running == 49 and pace.seconds_per_update == 0.5
    assert lines[0] == "update 1 of 100: 40 s with compiling; the others need none"
    assert lines[1] == "update 6 of 100: loss 1.000, 0.50 s an update, 47 s to go"
    assert [line.split(":")[0] for line in lines[2:]] == [f"update {step} of 100" for step in (25, 50, 75)]
    assert in_words(150) == "2.5 minutes" and in_words(8.4) == "8 s"


# -- mixing and explaining --------------------------------------------------------------------------------------------


def test_the_eight_requests_are_two_prompts_on_four_answerers():
    weak, strong = Contrast(0.1, 0.5), Contrast(0.1, 1.0)
    asked = eight(["a", "b"], "full", "half", [weak, strong])
    assert [one.prompt for one in asked] == ["a"] * 4 + ["b"] * 4
    assert [one.adapter for one in asked] == [None, "full", "half", "full"] * 2
    assert [one.contrast for one in asked] == [None, None, None, weak, None, None, None, strong]


def record(token, favourite, expert, amateur, score, text, best=None, favourite_text=""):
    best = expert if best is None else best
    return TokenRecord(token, favourite, 3, expert, amateur, score, best, text, favourite_text)


class Second:
    """A generator whose second look finds the adapter's favourite at the changed place."""

    def __init__(self, found):
        self.found, self.calls = found, []

    def encode(self, prompt):
        return [ord(letter) for letter in prompt]

    def generate(self, prompts, **options):
        self.calls.append((prompts, options))
        return [SimpleNamespace(records=[self.found]) for _ in prompts]


def test_changed_tokens_are_looked_at_again_where_they_stand():
    kept, old = record(5, 5, 4.0, 1.0, 5.5, "1"), record(7, 7, 4.0, 2.5, 4.75, "7")
    new = record(6, 7, 3.6, 0.4, 5.2, "8", best=4.0, favourite_text="7")
    generator = Second(old)
    contrast = Contrast(0.1, 0.5)
    found = changed_tokens(generator, ["ab", "c", "d"], [[kept], [kept, new, new], []], "full", contrast, batch=4)
    assert found == [Change(1, "1", new, old)]
    (prompts, options), = generator.calls
    assert prompts == [[ord("c"), 5]] * 4
    look = Contrast(1.0, 0.5)
    assert options == dict(adapter="full", contrast=[look, look, None, None], max_new_tokens=1, records=True)
    assert changed_tokens(generator, ["ab"], [[kept]], "full", contrast) == [] and len(generator.calls) == 1
    text = explain(found[0], "7+4=", contrast)
    assert text.splitlines()[0] == "  7+4=1|   '7' became '8'"
    assert "'7'               4.00      2.50      4.75" in text and "'8'               3.60      0.40      5.20" in text
    assert text.endswith("the adapter puts '7' ahead by 0.40, the base by 2.10; 1.5 x 0.40 < 0.5 x 2.10, so '8' wins")


def test_the_quick_start_needs_problems(tmp_path):
    from colora_ms.recipes.tour import Tour
    from colora_ms.training.config import TrainingConfig

    config = TrainingConfig.from_dict({
        "output": str(tmp_path), "data": {"train": "a.txt"}, "loop": {"steps": 1},
        "evaluate": {"task": "perplexity", "data": "b.txt", "decoders": ["base", "greedy"]}})
    with pytest.raises(ConfigError, match="has task perplexity; use colora-ms run"):
        Tour(config, items=8, alpha=0.1, beta=0.5, weaker="half", strength=0.5)
