"""A recipe's ``adapter.start_from``: training goes on with an adapter, whose config and values come from its folder."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from colora_ms.adapters import LilyConfig, LoraConfig, adapters_of, inject, load_adapter
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from colora_ms.errors import AdapterError, ConfigError
from colora_ms.recipes.training import finished
from colora_ms.training import run as module
from colora_ms.training.config import TrainingConfig
from colora_ms.training.trainer import Callback
from test_training_decoder import Stop, logits_of, recipe, tiny_decoder  # noqa: F401


class Keep(Callback):
    def on_end(self, trainer, result):
        self.decoder = trainer.stepper.loss_cell.decoder


def going_on(config, output, folder, **adapter):
    """The recipe again, with another output, that starts from a folder."""
    values = config.to_dict()
    values["output"] = str(output)
    values["adapter"] = {"start_from": str(folder), **adapter}
    return TrainingConfig.from_dict(values)


CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
                       rank_pattern={"layers.1.mlp.down_proj": 5, "down_proj": 2}, modules_to_save=["norm"]),
    "dora": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False),
    "dropout": LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.2, init_lora_weights=False),
    "pissa": LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"], init_lora_weights="pissa"),
    "lily": LilyConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False),
}


@pytest.fixture(params=CONFIGS)
def start(request, mindspore, tmp_path):
    """(method or option, folder of an adapter)."""
    handle = inject(tiny_decoder(), CONFIGS[request.param], seed=4)
    handle.save(tmp_path / "first")
    return request.param, tmp_path / "first"


def test_the_first_forward_is_the_adapters_own(start, recipe, tmp_path):  # noqa: F811
    kind, folder = start
    own = load_adapter(tiny_decoder(), folder)
    expected = logits_of(own.net, own)
    decoder = tiny_decoder()
    config = going_on(recipe("x"), tmp_path / "run", folder)
    handle, _, _ = module.begin_adapter(config, decoder)
    decoder.set_train(False)
    assert np.abs(logits_of(decoder, handle) - expected).max() < 1e-6  # training takes other operators
    for place, fields in own.values().items():
        assert all(np.array_equal(handle.values()[place][field], value) for field, value in fields.items())
    assert config.adapter_config().peft_type == handle.config().peft_type
    assert len(handle.trainable_params()) == len(decoder.trainable_params()) > 0
    if kind == "dropout":
        assert handle.dropout == 0.2 and handle.seed == config.loop.seed


def test_training_goes_on_and_the_folder_is_plain_peft_again(start, recipe, tmp_path):  # noqa: F811
    kind, folder = start
    result = module.train(going_on(recipe("x", steps=4), tmp_path / "run", folder))
    values = json.loads((tmp_path / "run" / "adapter" / CONFIG_FILE).read_text())
    before = json.loads((folder / CONFIG_FILE).read_text())
    if kind != "pissa":  # that one is plain LoRA of twice the rank from then on
        assert {key for key in before if before[key] != values[key]} <= {"base_model_name_or_path"}
        assert {key: value.shape for key, value in load_file(folder / WEIGHTS_FILE).items()} == {
            key: value.shape for key, value in load_file(tmp_path / "run" / "adapter" / WEIGHTS_FILE).items()}
    assert len(result.losses) == 4
    again = load_adapter(tiny_decoder(), tmp_path / "run" / "adapter")
    own = load_adapter(tiny_decoder(), folder)
    assert not np.array_equal(logits_of(again.net, again), logits_of(own.net, own))


def test_loss_goes_on_from_where_it_was(recipe, tmp_path):  # noqa: F811
    first = module.train(recipe("a", steps=20))
    scratch = module.train(recipe("b", steps=3))
    further = module.train(going_on(recipe("x", steps=3), tmp_path / "c", tmp_path / "a" / "adapter"))
    assert further.losses != scratch.losses
    assert abs(further.losses[0] - first.losses[-1]) < 0.02 < scratch.losses[0] - further.losses[0]


def test_resuming_such_a_run_equals_an_unbroken_one(recipe, tmp_path):  # noqa: F811
    """Whatever became of the folder that it started from: the run has a copy."""
    module.train(recipe("a", steps=5))
    folder = tmp_path / "a" / "adapter"
    whole = module.train(going_on(recipe("x", steps=6), tmp_path / "whole", folder))
    with pytest.raises(KeyboardInterrupt):
        module.train(going_on(recipe("x", steps=6), tmp_path / "cut", folder), callbacks=[Stop()])
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({key: value * 0 for key, value in tensors.items()}, folder / WEIGHTS_FILE)
    changed = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**changed, "lora_alpha": 99}))
    result = module.train(going_on(recipe("x", steps=6), tmp_path / "cut", folder), resume=True)
    assert result.losses == whole.losses[3:]
    for name in ("adapter", "best"):
        ours, theirs = (load_file(tmp_path / run / name / WEIGHTS_FILE) for run in ("cut", "whole"))
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    shutil.rmtree(folder)
    again = going_on(recipe("x", steps=6), tmp_path / "cut", folder)
    assert again.adapter_config().r == 4 and finished(again).steps == 6
    assert module.train(again, resume=True).losses == []


def test_a_run_without_a_checkpoint_begins_with_the_folder_as_it_is_now(recipe, tmp_path):  # noqa: F811
    module.train(recipe("a", steps=2))
    config = going_on(recipe("x", steps=2), tmp_path / "run", tmp_path / "a" / "adapter")
    module.begin_adapter(config, tiny_decoder())
    assert (tmp_path / "run" / "start" / WEIGHTS_FILE).is_file()
    assert config.start_folder == tmp_path / "a" / "adapter"


@pytest.mark.parametrize("given, words", [
    ({"r": 8}, "r is 8, but the adapter in .* has 4; leave it out"),
    ({"lora_alpha": 3, "lora_dropout": 0.1}, "lora_alpha is 3.*lora_dropout is 0.1"),
    ({"target_modules": ["q_proj"]}, r"target_modules is \['q_proj'\], but the adapter"),
    ({"use_dora": True}, "use_dora is True"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
    ({"rnk": 8}, "no setting 'rnk'.*beside start_from"),
    ({"method": "lily"}, "method is 'lily', but the adapter in .* is of the method 'lora'"),
    ({"r": -1}, "r is -1"),
])
def test_settings_beside_it_that_disagree_are_refused_by_name(recipe, tmp_path, given, words):  # noqa: F811
    inject(tiny_decoder(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")).save(tmp_path / "a")
    with pytest.raises(ConfigError, match=words):
        going_on(recipe("x"), tmp_path / "run", tmp_path / "a", **given)


@pytest.mark.parametrize("value", [3, "", ["a"]])
def test_a_start_that_is_no_path(recipe, tmp_path, value):  # noqa: F811
    values = recipe("x").to_dict()
    values["adapter"] = {"start_from": value, "r": 4}
    with pytest.raises(ConfigError, match="start_from is .*, expected the path"):
        TrainingConfig.from_dict(values)
    values["adapter"]["start_from"] = None
    assert TrainingConfig.from_dict(values).adapter_config().r == 4


def test_settings_that_agree_are_taken(recipe, tmp_path):  # noqa: F811
    inject(tiny_decoder(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")).save(tmp_path / "a")
    for given in ({"r": 4, "lora_alpha": 16.0, "method": "lora"}, {"target_modules": "all-linear"},
                  {"target_modules": r"model\.layers\.\d+\..*_proj"},
                  {"target_modules": ["v_proj", "o_proj", "q_proj", "k_proj", "up_proj", "gate_proj", "down_proj"]}):
        config = going_on(recipe("x"), tmp_path / "run", tmp_path / "a", **given)
        module.begin_adapter(config, tiny_decoder())


def test_another_notation_of_other_modules_is_refused_when_the_model_is_known(recipe, tmp_path):  # noqa: F811
    inject(tiny_decoder(), LoraConfig(r=4, target_modules=["q_proj"])).save(tmp_path / "a")
    config = going_on(recipe("x"), tmp_path / "run", tmp_path / "a", target_modules="all-linear")
    net = tiny_decoder()
    with pytest.raises(AdapterError, match="target_modules='all-linear' means other modules than the adapter"):
        module.begin_adapter(config, net)
    assert adapters_of(net) is None and not (tmp_path / "run" / "start").exists()


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop(next(iter(tensors))), "is missing"),
    (lambda tensors: tensors.update(more=np.ones(3, np.float32)), "'more' of shape .* is not part of the adapter"),
    (lambda tensors: tensors.update({key: value * np.nan for key, value in list(tensors.items())[:1]}), "not finite"),
])
def test_the_folder_is_checked_like_any_load(recipe, tmp_path, change, words):  # noqa: F811
    inject(tiny_decoder(), LoraConfig(r=4, target_modules=["q_proj"])).save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=words):
        module.train(going_on(recipe("x"), tmp_path / "run", tmp_path / "a"))


def test_a_folder_that_is_not_there_is_said_by_training(recipe, tmp_path):  # noqa: F811
    with pytest.raises(AdapterError, match="there is no adapter folder"):
        module.train(going_on(recipe("x"), tmp_path / "run", tmp_path / "none"))


def test_a_folder_above_adapters_is_said_when_the_recipe_is_read(recipe, tmp_path):  # noqa: F811
    module.train(recipe("a", steps=1))
    with pytest.raises(ConfigError, match="is a folder above adapters.*name one of them"):
        going_on(recipe("x"), tmp_path / "run", tmp_path / "a")
