"""``colora-ms merge``: write a model with an adapter, or several, merged in."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from colora_ms.cli.convert import TYPES, check_format_option, is_gguf, say
from colora_ms.models.formats import FOLDER_TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("model", help="known name, folder or GGUF file of the base model")
    parser.add_argument("adapters", nargs="+", metavar="adapter",
                        help="PEFT adapter folder, or LoRA GGUF (one or several)")
    parser.add_argument("target", metavar="out",
                        help="folder to write, or a GGUF file if it ends in .gguf; it must not exist")
    parser.add_argument("--weights", nargs="+", default=None, metavar="W", help="a number for each adapter; none: 1")
    parser.add_argument("--combine", default=None, metavar="WAY",
                        help="with several adapters: cat (the exact sum), svd, linear, ties, dare_linear, dare_ties, "
                        "magnitude_prune, or one of the last four with _svd, as in PEFT; none: cat")
    parser.add_argument("--density", type=float, default=None,
                        help="share of the values that ties, dare and prune keep")
    parser.add_argument("--majority-sign", default=None, choices=("total", "frequency"), help="how ties elects a sign")
    parser.add_argument("--svd-rank", type=int, default=None, help="rank of the combination, for the ways with svd")
    parser.add_argument("--svd-clamp", type=float, default=None, help="quantile at which svd's factors are cut off")
    parser.add_argument("--seed", type=int, default=None, help="of dare's random choices")
    parser.add_argument("--dtype", default=None, choices=FOLDER_TYPES,
                        help="of a folder's weights; integers are rounded to nearest; none: float32")
    parser.add_argument("--group", type=int, default=None,
                        help="with int8 and int4: inputs that share a scale; none: a channel")
    parser.add_argument("--type", default=None, type=str.upper, choices=TYPES,
                        help="of a GGUF file's matrices, whose vectors stay F32; none: F32")
    parser.add_argument("--texts", nargs="+", default=None, metavar="TEXT", help="texts to compare the logits on")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    import dataclasses

    from colora_ms.cli.options import write_json
    from colora_ms.recipes.merge_model import merge_model

    check_format_option(is_gguf(arguments.target), arguments.dtype, arguments.type)
    report = merge_model(
        arguments.model, arguments.adapters, arguments.target, _weights(arguments.weights), arguments.combine,
        arguments.dtype, arguments.type, arguments.group, arguments.texts, svd_rank=arguments.svd_rank,
        svd_clamp=arguments.svd_clamp, density=arguments.density, majority_sign_method=arguments.majority_sign,
        seed=arguments.seed)
    say(report.notes)
    print(f"merged against unmerged: logits differ by up to {report.difference:.3g}, {report.share:.2g} of their "
          f"range of {report.span:.4g}, on {report.texts} texts (loss {report.loss:.4f})")
    if report.rounded_difference is not None:
        print(f"rounded to {arguments.type or arguments.dtype}: logits differ from the unrounded merge by up to "
              f"{report.rounded_difference:.3g}, {report.rounded_mean:.3g} in the mean; loss {report.loss:.4f} -> "
              f"{report.rounded_loss:.4f}")
    if arguments.json is not None:
        write_json(arguments.json, {**dataclasses.asdict(report), "share": report.share})
    print(f"wrote {report.path}")
    return 0


def _weights(texts: Sequence[str] | None) -> list[float] | None:
    """The numbers of ``--weights``, given apart or with commas."""
    from colora_ms.errors import ConfigError

    if texts is None:
        return None
    parts = [part for text in texts for part in text.split(",") if part]
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise ConfigError(f"--weights is {' '.join(texts)}, expected numbers") from None
