"""Does the contrast help? CoLD and its adaptive forms against greedy decoding of the same adapter, on one task.

    python scripts/contrast_data.py steps
    colora-ms train model_zoo/smollm2-135m/contrast-steps.yaml
    python scripts/experiment_contrast.py steps --json runs/contrast/steps.json
    python scripts/experiment_contrast.py --table runs/contrast/*.json --into model_zoo/smollm2-135m/CONTRAST.md

alpha, beta and the form are chosen on the validation questions alone. On the test questions, which are read once, these
decode: greedy, the paper's rule with alpha 0.1 and beta 0.5, the best fixed contrast of the validation, the best one of
each adaptive form, each paired with greedy by an exact McNemar test. ``tune-contrast``'s answer ("off", or a contrast)
is one of them. Speeds are measured on some test questions by themselves, since settled items are not decoded twice in
the comparison. An interrupted run goes on where it stopped.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own warnings are for its developers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROOT = Path(__file__).resolve().parents[1]

# recipe of the adapter, scorer, longest answer in tokens
TASKS = {"steps": ("smollm2-135m/contrast-steps.yaml", "number", 24),
         "banking77": ("smollm2-135m/contrast-banking77.yaml", "normalised", 16),
         "wikisql": ("smollm2-135m/contrast-wikisql.yaml", "normalised", 48),
         "svamp": ("qwen2.5-0.5b/svamp.yaml", "number", 28)}
ADAPTIVE = ("entropy", "divergence", "margin", "copies")


def form(contrast):
    """The row group of a contrast: its form, or "copies"."""
    return "copies" if contrast.skip_copies else contrast.adapt


def finalists(comparison):
    """Contrasts for the test: the paper's usual one, the best fixed one, the best of each adaptive form."""
    from colora_ms.decoding import Contrast

    chosen = [Contrast(0.1, 0.5)]
    for wanted in ("fixed", *ADAPTIVE):
        group = [r for r in comparison.results if form(r.contrast) == wanted]
        if group:
            best = max(group, key=lambda r: (r.accuracy, -r.changed_share)).contrast
            if best not in chosen:
                chosen.append(best)
    return chosen


def speeds(generator, examples, contrasts, settings, batch_size):
    """tokens/s of greedy decoding and of each contrast, all questions decoded in full."""
    from colora_ms.evaluation.evaluate import evaluate

    found = {}
    for label, contrast in [("greedy", None), *((c.label, c) for c in contrasts)]:
        result = evaluate(generator, examples, settings["scorer"], template=settings["template"], batch_size=batch_size,
                          options={"adapter": settings["adapter"], "contrast": contrast,
                                   "max_new_tokens": settings["max_new_tokens"]})
        found[label] = result.tokens_per_second
    return found


