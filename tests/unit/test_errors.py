"""The exception family and the "did you mean" helper."""

import pytest

from colora_ms import errors

KINDS = ["ConfigError", "CheckpointError", "AdapterError", "DecodingError", "DataError",
         "TokenizerError"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_is_a_colora_error_and_a_value_error(kind):
    cls = getattr(errors, kind)
    assert issubclass(cls, errors.ColoraError)
    assert issubclass(cls, ValueError)
    with pytest.raises(errors.ColoraError, match="what went wrong"):
        raise cls("what went wrong")


def test_near_names_one_and_several():
    known = ["q_proj", "k_proj", "v_proj", "gate_proj"]
    assert near_names("gate_porj", known)[0] == "gate_proj"
    assert set(near_names("x_proj", known)) == {"q_proj", "k_proj", "v_proj"}
    assert " or " in errors.near("x_proj", known)
    assert errors.near("x_proj", known, n=1).count("'") == 2


def test_near_ignores_case_and_keeps_the_known_spelling():
    assert errors.near("LORA_ALPHA", ["lora_alpha", "r"]) == " Did you mean 'lora_alpha'?"
    assert errors.near("llamaforcausallm", ["LlamaForCausalLM"]) == \
        " Did you mean 'LlamaForCausalLM'?"


def test_near_is_empty_when_nothing_is_similar():
    assert errors.near("zzz", ["q_proj", "k_proj"]) == ""
    assert errors.near("zzz", []) == ""
    assert errors.near(None, ["q_proj"]) == ""


def near_names(name, known):
    """The suggested names as a list."""
    return errors.near(name, known).split("'")[1::2]
