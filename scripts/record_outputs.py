"""What a revision answers, in one file: the worker of compare_outputs.py, run against the package that PYTHONPATH
names.

    record_outputs.py FILE ADAPTERS FOLDER [--formats float32 ...] [--steps N]

Only the public API is used, so that older revisions can be asked, too. FILE is written as JSON: tokens, records and
digests of logits of 20 mixed requests for each weight format, and the losses of a training.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

import numpy as np

FORMATS = ("float32", "bfloat16", "int8", "int4")
ADAPTERS = ("one", "two")
TEXTS = ("The capital of France is", "Once upon a time there was a", "def fibonacci(n):\n", "12 + 30 =",
         "Water boils at", "My favourite colour is blue because")


def mixed_requests(count: int = 20) -> "list[dict]":
    """Requests on the base and two adapters, greedy and sampled, with fixed and adaptive contrasts, of many lengths."""
    from colora_ms import Contrast, Sampling

    draw = random.Random(7)
    found = []
    for number in range(count):
        adapter = (None, "one", "two", "one")[number % 4]
        contrast = None
        if adapter is not None and number % 3:
            contrast = Contrast(alpha=draw.choice((0.05, 0.1, 0.3)), beta=draw.choice((0.25, 0.5, 1.0)))
        sampling = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=number) if number % 5 == 2 else None
        prompt = TEXTS[number % len(TEXTS)] * (1 + number % 3)
        found.append({"prompt": prompt, "adapter": adapter, "contrast": contrast, "sampling": sampling,
                      "max_new_tokens": draw.randrange(5, 20)})
    return found


def answers(weight_format: str, adapters: "dict[str, str]") -> dict:
    """Tokens, texts and records of the mixed requests and digests of logits, in one weight format."""
    from mindspore import Tensor

    from colora_ms import Generator, runtime

    generator = Generator.from_pretrained("smollm2-135m", adapters, weight_format=weight_format)
    requests = mixed_requests()
    columns = {name: [one[name] for one in requests] for name in ("adapter", "contrast", "sampling", "max_new_tokens")}
    done = generator.generate([one["prompt"] for one in requests], **columns, records=True)
    stopped = generator.generate([one["prompt"] for one in requests[:6]], adapter="one", max_new_tokens=12,
                                 stop=["\n", " the"])
    ids = np.random.default_rng(3).integers(5, 40000, (4, 24)).astype(np.int32)
    lengths, slots = np.array([24, 3, 11, 17], np.int32), np.array([-1, 0, 1, 0], np.int32)
    logits = runtime.run(generator.decoder, Tensor(ids), Tensor(lengths), Tensor(slots)).asnumpy()
    real = [logits[row, :length] for row, length in enumerate(lengths)]
    return {
        "tokens": [list(map(int, one.tokens)) for one in [*done, *stopped]],
        "texts": [one.text for one in [*done, *stopped]],
        "records": [[[r.token, r.favourite, r.valid, *(float(v).hex() for v in (r.expert, r.amateur, r.score, r.best))]
                     for r in one.records] for one in done],
        "logits": [hashlib.sha256(np.ascontiguousarray(row, np.float32).tobytes()).hexdigest() for row in real],
    }


def losses(folder: Path, steps: int) -> "list[str]":
    """The losses of a training on SmolLM2, exactly."""
    import yaml

    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.run import train

    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(3, 23) for b in range(10, 90, 7)]
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": "smollm2-135m", "output": str(folder / "run"),
        "adapter": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": {"kind": "jsonl", "path": str(folder / "sums.jsonl")}, "template": "{prompt}{completion}",
                 "max_length": 17, "batch_size": 4, "buckets": [16]},
        "optimizer": {"learning_rate": 1e-3}, "loop": {"steps": steps, "seed": 0, "progress": False}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [float(loss).hex() for loss in train(TrainingConfig.from_yaml(folder / "recipe.yaml")).losses]


def main(arguments: "list[str] | None" = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("adapters", type=Path, help=f"holds the adapters {' and '.join(ADAPTERS)}")
    parser.add_argument("folder", type=Path, help="for the training")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--steps", type=int, default=20, help="updates of the training; 0: none")
    chosen = parser.parse_args(arguments)
    adapters = {name: str(chosen.adapters / name) for name in ADAPTERS}
    found = {weight_format: answers(weight_format, adapters) for weight_format in chosen.formats}
    if chosen.steps:
        found["training"] = {"losses": losses(chosen.folder, chosen.steps)}
    import colora_ms

    found["package"] = str(Path(colora_ms.__file__).parent)
    chosen.file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