def run(arguments):
    from colora_ms.adapters import digest
    from colora_ms.decoding import Generator
    from colora_ms.evaluation.evaluate import model_hash
    from colora_ms.evaluation.tuning import DEFAULT_GRID, choose_contrast, compare_contrasts
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.sources import load_examples
    from colora_ms.training.templates import make_template
    from colora_ms.versions import versions

    started = time.perf_counter()
    recipe, scorer, longest = TASKS[arguments.task]
    config = TrainingConfig.from_yaml(ROOT / "model_zoo" / recipe)
    adapter = Path(arguments.adapter or Path(config.output) / "adapter")
    if (adapter.parent / "recipe.yaml").is_file():  # the settings of the run, should they differ from the recipe's
        config = TrainingConfig.from_yaml(adapter.parent / "recipe.yaml")
    items = {part: load_examples(str(arguments.data / f"{arguments.task}.{part}.jsonl"))[:size]
             for part, size in (("validation", arguments.validation), ("test", arguments.test))}
    generator = Generator.from_pretrained(config.model, {"task": adapter}, weight_format=arguments.weights,
                                          max_rows=arguments.rows)
    settings = {"template": make_template(config.data.template, generator.tokenizer, config.data.system),
                "scorer": scorer, "adapter": "task", "max_new_tokens": longest}
    shared = {**settings, "batch_size": arguments.rows // 2, "adapter_hash": digest(adapter),
              "model_hash": model_hash(config.model, arguments.weights),
              "progress": lambda name, line: print(f"  [{time.perf_counter() - started:5.0f} s] {name}: {line}",
                                                   flush=True)}
    name = arguments.name or arguments.task
    folder = arguments.output / name
    print(f"{name}: {len(items['validation'])} validation questions, {len(DEFAULT_GRID)} contrasts", flush=True)
    validation = compare_contrasts(generator, items["validation"], contrasts=DEFAULT_GRID,
                                   folder=folder / "validation", **shared)
    choice = choose_contrast(validation)
    print(f"{validation.table()}\n\n{choice.summary()}\n\n{name}: {len(items['test'])} test questions", flush=True)
    contrasts = finalists(validation)
    test = compare_contrasts(generator, items["test"], contrasts=contrasts, folder=folder / "test", **shared)
    # The paper's rule and the dearest form: the others cost what the paper's rule costs.
    timed = [c for c in contrasts if c == contrasts[0] or c.adapt == "divergence"]
    measured = speeds(generator, items["test"][:arguments.timing], timed, settings, arguments.rows // 2) \
        if arguments.timing else {}
    result = {"task": arguments.task, "name": name, "model": Path(config.model).name,
              "training": {"steps": config.loop.steps, "batch_size": config.data.batch_size, "seed": config.loop.seed,
                           "adapter": config.adapter},
              "validation": validation.to_json(), "choice": choice.to_json(), "test": test.to_json(),
              "tokens_per_second": measured, "rows": arguments.rows, "cores": os.cpu_count(),
              "versions": versions("mindspore", "numpy", "reasoning-gym"), "seconds": time.perf_counter() - started}
    print(f"\n{markdown(result)}", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def markdown(result):
    """The section of one task, from its results file."""
    test, validation, speed = result["test"], result["validation"], result["tokens_per_second"]
    by_label = {row["label"]: row for row in validation["contrasts"]}
    choice = result["choice"]
    name, training = result.get("name", result["task"]), result["training"]
    lines = [f"### {name}", "",
             f"{result.get('model', 'smollm2-135m')}, {training['steps']} updates of {training['batch_size']} "
             f"questions; {validation['items']} validation questions, {test['items']} test questions "
             f"({test['settled']} of them settled: no contrast with this alpha can change their answer). tune-contrast "
             f"says: **{'off' if choice['contrast'] is None else 'on'}** (best of all on validation: "
             f"{choice['best']['label']}, gain {choice['gain']} items, p = {choice['p_value']:.2g}).", "",
             "| decoder | validation | test | 95 % interval | fixed | broken | p | tokens changed | tokens/s |",
             "|---|---|---|---|---|---|---|---|---|"]

    def row(name, known, entry):
        low, high = entry["interval"]
        pair = [str(entry.get(key, "")) for key in ("fixed", "broken")]
        p = f"{entry['p_value']:.2g}" if "p_value" in entry else ""
        share = f"{100 * entry['changed_share']:.1f} %" if "changed_share" in entry else ""
        rate = f"{speed[name]:.0f}" if name in speed else ""
        lines.append(f"| {name} | {100 * known:.1f} % | {100 * entry['accuracy']:.1f} % | {100 * low:.1f} - "
                     f"{100 * high:.1f} % | {pair[0]} | {pair[1]} | {p} | {share} | {rate} |")

    row("greedy", validation["greedy"]["accuracy"], test["greedy"])
    for entry in test["contrasts"]:
        row(entry["label"], by_label[entry["label"]]["accuracy"], entry)
    return "\n".join(lines)


BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def tables(paths):
    """The sections of finished tasks, with the machine and the versions of the runs."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    notes = {f"Rows of a batch {r['rows']}, {r['cores']} cores, seed {r['training']['seed']}; "
             + ", ".join(f"{name} {version}" for name, version in r["versions"].items()) + "." for r in results}
    return "\n\n".join([*map(markdown, results), *sorted(notes)])


def put(text, path):
    """Replace what stands between the two markers of a Markdown file."""
    page = path.read_text(encoding="utf-8")
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{path} has no lines {BEGIN} and {END}; add them where the tables are to stand")
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="See the head of this file.")
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="only print the tables of these results")
    parser.add_argument("--into", type=Path, metavar="FILE", help="with --table: write them into this page")
    parser.add_argument("--data", type=Path, default=Path("runs/contrast/data"), help="what contrast_data.py wrote")
    parser.add_argument("--adapter", default=None, help="adapter folder; by default the recipe's")
    parser.add_argument("--name", default=None, help="heading and folder of the results; by default the task")
    parser.add_argument("--validation", type=int, default=100, help="validation questions")
    parser.add_argument("--test", type=int, default=300, help="test questions")
    parser.add_argument("--timing", type=int, default=64, help="test questions of the speed measurement; 0: none")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch; a contrastive question takes two")
    parser.add_argument("--weights", default="float32", help="format of the base weights")
    parser.add_argument("--output", type=Path, default=Path("runs/contrast/answers"), help="folder of all answers")
    parser.add_argument("--json", type=Path, default=None, help="results file")
    arguments = parser.parse_args()
    if arguments.table:
        text = tables(arguments.table)
        print(text)
        if arguments.into:
            put(text, arguments.into)
        return
    if arguments.task is None:
        parser.error("name a task, or --table FILES")
    run(arguments)


if __name__ == "__main__":
    main()
