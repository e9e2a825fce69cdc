"""Step 12, run by msrun in two processes: the settings stand before the job is joined, then barrier, sums, data
parallel and tensor parallel generation, compared with what one process gives."""
import argparse
import json
from pathlib import Path

import child  # noqa: F401 - it makes the package importable
import numpy as np

PROMPTS = [[5, 9, 200, 31], [8, 100, 3], [77], [44, 45, 46, 47, 48]]


def tokens(decoder, handle, prompts, adapter):
    """Greedy tokens of prompts."""
    from child_model import Words

    from colora_ms import Generator

    done = Generator(decoder, Words(), handle, max_rows=8).generate(prompts, adapter=adapter, max_new_tokens=4,
                                                                   ignore_eos=True)
    return [list(one.tokens) for one in done]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="Ascend")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    import mindspore as ms

    ms.set_device(options.target)
    from child_model import SIZES, build

    from colora_ms.distributed import shard_decoder, workers
    from colora_ms.models.config import DecoderConfig

    team = workers.start()  # before the first operator of ours: each compiles into the folder of its rank
    ms.set_context(mode=ms.GRAPH_MODE)
    wrong, done = [], []

    def check(name, right):
        done.append(name)
        if not right:
            wrong.append(f"{name} is wrong")

    team.wait()  # nobody compiles while another one still loads: HCCL gives up on those who come late
    check("barrier", team.world == 2)
    total = ms.ops.AllReduce()(ms.Tensor(np.full(1024, team.rank + 1.0, np.float32))).asnumpy()
    check("sum over the cards", bool((total == 3).all()))
    decoder, handle = build(1, "float32")
    whole = tokens(decoder, handle, PROMPTS, "one")
    mine = tokens(decoder, handle, team.split(PROMPTS), "one")
    check("data parallel", team.join(mine) == whole)
    config = DecoderConfig(num_hidden_layers=1, **SIZES)
    rng = np.random.default_rng(11)
    weights = {name: (rng.standard_normal(shape) * 0.08 + ("norm" in name)).astype(np.float32)
               for name, shape in config.parameter_shapes().items()}
    if team.first:
        handle.save(options.out / "adapter", "one")
    team.wait()
    split, parts = shard_decoder(config, weights, team, adapters={"one": str(options.out / "adapter")})
    check("tensor parallel, shares of an adapter", tokens(split, parts, PROMPTS, "one") == whole)
    team.wait()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"worker{team.rank}.json").write_text(json.dumps({"wrong": wrong, "done": done}))


if __name__ == "__main__":
    main()
