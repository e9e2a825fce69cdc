"""``colora-ms run``: a recipe from the training to the table of results."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("recipe", help="YAML recipe with a section evaluate, see model_zoo/")
    parser.add_argument("--fast", action="store_true", help="few updates and items, in a folder of its own")
    parser.add_argument("--limit", type=int, default=None, metavar="N",
                        help="only the first N items of the test (perplexity: characters)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="change a setting of the recipe: --set loop.steps=50 --set evaluate.items=100 "
                             "(repeatable)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.distributed import workers
    from colora_ms.recipes import report
    from colora_ms.recipes.runner import run as run_recipe
    from colora_ms.recipes.settings import read_config

    config = read_config(arguments.recipe, arguments.set)
    path = Path(arguments.recipe)
    team = workers.start()
    try:
        result = run_recipe(config, fast=arguments.fast, limit=arguments.limit, team=team,
                            name=f"{path.resolve().parent.name}/{path.stem}",
                            say=lambda line: print(line, flush=True) if team.first else None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    if team.first:
        print(f"\n{report.summary_text(result)}\nwritten: {result['output']}/result.json, {result['output']}/table.md")
    return 0
