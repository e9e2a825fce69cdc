"""Run by test_tensor_parallel under msrun: logits, greedy tokens and training of a split model, written by every
worker.

    msrun ... tensor_parallel_job.py MODEL_FOLDER ADAPTER_FOLDER OUTPUT_FOLDER
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import mindspore as ms
from mindspore import Tensor

from colora_ms import Contrast, Generator, runtime
from colora_ms.distributed import save_whole, shard_decoder, workers
from colora_ms.models.config import DecoderConfig
from colora_ms.models.tokenizer import load_tokenizer
from colora_ms.training.batching import Batch
from colora_ms.training.config import OptimizerConfig
from colora_ms.training.split import SplitAdamW
from colora_ms.training.step import Stepper

PROMPTS = ["one and two", "f", "five five five"]
IDS = np.array([[5, 9, 200, 31, 7], [8, 100, 3, 0, 0], [77, 0, 0, 0, 0]], np.int32)
LENGTHS, SLOTS = np.array([5, 3, 1], np.int32), np.array([0, -1, 0], np.int32)


def results(decoder, handle, tokenizer):
    """{name: array} of one model, whole or split."""
    logits = runtime.run(decoder, Tensor(IDS), Tensor(LENGTHS), Tensor(SLOTS)).asnumpy()
    answers = Generator(decoder, tokenizer, handle).generate(
        PROMPTS, adapter=["a", None, "a"], contrast=[Contrast(0.1, 0.5), None, None], max_new_tokens=6)
    return {"logits": logits, **{f"tokens{k}": np.array(answer.tokens) for k, answer in enumerate(answers)}}


def trained(decoder, **options):
    """{name: array}: loss and norm of the updates of a short training, whose gradients are clipped."""
    random = np.random.default_rng(1)
    stepper = Stepper(decoder, OptimizerConfig(learning_rate=0.01, max_grad_norm=0.5), **options)
    found = []
    for step in range(1, 5):
        ids = random.integers(1, 250, (3, 9)).astype(np.int32)
        lengths = np.array([9, 4, 7], np.int32)
        labels = np.where(np.arange(9) < lengths[:, None], np.roll(ids, -1, 1), -100).astype(np.int32)
        batch = Batch(ids, labels, lengths)
        found.append(stepper([batch], step, 4))
    return dict(zip(("losses", "norms"), np.array(found).T))


if __name__ == "__main__":
    model, adapter, output = sys.argv[1:]
    team = workers.start()
    ms.set_context(mode=ms.GRAPH_MODE)
    config = DecoderConfig.from_hf(json.loads((Path(model) / "config.json").read_text()))
    weights = load_file(Path(model) / "model.safetensors")
    decoder, handle = shard_decoder(config, weights, team, adapters={"a": adapter})
    assert decoder.model.layers[0].mlp.up_proj.out_features == config.intermediate_size // team.world
    found = results(decoder, handle, load_tokenizer(model))
    decoder, handle = shard_decoder(config, weights, team, adapters={"a": adapter}, trainable=True)
    found.update(trained(decoder, optimizer=functools.partial(SplitAdamW, team=team)))
    save_whole(handle, Path(output) / "trained", team, "a")
    np.savez(Path(output) / f"worker{team.rank}.npz", **found)
