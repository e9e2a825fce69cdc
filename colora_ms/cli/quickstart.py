"""``colora-ms quickstart``: the first ten minutes: train, compare, mix requests in one batch, look at the contrast."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

#: The recipe inside the model zoo; in an installed package it lies in ``colora_ms/recipes/data``.
RECIPE = Path("smollm2-135m") / "quickstart.yaml"

#: What --fast leaves: updates, and held-out problems.
FAST_STEPS, FAST_ITEMS = 60, 48

#: The second strength of the adapter.
STRENGTH = 0.5

#: Name of the second copy; the first one is ``recipes.decoders.ADAPTER``.
WEAKER = "half"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--recipe", default=None, help=f"training recipe; by default the model zoo's {RECIPE}")
    parser.add_argument("--output", default="runs/quickstart", help="folder of the runs; each has one of its own in it")
    parser.add_argument("--items", type=int, default=200, help="held-out problems")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="longest answer; none: as the recipe says")
    parser.add_argument("--alpha", type=float, default=0.1, help="the expert's cut of the contrast")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the base model in the contrast")
    parser.add_argument("--fast", action="store_true", help="a shorter training and fewer problems")
    parser.add_argument("--scorer", default=None, help="how an answer is scored: number, exact, normalised; none: as "
                        "the recipe says")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the measures here")


def run(arguments: argparse.Namespace) -> int:
    """The whole tour; 0, or 1 if a batch gave other tokens than its requests alone."""
    started = time.perf_counter()
    from colora_ms.recipes.tour import Tour
    from colora_ms.training.config import TrainingConfig

    output = Path(arguments.output) / time.strftime("%Y%m%d-%H%M%S")
    changes = [f"output={output}", "loop.progress=false"]
    if arguments.fast:
        changes += [f"loop.steps={FAST_STEPS}"]
    config = TrainingConfig.from_yaml(find_recipe(arguments.recipe), overrides=changes)
    tour = Tour(config, items=min(arguments.items, FAST_ITEMS) if arguments.fast else arguments.items,
                alpha=arguments.alpha, beta=arguments.beta, weaker=WEAKER, strength=STRENGTH,
                max_new_tokens=arguments.max_new_tokens, scorer=arguments.scorer, say=_say)
    tour.train()
    mixed = tour.mix()
    tour.evaluate()
    tour.why()
    _say("\n4/4  what you could do next\n")
    _say(next_commands(output, tour.own_recipe()))
    seconds = time.perf_counter() - started
    tour.write(seconds, arguments.json)
    if mixed.different:
        _say("\nThe batch gave other tokens than its requests alone, which must not happen: please report it with "
             f"{output}/quickstart.json")
    _say(f"\nready after {seconds:.0f} s (without installation)")
    return 1 if mixed.different else 0


def find_recipe(path: str | None) -> str | Path:
    """The recipe's path: as given, else the installed package's, else the checkout's.

    Raises:
        ConfigError: it is in neither place.
    """
    from colora_ms.errors import ConfigError

    if path is not None:
        return path
    package = Path(__file__).resolve().parents[1]
    for recipe in (package / "recipes" / "data" / RECIPE.name, package.parent / "model_zoo" / RECIPE):
        if recipe.is_file():
            return recipe
    raise ConfigError(f"{RECIPE} is neither in the package nor beside it; give --recipe FILE")


def next_commands(output: Path, recipe: Path) -> str:
    """Three commands that work as they are printed, with a line on each."""
    command = _command()
    adapters = output / "adapters"
    return "\n".join([
        "  talk to both strengths of the adapter; /adapter NAME changes it, /contrast on and /why are the contrast:",
        f"    {command} chat --adapters {adapters} --adapter {_adapter()} --plain --max-new-tokens 16",
        "  serve the base model and both over HTTP, with OpenAI's API (requests pick one by `model`):",
        f"    {command} serve --adapters {adapters}",
        f"  train on your own data: put it into {recipe.with_suffix('.jsonl')} (it has some lines as an example) and",
        f"    {command} train {recipe}"])


def _adapter() -> str:
    from colora_ms.recipes.decoders import ADAPTER

    return ADAPTER


def _command() -> str:
    """How this command was called, if that is not by its bare name: a virtual environment need not be active."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{sys.executable} -m colora_ms"
    if called.name != "colora-ms":
        return "colora-ms"
    found = shutil.which("colora-ms")
    return "colora-ms" if found and Path(found).resolve() == called.resolve() else str(called)


def _say(text: str) -> None:
    print(text, flush=True)
