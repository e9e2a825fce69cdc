"""Compare Lily with LoRA at equal parameter count: same data, steps and seeds, on two tasks.

    python scripts/compare_adapters.py --json compare.json --markdown model_zoo/smollm2-135m/LILY.md

Every run trains from model_zoo/smollm2-135m/lily.yaml with the adapter, task, steps and seed changed, in a process of
its own, then is scored on held-out items. A run's result is kept in the JSON file at once; started again with the same
file, the script goes on with the runs that are missing. The second task needs the Banking77 data (train.csv, test.csv
of PolyAI-LDN/task-specific-datasets, CC BY 4.0) in a folder given by --banking77.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark_common import ROOT, BenchmarkError, machine

RECIPE = ROOT / "model_zoo" / "smollm2-135m" / "lily.yaml"

#: The LoRA that Lily is compared with; Lily's rank is chosen so that the parameter counts are nearest.
LORA = {"method": "lora", "r": 8, "lora_alpha": 16}

#: Intents of the Banking77 task: the ten with most training items.
INTENTS = 10

TASKS = ("chain_sum", "banking77")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="compare_adapters.json",
                        help="results; runs that it holds are not made again")
    parser.add_argument("--markdown", default=None, help="file for the table")
    parser.add_argument("--banking77", default=str(ROOT.parent / "shared" / "data" / "banking77"),
                        help="folder of the data")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30, help="updates of each training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--items", type=int, default=150, help="held-out items of each task")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of both methods")
    parser.add_argument("--scaling", type=float, default=1.0, help="Lily's scaling")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(one_run(json.loads(arguments.child))))
        return 0
    return compare(arguments)


def compare(arguments):
    """Make all runs that the JSON file lacks, then print and write the table."""
    path = Path(arguments.json)
    state = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    ranks = equal_ranks(arguments.scaling)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method, adapter in ranks.items():
                name = f"{task}/{method}/{seed}"
                wanted = {"task": task, "method": method, "seed": seed, "adapter": adapter, "steps": arguments.steps,
                          "batch_size": arguments.batch_size, "items": arguments.items,
                          "learning_rate": arguments.learning_rate}
                known = state["runs"].get(name)
                if known and known["setup"] == wanted:
                    continue
                print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
                state["runs"][name] = {"setup": wanted, **child({**wanted, "banking77": arguments.banking77})}
                print(f"         {state['runs'][name]['result']}", flush=True)
                state.update(machine=machine(), table=table(state["runs"]))
                path.write_text(json.dumps(state, indent=1) + "\n")
    print("\n" + table(state["runs"]))
    if arguments.markdown:
        write_markdown(Path(arguments.markdown), state, arguments)
    return 0


def child(settings):
    """One run in a process of its own: memory and graphs are gone afterwards."""
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(settings)], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "3"}, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"the run {settings} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {"result": json.loads(done.stdout.strip().splitlines()[-1])}


def equal_ranks(scaling):
    """{method: adapter section} with Lily's rank chosen for the parameter count nearest to the LoRA's."""
    import yaml

    from colora_ms.adapters import LilyConfig, LoraConfig, lily_plan, matching
    modules = linears_of_the_model()
    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["adapter"]
    targets = settings["target_modules"]
    lora = LoraConfig(r=LORA["r"], target_modules=targets)
    wanted = lily_plan.parameter_count(matching.plan(lora, modules), modules, matching.value_shapes)

    def count(r):
        config = LilyConfig(**{**{k: v for k, v in settings.items() if k != "method"}, "r": r})
        return lily_plan.parameter_count(lily_plan.plan(config, modules), modules)

    best = min(range(1, 513), key=lambda r: abs(count(r) - wanted))
    print(f"LoRA of rank {LORA['r']}: {wanted:,} parameters; Lily of rank {best}: {count(best):,}")
    return {"lora": {**LORA, "target_modules": targets}, "lily": {**settings, "r": best, "scaling": scaling}}


def linears_of_the_model():
    """{name: Module} of the recipe's model, from its config alone."""
    from colora_ms.adapters.matching import Module
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    shapes = open_checkpoint(resolve_model("smollm2-135m")).config.parameter_shapes()
    return {name.removesuffix(".weight"): Module("linear", shape[1], shape[0], {"weight": tuple(shape)})
            for name, shape in shapes.items() if name.endswith("_proj.weight")}


