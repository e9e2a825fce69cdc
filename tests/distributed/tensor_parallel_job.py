"""Run by test_tensor_parallel under msrun: logits and greedy tokens of a split model, written by every worker.

    msrun ... tensor_parallel_job.py MODEL_FOLDER ADAPTER_FOLDER OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import mindspore as ms
from mindspore import Tensor

from colora_ms import Contrast, Generator, runtime, workers
from colora_ms.adapters.tensor_parallel import shard_decoder
from colora_ms.models.config import DecoderConfig
from colora_ms.models.tokenizer import load_tokenizer

PROMPTS = ["one and two", "f", "five five five"]
IDS = np.array([[5, 9, 200, 31, 7], [8, 100, 3, 0, 0], [77, 0, 0, 0, 0]], np.int32)
LENGTHS, SLOTS = np.array([5, 3, 1], np.int32), np.array([0, -1, 0], np.int32)


def results(decoder, handle, tokenizer):
    """{name: array} of one model, whole or split."""
    logits = runtime.run(decoder, Tensor(IDS), Tensor(LENGTHS), Tensor(SLOTS)).asnumpy()
    answers = Generator(decoder, tokenizer, handle).generate(
        PROMPTS, adapter=["a", None, "a"], contrast=[Contrast(0.1, 0.5), None, None], max_new_tokens=6)
    return {"logits": logits, **{f"tokens{k}": np.array(answer.tokens) for k, answer in enumerate(answers)}}


if __name__ == "__main__":
    model, adapter, output = sys.argv[1:]
    team = workers.start()
    ms.set_context(mode=ms.GRAPH_MODE)
    config = DecoderConfig.from_hf(json.loads((Path(model) / "config.json").read_text()))
    decoder, handle = shard_decoder(config, load_file(Path(model) / "model.safetensors"), team, adapters={"a": adapter})
    assert decoder.model.layers[0].mlp.up_proj.out_features == config.intermediate_size // team.world
    np.savez(Path(output) / f"worker{team.rank}.npz", **results(decoder, handle, load_tokenizer(model)))
