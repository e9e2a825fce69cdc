"""``colora-ms train`` with the model split over two workers, two such groups side by side, against one process."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from colora_ms.distributed.workers import Workers
from colora_ms.errors import ConfigError
from colora_ms.training.checkpoint import list_checkpoints
from colora_ms.training.config import TrainingConfig
from colora_ms.training.report import read_log
from colora_ms.training.run import train
from colora_ms.training.split import own_tensors, whole_tensors
from test_msrun_train import numbers, recipe

STEPS = 8
SPLIT = ("--set", "distributed.tensor_parallel=2")


def test_two_groups_of_two_workers_equal_one_process_and_resume(start, tiny_folder, tmp_path):
    train(recipe(tmp_path / "one", tiny_folder, 4, steps=STEPS, evaluate_every=4))
    folder, logs = tmp_path / "four", tmp_path / "logs"
    path = recipe(folder, tiny_folder, 2, steps=STEPS, evaluate_every=4, save_every=3, keep_checkpoints=9)
    code, output = start("msrun_train.sh", path, "-n", 4, "--log-dir", logs, *SPLIT).wait()
    assert code == 0, output
    assert output.count("adapter: ") == 1
    same_run(tmp_path / "one", folder, list(range(1, STEPS + 1)))

    # From the checkpoint of update 3 the run goes on as it went.
    first = numbers(folder)
    for step, old in list_checkpoints(folder / "run"):
        if step > 3:
            shutil.rmtree(old)
    shutil.rmtree(folder / "run" / "adapter")
    code, output = start("msrun_train.sh", path, "-n", 4, "--log-dir", logs, *SPLIT, "--resume").wait()
    assert code == 0, output
    assert numbers(folder) == first
    same_run(tmp_path / "one", folder, list(range(1, STEPS + 1)))


def same_run(alone, split, steps):
    """Losses within 1e-5, and one whole adapter, written once."""
    mine, theirs = numbers(split), numbers(alone)
    assert list(mine) == list(theirs) == steps
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-5)
    np.testing.assert_allclose(list(numbers(split, "evaluation").values()),
                               list(numbers(alone, "evaluation").values()), rtol=1e-5)
    tokens = [[row["tokens"] for row in read_log(one / "run" / "log.jsonl") if row["kind"] == "step"]
              for one in (split, alone)]
    assert tokens[0] == tokens[1]
    for kind in ("adapter", "best"):
        want, have = (load_file(one / "run" / kind / "adapter_model.safetensors") for one in (alone, split))
        assert want.keys() == have.keys()
        for name, value in want.items():
            np.testing.assert_allclose(have[name], value, atol=1e-4, err_msg=name)
        assert sorted(item.name for item in (split / "run" / kind).iterdir()) == \
            sorted(item.name for item in (alone / "run" / kind).iterdir())


def test_tensors_of_a_checkpoint_are_cut_and_joined_along_the_axis_of_their_linear():
    random = np.random.default_rng(0)
    whole = {f"{kind}model.layers.0.{name}": random.standard_normal((1, 4, 6)).astype(np.float32)
             for kind in ("parameter.", "adam_mean.")
             for name in ("self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B", "mlp.down_proj.lora_A",
                          "mlp.down_proj.lora_B")}
    parts = [own_tensors(whole, Workers(rank, 2)) for rank in range(2)]
    assert parts[0]["parameter.model.layers.0.self_attn.q_proj.lora_B"].shape == (1, 2, 6)
    assert parts[0]["adam_mean.model.layers.0.mlp.down_proj.lora_A"].shape == (1, 4, 3)
    assert parts[1]["adam_mean.model.layers.0.mlp.down_proj.lora_B"].shape == (1, 4, 6)

    class Both(Workers):
        def gather(self, value):
            return parts

    joined = whole_tensors(parts[0], Both(0, 2))
    for name, value in whole.items():
        np.testing.assert_array_equal(joined[name], value)


@pytest.mark.parametrize("change, message", [
    ({"distributed": {"tensor_parallel": 2}}, "1 workers cannot stand in groups of 2"),
    ({"distributed": {"tensor_parallel": 0}}, "tensor_parallel"),
    ({"distributed": {"tensor_parallel": 2}, "train": "dpo"}, "is for train: sft"),
    ({"distributed": {"pipeline": 2}}, "pipeline")])
def test_what_cannot_be_split_is_refused_by_name(tiny_folder, tmp_path, change, message):
    import yaml

    values = yaml.safe_load(recipe(tmp_path, tiny_folder, 4).read_text())
    with pytest.raises(ConfigError, match=message):
        train(TrainingConfig.from_dict({**values, **change}))