def one_run(settings):
    """Train and score one adapter."""
    from colora_ms import runtime
    from colora_ms.adapters import inject
    from colora_ms.models import load_model
    from colora_ms.training.config import TrainingConfig, read_yaml
    from colora_ms.training.run import encode_data, load_data
    from colora_ms.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        recipe = read_yaml(RECIPE)
        recipe.update(output=f"{folder}/run", adapter=settings["adapter"],
                      data=data_of(recipe["data"], settings, folder),
                      evaluate=None)
        recipe["optimizer"]["learning_rate"] = settings["learning_rate"]
        recipe["loop"] = {"steps": settings["steps"], "seed": settings["seed"], "progress": False}
        config = TrainingConfig.from_dict(recipe)
        runtime.configure()
        train_examples, held_out, _ = load_data(config)
        decoder, tokenizer = load_model(config.model)
        data, test = encode_data(config, tokenizer, train_examples, held_out, decoder)
        handle = inject(decoder, config.adapter_config(), seed=settings["seed"])
        trainer = Trainer(decoder, data, config, handle.save)
        batches = trainer._loader(test, 0, 1, shuffle=False).epoch_batches()
        result = trainer.train()
        loss, right = score(trainer.stepper, batches)
    return {"parameters": sum(item.size for item in handle.trainable_params()), "accuracy": right / len(test.items),
            "items": len(test.items), "held_out_loss": loss, "last_training_loss": statistics.mean(result.losses[-10:]),
            "training_seconds": result.seconds}


def score(stepper, batches):
    """(mean loss of the answers' tokens, number of answers that greedy decoding gives exactly, their end included).

    Greedy decoding gives an answer exactly if the most likely token is the right one at each of its places, so that one
    pass over the items tells it.
    """
    import mindspore as ms
    from mindspore import nn, ops

    from colora_ms import runtime
    from colora_ms.training.encoding import IGNORE

    class Scores(nn.Cell):
        """(sum of the losses, number of answer tokens, number of rows that are right throughout and have an answer)."""

        def __init__(self, decoder):
            super().__init__(auto_prefix=False)
            self.decoder = decoder

        def construct(self, ids, labels, lengths, slots):
            logits = self.decoder(ids, lengths, slots)
            asked = labels != IGNORE
            wanted = ops.expand_dims(ops.maximum(labels, 0), -1)
            losses = ops.logsumexp(logits, -1) - ops.gather_elements(logits, -1, wanted).squeeze(-1)
            counted = asked.astype(ms.float32)
            fine = ops.logical_or(ops.argmax(logits, -1).astype(ms.int32) == labels, ops.logical_not(asked))
            right = ops.logical_and(fine.all(axis=1), asked.any(axis=1)).astype(ms.float32)
            return (losses * counted).sum(), counted.sum(), right.sum()

    cell = Scores(stepper.loss_cell.decoder).set_train(False)
    total, count, right = 0.0, 0.0, 0
    for batch in batches:
        sums = [float(value.asnumpy()) for value in runtime.run(cell, *stepper.tensors(batch))]
        total, count, right = total + sums[0], count + sums[1], right + round(sums[2])
    return total / count, right


def data_of(data, settings, folder):
    """The section ``data`` of a run."""
    data = {**data, "batch_size": settings["batch_size"]}
    data["validation"] = {**data["validation"], "size": settings["items"]}
    if settings["task"] == "chain_sum":
        return data
    train, test = banking77(Path(settings["banking77"]), settings["items"])
    for name, rows in (("train", train), ("test", test)):
        Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {**data, "train": f"{folder}/train.jsonl", "validation": f"{folder}/test.jsonl", "max_length": 49,
            "template": "Customer: {prompt}\nIntent: {completion}", "buckets": [48]}


