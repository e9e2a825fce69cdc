"""``colora-ms decompose --sweep``: measure the design space, print the table, draw it, recommend a variant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colora_ms.cli import options

if TYPE_CHECKING:
    from colora_ms.evaluation.lrd_sweep import Variant
    from colora_ms.models.checkpoint import Checkpoint
    from colora_ms.models.tokenizer import Tokenizer

_NAMES = ("early", "middle", "late", "spread")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    group = parser.add_argument_group("sweep")
    group.add_argument("--sweep", action="store_true", help="measure placements, matrices and ranks against each other")
    group.add_argument("--reduction", type=float, default=0.09,
                       help="share of the parameters that each variant removes")
    group.add_argument("--placements", default=",".join(_NAMES), help="which of " + ", ".join(_NAMES))
    group.add_argument("--groups", default="all,attn,mlp", help="groups of matrices to try")
    group.add_argument("--ranks", default="", help="ranks to try beside the one that just reaches the reduction, as "
                                                   "1,8,64")
    group.add_argument("--no-drop", action="store_true", help="do not try to leave out blocks altogether")
    group.add_argument("--text", default=None, metavar="FILE", help="text for the perplexity")
    group.add_argument("--text-tokens", type=int, default=2049, help="tokens of it, from the start")
    group.add_argument("--choices", default=None, metavar="FILE", help="multiple-choice set for the accuracy (JSON)")
    group.add_argument("--items", type=int, default=120, help="items of it, from the start")
    group.add_argument("--accuracy-top", type=int, default=None, metavar="N",
                       help="accuracy only of the model itself and of the N variants with the best perplexity")
    group.add_argument("--latency", action="store_true", help="also time every variant; needs an idle machine")
    group.add_argument("--latency-only", action="store_true", help="only time the variants of the --json file, into "
                                                                   "that file")
    group.add_argument("--resume", action="store_true", help="measure only what the --json file does not hold yet")
    group.add_argument("--show", action="store_true", help="measure nothing: print and draw what the --json file holds")
    group.add_argument("--steps", type=int, default=48, help="decoding steps of one timing")
    group.add_argument("--repeats", type=int, default=5, help="timings of each variant")
    group.add_argument("--tolerance", type=float, default=5.0, help="accuracy points that may be lost")
    group.add_argument("--plot", default=None, metavar="FILE", help="PNG of quality against size and latency")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.errors import ConfigError
    from colora_ms.evaluation.lrd_plot import plot
    from colora_ms.evaluation.lrd_sweep import describe, table, variants
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    from colora_ms.pictures import check_drawing

    if arguments.plot is not None:
        check_drawing()
    checkpoint = open_checkpoint(resolve_model(arguments.model))
    if checkpoint.low_rank:
        raise ConfigError(f"{arguments.model} is decomposed already; a sweep starts from the original model")
    found = variants(checkpoint.config, arguments.reduction, split(arguments.placements), split(arguments.groups),
                     [number(one) for one in split(arguments.ranks)], arguments.factors, not arguments.no_drop)
    setup = {name: getattr(arguments, name) for name in ("model", "text_tokens", "items", "steps", "repeats")}
    setup.update({name: "/".join(Path(getattr(arguments, name) or "").parts[-2:]) for name in ("text", "choices")})
    rows = {variant.name: describe(variant, checkpoint.config) for variant in found}
    if arguments.latency_only or arguments.show or arguments.resume:
        setup, rows = earlier(arguments.json, rows, None if not arguments.resume else setup)

    def keep() -> None:
        if arguments.json is not None:
            options.write_json(arguments.json,
                               {"setup": setup, "tolerance": arguments.tolerance, "rows": list(rows.values())})

    if not (arguments.latency_only or arguments.show):
        quality(arguments, checkpoint, found, rows, keep)
    if arguments.latency or arguments.latency_only:
        latency(arguments, checkpoint, found, rows, keep)
    if not arguments.show:
        keep()
    print(table(list(rows.values()), arguments.tolerance))
    print(f"\n* Pareto front; <- the smallest variant that loses at most {arguments.tolerance:g} accuracy points")
    if arguments.plot is not None:
        plot(list(rows.values()), arguments.plot, arguments.tolerance)
        print(f"wrote {arguments.plot}")
    return 0


def quality(arguments: argparse.Namespace, checkpoint: Checkpoint, found: list[Variant], rows: dict[str, dict],
            keep: Callable[[], None]) -> None:
    """Fill in perplexity and accuracy."""
    from colora_ms.errors import ConfigError
    from colora_ms.evaluation.choices import load_choices
    from colora_ms.evaluation.decoder_scorer import DecoderScorer
    from colora_ms.evaluation.likelihood import multiple_choice, perplexity
    from colora_ms.evaluation.lrd_sweep import Switch
    from colora_ms.models.decoder import Decoder
    from colora_ms.models.tokenizer import load_tokenizer

    if arguments.text is None:
        raise ConfigError("a sweep needs --text FILE for the perplexity (or --latency-only with --json FILE)")
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    ids = text_ids(arguments.text, tokenizer, arguments.text_tokens)
    items = load_choices(arguments.choices, arguments.items) if arguments.choices else []
    decoder = Decoder(checkpoint.config, checkpoint.tensors, max_positions=512)
    switch = Switch(decoder, found)
    window = min(257, len(ids))
    scorer = DecoderScorer(decoder, rows=min(8, max(1, (len(ids) - 1) // (window - 1))), multiple=window - 1)
    for variant in found:
        if rows[variant.name]["perplexity"] is not None:
            continue
        switch.show(variant)
        rows[variant.name]["perplexity"] = perplexity(scorer, ids, window, window - 1, scorer.rows).perplexity
        print(f"{variant.name:20s} {rows[variant.name]['reduction']:6.1%} fewer parameters, perplexity "
              f"{rows[variant.name]['perplexity']:.2f}", flush=True)
        keep()
    if items:
        scorer = DecoderScorer(decoder, rows=16, multiple=48)
        ranking = sorted(found[1:], key=lambda variant: rows[variant.name]["perplexity"])[:arguments.accuracy_top]
        for variant in found[:1] + ranking:
            if rows[variant.name]["accuracy"] is not None:
                continue
            switch.show(variant)
            result = multiple_choice(scorer, tokenizer, items, batch_size=scorer.rows)
            rows[variant.name].update(accuracy=result.accuracy, items=len(items))
            print(f"{variant.name:20s} accuracy {result.accuracy:.1%} of {len(items)}", flush=True)
            keep()
    switch.restore()


def latency(arguments: argparse.Namespace, checkpoint: Checkpoint, found: Sequence[Variant], rows: dict[str, dict],
            keep: Callable[[], None]) -> None:
    """Fill in the times."""
    from colora_ms.evaluation.lrd_latency import measure
    from colora_ms.models.tokenizer import load_tokenizer

    def on_row(variant: Variant, result: dict) -> None:
        rows[variant.name].update(result)
        print(f"{variant.name:20s} step {result['step_ms']:.2f} ms ({result['step_ratio'] - 1:+.1%}), prefill "
              f"{result['prefill_ms']:.1f} ms ({result['prefill_ratio'] - 1:+.1%})", flush=True)
        keep()

    measure(checkpoint, load_tokenizer(checkpoint.tokenizer_source), found, arguments.steps, arguments.repeats, on_row)


def earlier(path: str | Path, rows: dict[str, dict],
            setup: dict | None) -> tuple[dict, dict[str, dict]]:
    """(setup, rows) of an earlier sweep, which must have the same variants, and to go on measuring the same
    ``setup``."""
    from colora_ms.errors import ConfigError

    if path is None:
        raise ConfigError("--latency-only, --show and --resume need --json FILE, the file of the sweep")
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}; run the sweep first: --sweep --json {path}")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        before = {row["name"]: row for row in values["rows"]}
        kept = values["setup"]
        asked = setup or {}
        other = [key for key in ("text", "text_tokens", "choices", "items") if asked and kept[key] != asked[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result of a sweep: {error}") from None
    if list(before) != list(rows) or any(before[name].keys() != rows[name].keys()
                                         or before[name]["layers"] != rows[name]["layers"] for name in rows):
        raise ConfigError(f"{path} holds another sweep; give the same --reduction, --placements, --groups, --ranks, "
                          "--factors and --no-drop as then, or another --json FILE")
    if other:
        raise ConfigError(f"{path} was measured with {other[0]} {kept[other[0]]!r}, not {asked[other[0]]!r}; give the "
                          "same, or another --json FILE")
    return kept, before


def text_ids(path: str | Path, tokenizer: Tokenizer, count: int) -> list[int]:
    """The first ``count`` tokens of a text file."""
    from colora_ms.errors import DataError

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text {path} cannot be read: {error}") from None
    # A token has at least one character for all but a few; this keeps a long file from being encoded whole.
    ids = tokenizer.encode(text[:12 * max(count, 2)], add_special_tokens=False)[:count]
    if len(ids) < 2:
        raise DataError(f"{path} has {len(ids)} tokens, perplexity needs at least two")
    return ids


def split(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def number(text: str) -> int:
    """A rank of --ranks."""
    from colora_ms.errors import ConfigError

    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--ranks has {text!r:.40}, expected whole numbers from 1 on")
    return int(text)
