"""``colora-ms quantize``: store a model's linears as integers, rounded to nearest or trained (LR-QAT)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colora_ms.quantization.model import QuantizedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("recipe", help="YAML recipe, see model_zoo/; for rounding only, a model's name or folder")
    parser.add_argument("target", nargs="?", help="with a model in place of a recipe: folder to write")
    parser.add_argument("--bits", type=int, default=4, help="with a model: 8, 4, 3 or 2")
    parser.add_argument("--group", type=int, default=None, help="with a model: inputs that share a scale; none: a "
                                                                "channel")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the newest checkpoint of the output folder")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="change a setting of the recipe: --set adapter.bits=3 (repeatable)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.training.quantize import quantize_model

    if arguments.target is not None:
        folder, quantized = round_model(arguments.recipe, arguments.target, arguments.bits, arguments.group)
    else:
        from colora_ms.training.quantize import QuantizationConfig

        config = QuantizationConfig.from_yaml(arguments.recipe, overrides=arguments.set)
        folder, result, quantized = quantize_model(config, resume=arguments.resume)
        if result is not None and result.losses:
            print(f"{result.steps} updates, last loss {result.losses[-1]:.4f}")
    stored, plain = quantized.sizes()
    print(f"{len(quantized.cells)} linears: {stored / 2**20:.1f} MiB in place of {plain / 2**20:.1f} MiB")
    print(f"model: {folder}")
    return 0


def round_model(source: str, target: str | Path, bits: int, group: int) -> tuple[Path, QuantizedModel]:
    """Round a model to nearest and write it; returns (folder, QuantizedModel)."""
    import os

    from colora_ms.errors import CheckpointError
    from colora_ms.models import load_model
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    from colora_ms.quantization import LrQatConfig, quantize

    config = LrQatConfig(method="rtn", bits=bits, group=group, downcast="int")
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already; choose another folder")
    path = resolve_model(source)
    quantized = quantize(load_model(path)[0], config)
    return quantized.export(target, open_checkpoint(path).tokenizer_source), quantized