def banking77(folder, items):
    """(training rows, ``items`` test rows spread over the intents) of the most frequent intents; long queries left
    out."""
    sets = []
    for name in ("train", "test"):
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise BenchmarkError(f"there is no {path}; give the folder of the Banking77 data with --banking77, or "
                                 "leave the task out with --tasks chain_sum")
        with open(path, encoding="utf-8", newline="") as file:
            sets.append(list(csv.DictReader(file)))
    counts = {}
    for row in sets[0]:
        counts[row["category"]] = counts.get(row["category"], 0) + 1
    chosen = sorted(counts, key=lambda name: (-counts[name], name))[:INTENTS]
    found = [[{"prompt": " ".join(row["text"].split()), "completion": row["category"].replace("_", " ")}
              for row in rows if row["category"] in chosen and len(row["text"].split()) <= 22] for rows in sets]
    return found[0], found[1][::max(len(found[1]) // items, 1)][:items]


def table(runs):
    """Mean and standard deviation over the seeds, a row for each task and method; then the paired differences."""
    lines = ["| task | method | parameters | seeds | accuracy, % | held-out loss | training loss, last 10 updates |",
             "|---|---|---|---|---|---|---|"]
    groups = {}
    for name, run in sorted(runs.items()):
        task, method, seed = name.split("/")
        groups.setdefault((task, method), {})[seed] = run["result"]
    for (task, method), results in groups.items():
        rows = list(results.values())
        lines.append(f"| {task} | {method} | {rows[0]['parameters']:,} | {len(rows)} | "
                     + " | ".join([spread([100 * row["accuracy"] for row in rows], 1),
                                   spread([row["held_out_loss"] for row in rows], 4),
                                   spread([row["last_training_loss"] for row in rows], 4)]) + " |")
    lines.append("")
    for task in dict.fromkeys(task for task, _ in groups):
        lora, lily = groups.get((task, "lora"), {}), groups.get((task, "lily"), {})
        both = [seed for seed in lora if seed in lily]
        if both:
            accuracy = [100 * (lily[s]["accuracy"] - lora[s]["accuracy"]) for s in both]
            loss = [lily[s]["held_out_loss"] - lora[s]["held_out_loss"] for s in both]
            lines.append(f"{task}, Lily minus LoRA, seed by seed: accuracy {spread(accuracy, 1)} points, "
                         f"held-out loss {spread(loss, 4)}.")
    return "\n".join(lines)


def spread(values, digits):
    """"mean ± standard deviation"; the deviation needs two values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def write_markdown(path, state, arguments):
    """The table with what it takes to make it again."""
    where = state["machine"]
    setup = next(iter(state["runs"].values()))["setup"]
    lily = next(run["setup"]["adapter"] for run in state["runs"].values() if run["setup"]["method"] == "lily")
    path.write_text(f"""# Lily against LoRA at equal parameter count, SmolLM2-135M

Written by `scripts/compare_adapters.py`. Recipe: [lily.yaml](lily.yaml), shortened to {setup['steps']} updates of
{setup['batch_size']} examples, learning rate {setup['learning_rate']:g} for both methods; the same data, order and
seeds. LoRA: rank {LORA['r']}, alpha {LORA['lora_alpha']}. Lily: rank {lily['r']}, stride_A {lily['stride_A']},
num_B {lily['num_B']}, scaling {lily['scaling']:g}, pool {lily['router_pool']}. Both on
{', '.join(lily['target_modules'])}.
Accuracy: {setup['items']} held-out items at most whose whole answer greedy decoding gives; loss: nats a token of their
answers; banking77: the {INTENTS} most frequent intents.
Mean ± standard deviation over the seeds.

{table(state['runs'])}

Machine: {where['cpu']}, {where['processors']} processors.
""", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
