"""Recipes: reading YAML, defaults, types, values, suggestions, overrides."""

import dataclasses
import textwrap

import pytest

from colora_ms.errors import ConfigError
from colora_ms.training.config import DataConfig, LoopConfig, OptimizerConfig, TrainingConfig, read_yaml

RECIPE = """
    model: smollm2-135m
    output: runs/x
    adapter: {r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}
    data:
      train: {kind: reasoning_gym, task: chain_sum, size: 100, seed: 1}
      max_length: 64
    optimizer:
      learning_rate: 1e-3
      max_grad_norm: null
    loop: {steps: 20, seed: 3}
"""


def recipe(tmp_path, text=RECIPE, **changes):
    path = tmp_path / "recipe.yaml"
    text = textwrap.dedent(text)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_yaml_is_read_with_types_and_defaults(tmp_path):
    config = TrainingConfig.from_yaml(recipe(tmp_path))
    assert config.optimizer.learning_rate == 1e-3 and config.optimizer.max_grad_norm is None
    assert config.loop.steps == 20 and config.loop.seed == 3 and config.loop.keep_checkpoints == 2
    assert config.data.max_length == 64 and config.data.batch_size == 8
    assert config.adapter_config().r == 4
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_overrides_replace_single_settings(tmp_path):
    path = recipe(tmp_path)
    config = TrainingConfig.from_yaml(path, ["loop.steps=7", "data.packing=true", "output=other",
                                             "data.buckets=[16, 32]", "loop.log_every=2"])
    assert (config.loop.steps, config.data.packing, config.output) == (7, True, "other")
    assert config.data.buckets == [16, 32]
    for bad, word in [("loop.stepz=1", "Did you mean 'steps'"), ("steps", "not of the form"),
                      ("output.x=1", "has no settings inside"), ("loop.steps=[", "not a YAML"),
                      (".=1", "not of the form")]:
        with pytest.raises(ConfigError, match=word):
            TrainingConfig.from_yaml(path, [bad])


@pytest.mark.parametrize("old, new, expected", [
    ("max_length: 64", "max_lenght: 64", "section data has no setting 'max_lenght'.*'max_length'"),
    ("model:", "modle:", "Did you mean 'model'"),
    ("r: 4", "rank: 4", "section adapter has no setting 'rank'"),
    ("r: 4", "r: 0", "r is 0"),
    ("learning_rate: 1e-3", "lr: 1", "section optimizer has no setting 'lr'"),
    ("learning_rate: 1e-3", "learning_rate: fast", "learning_rate is 'fast', expected a number"),
    ("learning_rate: 1e-3", "learning_rate: -1", "learning_rate is -1.0, expected a number above"),
    ("learning_rate: 1e-3", "learning_rate: .nan", "expected a finite number"),
    ("learning_rate: 1e-3", "learning_rate: true", "learning_rate is True, expected a number"),
    ("steps: 20", "steps: 2.5", "steps is 2.5, expected an integer"),
    ("steps: 20", "steps: 0", "steps is 0, expected a number of at least 1"),
    ("steps: 20", "epochs: 1, steps: 3", "exactly one of steps and epochs"),
    ("steps: 20, ", "", "exactly one of steps and epochs"),
    ("steps: 20", "steps: 20, evaluate_every: 5", "data.validation is not"),
    ("output: runs/x", "", "needs the setting 'output'"),
    ("output: runs/x", "output: ''", "output is ''"),
    ("train: {", "train: {kind: jsonl}\n  train: {", "line .*'train' is given twice"),
    ("steps: 20", "steps: 20, 3: 4", "the name 3 must be a text"),
    ("max_length: 64", "max_length: 64\n  template: '{promt} {completion}'", "Did you mean 'prompt'"),
    ("max_length: 64", "max_length: 64\n  system: hi", "needs the chat template"),
    ("max_length: 64", "max_length: 64\n  on_long: cut", "one of skip, error"),
    ("max_length: 64", "max_length: 64\n  buckets: []", "a list of integers"),
    ("loop: {", "loop: [", "not valid YAML"),
    ("loop: {steps: 20, seed: 3}", "loop: 5", "section loop is 5"),
])
def test_mistakes_are_named(tmp_path, old, new, expected):
    with pytest.raises(ConfigError, match=expected):
        TrainingConfig.from_yaml(recipe(tmp_path, **{old: new}))


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_yaml(tmp_path)
    path = tmp_path / "bad.yaml"
    for content, word in [(b"\xff\xfe\x00", "not UTF-8"), (b"- 1\n", "expected settings"),
                          (b"", "expected settings"), (b"a: " + b"[" * 5000, "too deeply|not valid"),
                          (b"a: !!python/object/apply:os.system [x]", "not valid YAML"),
                          (b"#" * (1 << 21), "small file")]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=word):
            read_yaml(path)


@pytest.mark.parametrize("section", [DataConfig, OptimizerConfig, LoopConfig, TrainingConfig])
def test_every_setting_has_a_sentence(section):
    for name, _, sentence in section.settings():
        assert sentence.endswith((".", "PEFT's).")) and len(sentence) > 15, name


def test_python_use_checks_too():
    with pytest.raises(ConfigError, match="beta2 is 1.0"):
        OptimizerConfig(beta2=1)
    with pytest.raises(TypeError):
        OptimizerConfig(lr=1)
    config = TrainingConfig(output="x", data=DataConfig(train="t.jsonl"), loop={"steps": 3})
    assert config.loop == LoopConfig(steps=3) and dataclasses.is_dataclass(config.optimizer)
