"""``colora-ms quickstart``: the whole idea in minutes: train, decode greedily and contrastively, compare."""

import json
import time
from pathlib import Path

RECIPE = Path("model_zoo") / "smollm2-135m" / "quickstart.yaml"


def add_arguments(parser):
    parser.add_argument("--recipe", default=None, help=f"training recipe; by default {RECIPE} of the checkout")
    parser.add_argument("--output", default="runs/quickstart", help="folder of the run")
    parser.add_argument("--items", type=int, default=200, help="held-out problems")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--alpha", type=float, default=0.1, help="the expert's cut of the contrast")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the base model in the contrast")
    parser.add_argument("--fast", action="store_true", help="a shorter training and fewer problems (3 minutes)")
    parser.add_argument("--scorer", default="number", help="how an answer is scored: number, exact, normalised")


def run(arguments):
    started = time.perf_counter()
    from colora_ms.decoding import Contrast, Generator
    from colora_ms.recipes import report
    from colora_ms.recipes.decoders import ADAPTER, answer, choices
    from colora_ms.recipes.settings import FAST_ITEMS, FAST_STEPS
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.run import train
    from colora_ms.training.templates import make_template

    output = Path(arguments.output) / time.strftime("%Y%m%d-%H%M%S")
    changes = [f"output={output}"]
    items = arguments.items
    if arguments.fast:
        changes += [f"loop.steps={FAST_STEPS}"]
        items = min(items, FAST_ITEMS)
    config = TrainingConfig.from_yaml(find_recipe(arguments.recipe), overrides=changes)
    test = held_out(config, items)
    contrast = Contrast(arguments.alpha, arguments.beta)
    print(f"1/3  training a LoRA adapter on {config.model}; run folder {output}")
    result = train(config)
    trained = time.perf_counter() - started
    print(f"     {result.steps} updates in {result.seconds:.0f} s, loss {result.losses[0]:.3f} -> "
          f"{result.losses[-1]:.3f}")
    print(f"     PEFT folder: {result.adapter}")

    print(f"2/3  answering {len(test)} held-out problems three times")
    generator = Generator.from_pretrained(config.model, {ADAPTER: result.adapter}, weight_format=config.weight_format)
    template = make_template(config.data.template, generator.tokenizer, config.data.system)
    results, rows = {}, []
    for chosen in choices(["base", "greedy", contrast]):
        found = results[chosen.label] = answer(
            generator, test, chosen, template=template, scorer=arguments.scorer,
            max_new_tokens=arguments.max_new_tokens,
            folder=output / "evaluation", keep_records=True)
        rows.append(report.row_of(chosen, found))
        print(f"     {chosen.label}: {found.summary()}")
    print("3/3  result\n")
    print(report.table(rows))
    greedy, cold = list(results.values())[1:]
    print(f"\nCoLD against greedy, same adapter, same problems: {greedy.compare(cold).summary()}")
    show_samples(generator, template, test, cold, contrast, arguments.max_new_tokens)
    seconds = time.perf_counter() - started
    summary = {"seconds": seconds, "training_seconds": trained, "steps": result.steps,
               "results": {name: r.to_json() for name, r in results.items()}}
    (output / "quickstart.json").write_text(json.dumps(summary, indent=2, default=str), encoding="utf-8")
    print(f"\nDone in {seconds / 60:.1f} minutes, {trained / 60:.1f} of them training. All answers: "
          f"{output / 'evaluation'}")
    return 0


def find_recipe(path):
    """The recipe's path: as given, or the checkout's."""
    from colora_ms.errors import ConfigError

    if path is not None:
        return path
    recipe = Path(__file__).resolve().parents[2] / RECIPE
    if not recipe.is_file():
        raise ConfigError(f"{RECIPE} is not beside the package; run in a checkout or give --recipe FILE")
    return recipe


def held_out(config, size):
    """The first ``size`` problems of the recipe's test, none of which is trained on."""
    from colora_ms.errors import ConfigError
    from colora_ms.training.sources import load_examples

    if config.data.held_out is None:
        raise ConfigError("the recipe has no data.held_out, the problems that the decoders are compared on")
    return load_examples(config.data.held_out, config.data.columns)[:size]


def show_samples(generator, template, test, cold, contrast, max_new_tokens, count=3):
    """Three problems with all three answers, and the tokens that the contrast changed; those with changes first."""
    from colora_ms.decoding.completion import changes
    from colora_ms.recipes.decoders import ADAPTER

    def changed(item):
        return sum(r["token"] != r["favourite"] for r in item.get("records", ()))

    order = sorted(range(len(test)), key=lambda i: -changed(cold.items[i]))[:count]
    prompts = [template.request(test[i]) for i in order]
    same = dict(max_new_tokens=max_new_tokens)
    base = generator.generate(prompts, **same)
    greedy = generator.generate(prompts, adapter=ADAPTER, **same)
    contrasted = generator.generate(prompts, adapter=ADAPTER, contrast=contrast, records=True, **same)
    for place, i in enumerate(order):
        print(f"\nProblem: {test[i].question.strip()}\nExpected: {test[i].completion.strip()}")
        for name, answer in (("base  ", base), ("greedy", greedy), ("CoLD  ", contrasted)):
            print(f"  {name} | {' / '.join(answer[place].text.strip().splitlines())[:160]}")
        print(changes(contrasted[place]))
