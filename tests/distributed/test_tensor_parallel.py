"""A decoder split over two real processes against the whole one; the cuts by themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from colora_ms.distributed import loading
from colora_ms.distributed.adapter_files import shard_adapter
from colora_ms.distributed.loading import load_sharded, shard_decoder
from colora_ms.distributed.shares import joined, local_config, share_of
from colora_ms.cli import main
from colora_ms.errors import AdapterError, ConfigError
from colora_ms.models.config import DecoderConfig
from colora_ms.distributed.workers import Workers

HERE = Path(__file__).resolve().parent
SIZES = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32), "gate_proj": (48, 32),
         "up_proj": (48, 32), "down_proj": (32, 48)}


def write_adapter(folder, **changes):
    random = np.random.default_rng(3)
    tensors = {}
    for layer in range(2):
        for name, (out, inner) in SIZES.items():
            key = f"base_model.model.model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
            tensors[f"{key}.lora_A.weight"] = (random.standard_normal((4, inner)) * 0.3).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = (random.standard_normal((out, 4)) * 0.3).astype(np.float32)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(SIZES), "bias": "none", **changes}))
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


def test_two_workers_give_the_logits_tokens_and_training_of_the_whole_model(tiny_folder, tmp_path):
    from colora_ms.adapters import load_adapters
    from colora_ms.models import load_model
    from tensor_parallel_job import results, trained

    adapter = write_adapter(tmp_path / "adapter")
    sys.path.insert(0, str(HERE.parents[1] / "scripts"))
    from msrun_launch import environment, free_port, parse
    command = ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}", "--join=True",
               "--cluster_time_out=100", f"--log_dir={tmp_path / 'logs'}", str(HERE / "tensor_parallel_job.py"),
               str(tiny_folder), str(adapter), str(tmp_path)]
    decoder, tokenizer = load_model(str(tiny_folder))
    want = results(decoder, load_adapters(decoder, {"a": adapter}), tokenizer)
    decoder, _ = load_model(str(tiny_folder))
    handle = load_adapters(decoder, {"a": adapter}, trainable=True)
    want.update(trained(decoder))
    handle.save(tmp_path / "whole", "a")
    with open(tmp_path / "msrun.log", "w") as log:
        job = subprocess.Popen(command, env=environment(parse(["evaluate", "-n", "2"])[0]), stdout=log,
                               stderr=subprocess.STDOUT)
    try:
        job.wait(150)
    finally:
        # Killing msrun alone would leave its workers behind; they have sessions of their own.
        for process in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []:
            process.kill()
        job.kill()
    assert job.returncode == 0, (tmp_path / "msrun.log").read_text()
    first, second = (np.load(tmp_path / f"worker{rank}.npz") for rank in range(2))
    for name in want:
        np.testing.assert_array_equal(first[name], second[name])
    real = np.arange(5)[None] < np.array([5, 3, 1])[:, None]
    # Two partial sums a linear in place of one: float32 rounding on logits of size 10.
    np.testing.assert_allclose(first["logits"][real], want["logits"][real], rtol=1e-4, atol=1e-4)
    for k in range(3):
        np.testing.assert_array_equal(first[f"tokens{k}"], want[f"tokens{k}"])
    # Sums over the halves of a linear, in another order; 4 updates of Adam carry the rounding on.
    np.testing.assert_allclose(first["losses"], want["losses"], rtol=2e-5)
    np.testing.assert_allclose(first["norms"], want["norms"], rtol=1e-4)
    assert want["norms"].min() > 0.5, "no gradient was clipped"
    ours, theirs, old = (load_file(folder / "adapter_model.safetensors")
                         for folder in (tmp_path / "trained", tmp_path / "whole", adapter))
    assert ours.keys() == theirs.keys() == old.keys() and len(ours) == 28
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-4, err_msg=name)
        assert np.abs(value - old[name]).max() > 0.01, name
    assert (tmp_path / "trained" / "adapter_config.json").is_file()


def test_generate_splits_the_model_over_two_workers(start, tiny_folder, tmp_path, capsys):
    adapter, prompts = write_adapter(tmp_path / "adapter"), ["one and two", "f", "five five five"]
    options = ["--model", str(tiny_folder), "--adapter", str(adapter), "--contrast", "--max-new-tokens", "6", "--json", *prompts]
    job = start("msrun_evaluate.sh", "generate", "-n", 2, "--log-dir", tmp_path / "logs", "--tensor-parallel", "--output",
                tmp_path / "two.jsonl", *options)
    assert main(["generate", *options]) == 0
    one = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    code, output = job.wait()
    assert code == 0, output
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["tokens"]) for row in two] == [(row["prompt"], row["tokens"]) for row in one]
    assert [row["prompt"] for row in one] == prompts and len({tuple(row["tokens"]) for row in one}) == 3


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_shares_make_up_the_whole_linear(world):
    random = np.random.default_rng(0)
    x, w, b = random.standard_normal((3, 8)), random.standard_normal((12, 8)), random.standard_normal(12)
    down, up = random.standard_normal((2, 8)), random.standard_normal((12, 2))
    y = x @ w.T + b + x @ down.T @ up.T
    teams = [Workers(rank, world) for rank in range(world)]

    def parts(team, linear):
        prefix = f"model.layers.0.block.{linear}."
        return [share_of(prefix + field, value, team) for field, value in
                (("weight", w), ("bias", b), ("lora_A.weight", down), ("lora_B.weight", up))]
    columns = [parts(team, "gate_proj") for team in teams]
    np.testing.assert_allclose(np.concatenate([x @ W.T + B + x @ D.T @ U.T for W, B, D, U in columns], 1), y)
    rows = [parts(team, "down_proj") for team in teams]
    for linear, found in (("gate_proj", columns), ("down_proj", rows)):
        for k, field, value in ((2, "lora_A", down), (3, "lora_B", up)):
            np.testing.assert_array_equal(joined(f"a.{linear}.{field}.weight", [part[k] for part in found]), value)
    split = np.split(x, world, 1)
    np.testing.assert_allclose(sum(z @ W.T + B + z @ D.T @ U.T for z, (W, B, D, U) in zip(split, rows)), y)
    assert share_of("model.norm.weight", b, teams[-1]) is b and share_of("lm_head.weight", w, teams[-1]) is w


def test_what_cannot_be_split_is_refused(tmp_path, monkeypatch, capsys):
    config = DecoderConfig(model_type="llama", vocab_size=9, hidden_size=12, intermediate_size=10, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=16)
    assert local_config(config, 2).intermediate_size == 5
    with pytest.raises(ConfigError, match="4 workers cannot share num_key_value_heads=2, intermediate_size=10"):
        local_config(config, 4)
    with pytest.raises(ConfigError, match="'int8' cannot be split"):
        shard_decoder(config, {}, Workers(0, 2), "int8")
    for number, (changes, words) in enumerate([
            ({"use_dora": True}, "only plain LoRA.*use_dora"), ({"peft_type": "LILY"}, "only plain LoRA.*LILY"),
            ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base.*as_lora=True")]):
        with pytest.raises(AdapterError, match=words):
            shard_adapter(write_adapter(tmp_path / str(number), **changes), tmp_path / "out", Workers(0, 2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="adapter_model.safetensors cannot be read"):
        shard_adapter(tmp_path / "empty", tmp_path / "out", Workers(0, 2))
    for kind, words in [({"quantized": object(), "low_rank": {}}, "integer linears"),
                        ({"quantized": None, "low_rank": {"a": None}}, "decomposed linears")]:
        monkeypatch.setattr(loading, "open_checkpoint", lambda path, kind=kind: SimpleNamespace(path=path, **kind))
        with pytest.raises(ConfigError, match=f"empty has {words}.*cannot be split"):
            load_sharded(str(tmp_path / "empty"), Workers(0, 2))
    assert main(["generate", "--tensor-parallel", "one"]) == 2 and "needs several workers" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")
