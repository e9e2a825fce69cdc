"""Answers that keep to a form: what comes out of a random model is what the grammar says."""

import importlib.util
import json
import re

import numpy as np
import pytest

from colora_ms import Generator, Sampling
from colora_ms.decoding.grammar import Grammar, Matcher, grammar_of
from colora_ms.errors import DecodingError
from tokenizer_kinds import byte_level, metaspace

there = importlib.util.find_spec("llguidance") is not None
needs_library = pytest.mark.skipif(not there, reason="llguidance is not installed (the extra constraints)")
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer",
          "minimum": 0, "maximum": 99}, "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 2}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def generator(tiny_decoder):
    tokenizer = byte_level()
    return Generator(tiny_decoder(vocab_size=420, eos_token_ids=(1,)), tokenizer, max_rows=4, chunk=6)


def answers(generator, grammar, seeds=6, **options):
    drawn = [Sampling(temperature=1.5, seed=seed) for seed in range(seeds)]
    return generator.generate(["the"] * seeds, sampling=drawn, grammar=grammar, **{"max_new_tokens": 90, **options})


@needs_library
@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-f]{2}", r"(ab|cde){2,4}!", "é+ü"])
def test_regular_expressions(generator, pattern):
    found = answers(generator, {"regex": pattern})
    complete = [one.text for one in found if one.finish_reason == "stop"]
    assert complete and all(re.fullmatch(pattern, text) for text in complete)
    assert len({one.text for one in found}) > 1


@needs_library
def test_a_schema(generator):
    found = answers(generator, {"json_schema": SCHEMA}, 8)
    complete = [json.loads(one.text) for one in found if one.finish_reason == "stop"]
    assert len(complete) >= 4 and len({json.dumps(one) for one in complete}) > 1
    for one in complete:
        assert {"name", "age"} <= set(one) <= {"name", "age", "tags"} and len(one["name"]) <= 6
        assert isinstance(one["age"], int) and 0 <= one["age"] <= 99
        assert len(one.get("tags", [])) <= 2 and set(one.get("tags", [])) <= {"x", "yy"}


@needs_library
def test_json_mode_and_choices(generator):
    whole = answers(generator, {"json": True}, 4, logit_bias={generator.tokenizer.encode("}")[-1]: 6.0})
    assert any(one.finish_reason == "stop" for one in whole)
    assert all(isinstance(json.loads(one.text), dict) for one in whole if one.finish_reason == "stop")
    for one in answers(generator, {"choice": ["yes", "no", "not sure"]}):
        assert one.text in ("yes", "no", "not sure") and one.finish_reason == "stop"


@needs_library
def test_beside_others_and_with_penalties(generator):
    """A request with a grammar makes the same answer alone and beside others, which do not see it."""
    options = dict(max_new_tokens=20, records=True, repetition_penalty=1.3, logprobs=3)
    grammar = Grammar("regex", "[a-z]+( [a-z]+){3}")
    together = generator.generate(["the", "little", "dog"], grammar=[None, grammar, None], **options)
    alone = [generator.generate([prompt], grammar=one, **options)[0]
             for prompt, one in zip(("the", "little", "dog"), (None, grammar, None))]
    assert together == alone
    assert re.fullmatch("[a-z ]*", together[1].text)
    for listed in together[1].logprobs:  # of what the grammar allows
        assert all(np.isfinite(chance) for _, chance, _ in listed.tops)


@needs_library
def test_other_tokenizers(tiny_decoder):
    other = Generator(tiny_decoder(vocab_size=520, eos_token_ids=(2,)), metaspace(), max_rows=4)
    for one in answers(other, {"regex": "(dog|little) [0-9]{2}"}, 3):
        assert re.fullmatch("(dog|little) [0-9]{2}", one.text) and one.finish_reason == "stop"


@needs_library
@pytest.mark.parametrize("grammar, words", [
    (Grammar("regex", "a("), ("regex", "cannot")), (Grammar("json_schema", "{"), ("json_schema",)),
    (Grammar("json_schema", '{"type": "nonsense"}'), ("json_schema", "cannot")),
    (Grammar("lark", "start: x"), ("lark",)),
])
def test_grammars_that_cannot_be_read(generator, grammar, words):
    with pytest.raises(DecodingError) as error:
        generator.generate(["the"], grammar=grammar, max_new_tokens=4)
    assert all(word in str(error.value) for word in words), str(error.value)


@needs_library
def test_a_token_that_the_grammar_lacks():
    matcher = Matcher(Grammar("regex", "[0-9]+"), byte_level(), 420, (1,))
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[:420]
    letter, digit = byte_level().encode("x")[-1], byte_level().encode("7")[-1]
    assert bits[digit] and not bits[letter] and not bits[1]
    matcher.take([digit])
    assert np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[1]
    with pytest.raises(DecodingError, match="left its grammar"):
        matcher.take([letter])


def test_without_the_library(monkeypatch):
    if there:
        import sys

        monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DecodingError, match=r"llguidance, which is not installed; run .*colora-ms\[constraints\]"):
        Matcher(Grammar("json"), byte_level(), 420, (1,))


def test_mappings():
    assert grammar_of({"json": True}) == Grammar("json")
    assert json.loads(grammar_of({"json_schema": SCHEMA}).text) == SCHEMA
    assert grammar_of({"json_schema": "{}"}).text == "{}" and grammar_of({"choice": ["a"]}).text == '["a"]'
    for bad in ({}, {"json": False}, {"regex": 3}, {"choice": ["a", 1]}, {"json": True, "regex": "a"}, {"regx": "a"},
                {"regex": ""}):
        with pytest.raises(DecodingError):
            grammar_of(bad)
