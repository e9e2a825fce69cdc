"""``colora-ms train``: train an adapter as a recipe says."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("recipe", help="YAML recipe, see model_zoo/")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the newest checkpoint of the output folder")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="change a setting of the recipe: --set loop.steps=50 (repeatable)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.distributed import workers
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.run import train

    config = TrainingConfig.from_yaml(arguments.recipe, overrides=arguments.set)
    team = workers.start()
    result = train(config, resume=arguments.resume, team=team)
    if not team.first:
        return 0
    speed = result.tokens / result.seconds if result.seconds else 0.0
    print(f"{result.steps} updates, last loss {result.losses[-1]:.4f}, {speed:.0f} tokens/s" if result.losses
          else f"{result.steps} updates were made already")
    print(f"adapter: {result.adapter}")
    return 0
