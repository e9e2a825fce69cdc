"""Matching of configs and modules: against peft's own choice, and its errors."""

import json
import re
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms.adapters import patterns
from colora_ms.adapters.config import LoraConfig
from colora_ms.adapters.matching import DEFAULT_TARGETS, Module, match
from colora_ms.errors import AdapterError, AdapterWarning

PEFT = json.loads((Path(__file__).parent / "test_lora_matching_peft.json").read_text())


def table(names, kinds):
    """{name: Module} with made-up sizes."""
    modules = {}
    for i, name in enumerate(names):
        kind = next((kind for kind, members in kinds.items() if i in members), "other")
        parameters = {"weight": (4, 4)} if kind != "other" else {}
        modules[name] = Module(kind, 4, 4, parameters, name == "lm_head")
    return modules


LLAMA = table(PEFT["names"], PEFT["kinds"])


@pytest.mark.parametrize("case", PEFT["cases"], ids=lambda case: json.dumps(case["config"])[:60])
def test_same_choice_as_peft(case):
    config = LoraConfig(**case["config"])
    if case.get("error"):
        with pytest.raises(AdapterError):
            match(config, LLAMA, DEFAULT_TARGETS)
        return
    found = match(config, LLAMA, DEFAULT_TARGETS)
    expected = {PEFT["names"][i]: label for label, members in case["targets"].items() for i in members}
    assert {name: f"{one.r} {one.scaling!r}" for name, one in found.targets.items()} == expected
    assert found.saved == tuple(PEFT["names"][i] for i in case["saved"])


def test_nothing_matched_names_what_is_near():
    with pytest.raises(AdapterError, match="matches no module.*Did you mean.*'q_proj'"):
        match(LoraConfig(target_modules=["q_prj"]), LLAMA)


def test_regular_expression_must_match_the_whole_name():
    with pytest.raises(AdapterError, match="whole name"):
        match(LoraConfig(target_modules="q_proj|v_proj"), LLAMA)


def test_all_excluded_says_so():
    with pytest.raises(AdapterError, match="all 12 modules.*left out by exclude_modules"):
        match(LoraConfig(target_modules=["q_proj"], exclude_modules=["self_attn.q_proj"]), LLAMA)


@pytest.mark.parametrize("settings_, words", [
    ({"target_modules": ["q_proj", "c_attn"]}, "target_modules has 'c_attn', which the model does not have"),
    ({"layers_to_transform": [3, 12]}, r"layers_to_transform has 12, but .* layers 0 to 11"),
    ({"rank_pattern": {"k_proj": 4}}, "rank_pattern has 'k_proj', which matches no adapted module"),
    ({"alpha_pattern": {"layers.77.self_attn.q_proj": 4}}, "alpha_pattern has 'layers.77"),
])
def test_settings_beside_those_that_match_are_said(settings_, words):
    """PEFT loads them and means the same."""
    settings_ = {"target_modules": ["q_proj"], **settings_}
    with pytest.warns(AdapterWarning, match=words):
        found = match(LoraConfig(**settings_), LLAMA)
    wanted = {3} if "layers_to_transform" in settings_ else set(range(12))
    assert list(found.targets) == [f"model.layers.{i}.self_attn.q_proj" for i in sorted(wanted)]


@pytest.mark.parametrize("settings_, words", [
    ({"layers_to_transform": [12]}, "matches no module"),
    ({"modules_to_save": ["classifier"]}, "modules_to_save has 'classifier', which the model does not have"),
    ({"rank_pattern": {"(q_proj": 4}}, "not a valid regular expression"),
])
def test_settings_that_mean_nothing_are_errors(settings_, words):
    with pytest.raises(AdapterError, match=words):
        match(LoraConfig(target_modules=["q_proj"], **settings_), LLAMA)


def test_several_problems_come_in_one_error():
    with pytest.raises(AdapterError) as error:
        match(LoraConfig(target_modules=["q_proj", "nope"], rank_pattern={"zzz": 2}, modules_to_save=["score"]), LLAMA)
    assert all(word in str(error.value) for word in ("'nope'", "'zzz'", "'score'"))


def test_no_target_modules_without_a_default():
    with pytest.raises(AdapterError, match="target_modules is not given"):
        match(LoraConfig(), LLAMA)


def test_only_modules_to_save():
    found = match(LoraConfig(target_modules=[], modules_to_save=["lm_head"]), LLAMA)
    assert found.targets == {} and found.saved == ("lm_head",)


def test_biases():
    modules = dict(LLAMA)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        modules[name] = Module("linear", 4, 4, {"weight": (4, 4), "bias": (4,)})
    only = match(LoraConfig(target_modules=["q_proj"], bias="lora_only"), modules)
    every = match(LoraConfig(target_modules=["q_proj"], bias="all"), modules)
    assert only.biases == ("model.layers.0.self_attn.q_proj",)
    assert every.biases == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")


def test_hostile_expression_does_not_hang(monkeypatch):
    monkeypatch.setattr(patterns, "TIMEOUT", 1)
    begin = time.monotonic()
    with pytest.raises(AdapterError, match="took longer"):
        match(LoraConfig(target_modules=r"((model|layers|self|attn|[a-z_.0-9])+)+!"), LLAMA)
    assert time.monotonic() - begin < 10


NAMES = st.lists(st.lists(st.sampled_from(["a", "ab", "b", "0", "1", "proj"]), min_size=1, max_size=4).map(".".join),
                 min_size=1, max_size=12, unique=True)


@settings(max_examples=200, deadline=None)
@given(NAMES, st.lists(st.sampled_from(["a", "b", "proj", "a.b", "0.a", "1.proj"]), min_size=1, max_size=3,
                       unique=True))
def test_lists_match_whole_name_parts_at_the_end(names, entries):
    """A list means the names equal to an entry or ending in it, cut at a dot: said here by splitting the names."""
    modules = {name: Module("linear", 2, 2, {"weight": (2, 2)}) for name in names}
    parts = {name: name.split(".") for name in names}
    expected = [name for name in names
                if any(parts[name][-len(entry.split(".")):] == entry.split(".") for entry in entries)]
    matched_entries = [entry for entry in entries
                       if any(parts[name][-len(entry.split(".")):] == entry.split(".") for name in names)]
    if not matched_entries:
        with pytest.raises(AdapterError):
            match(LoraConfig(target_modules=entries), modules)
    else:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert list(match(LoraConfig(target_modules=entries), modules).targets) == expected
        assert len(said) == (len(matched_entries) < len(entries))


@settings(max_examples=100, deadline=None)
@given(NAMES, st.sampled_from([r".*", r"a.*", r".*proj", r"[ab]+\.\d.*", r"(a|b)\.proj"]))
def test_expressions_match_whole_names(names, expression):
    modules = {name: Module("linear", 2, 2, {"weight": (2, 2)}) for name in names}
    expected = [name for name in names if re.fullmatch(expression, name)]
    if not expected:
        with pytest.raises(AdapterError):
            match(LoraConfig(target_modules=expression), modules)
    else:
        assert list(match(LoraConfig(target_modules=expression), modules).targets) == expected


def test_long_lists_are_matched_in_no_time():
    begin = time.monotonic()
    with pytest.warns(AdapterWarning, match="and 99994 more"):
        match(LoraConfig(target_modules=["q_proj", *(f"x{i}" for i in range(99_999))]), LLAMA)
    assert time.monotonic() - begin < 5
