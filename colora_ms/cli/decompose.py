"""``colora-ms decompose``: make a model smaller by low-rank decomposition, without training."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.cli import decompose_sweep, options

if TYPE_CHECKING:
    from colora_ms.decomposition.plan import LrdPlan
    from colora_ms.models.config import DecoderConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="known name, folder or GGUF file")
    parser.add_argument("--plan", default=None, metavar="FILE", help="YAML or JSON: layers, tensors, rank, factors, "
                                                                     "method, modules (exceptions by name)")
    parser.add_argument("--preset", default=None, help='"lrd-9": 9 %% fewer parameters, from blocks apart from each '
                                                       'other')
    parser.add_argument("--layers", default=None, help='blocks: "all" or numbers and ranges such as 9,13,18-20')
    parser.add_argument("--tensors", default="all", help="matrices of these blocks: all, attn, mlp, or names with "
                                                         "commas")
    parser.add_argument("--rank", type=int, default=1, help="rank of every matrix")
    parser.add_argument("--factors", type=int, default=3, choices=(2, 3), help="2 folds the core into the inner factor")
    parser.add_argument("--method", default="svd", choices=("svd", "hooi"), help="both give the same product")
    parser.add_argument("--force", action="store_true", help="allow ranks past break-even")
    parser.add_argument("--out", default=None, metavar="FOLDER", help="folder to write; none: only show what the plan "
                                                                      "saves")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="of the written folder")
    parser.add_argument("--dense", action="store_true", help="write the products, a plain Hugging Face folder of full "
                                                             "size")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the report as JSON")
    decompose_sweep.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if arguments.sweep or arguments.latency_only or arguments.show:
        return decompose_sweep.run(arguments)
    from colora_ms.decomposition import decompose_checkpoint, linear_shapes, reduction
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model

    checkpoint = open_checkpoint(resolve_model(arguments.model))
    plan = make_plan(arguments, checkpoint.config)
    pieces = plan.resolve(linear_shapes(checkpoint.config))
    total = checkpoint.config.parameter_count()
    saved = sum(piece.saved for piece in pieces.values())
    print(f"{len(pieces)} matrices, {total:,} -> {total - saved:,} parameters "
          f"({reduction(checkpoint.config, pieces):.2%} fewer)")
    rows = []
    if arguments.out is not None:
        rows = decompose_checkpoint(checkpoint, plan, arguments.out, arguments.dtype, arguments.dense, on_row=show)
        print(f"wrote {arguments.out}")
    else:
        for path, piece in pieces.items():
            print(f"{path:44s} {piece.shape[0]:5d} x {piece.shape[1]:<5d} rank {piece.rank:<4d} saves {piece.saved:,}")
    if arguments.json is not None:
        options.write_json(arguments.json, {
            "model": arguments.model, "plan": plan.to_dict(), "parameters_before": total,
            "parameters_after": total - saved, "matrices": [dataclasses.asdict(r) for r in rows]})
    return 0


def show(row: Any) -> None:
    """Print one decomposed matrix."""
    print(f"{row.path:44s} {row.shape[0]:5d} x {row.shape[1]:<5d} rank {row.rank:<4d} error {row.error:6.1%}   "
          f"{row.parameters_before:,} -> {row.parameters_after:,}")


def make_plan(arguments: argparse.Namespace, config: DecoderConfig) -> LrdPlan:
    """The plan that the options mean; ConfigError where they contradict each other or mean none."""
    from colora_ms.decomposition import LrdPlan, preset
    from colora_ms.errors import ConfigError

    given = [f"--{name}" for name in ("plan", "preset", "layers") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"give exactly one of --plan, --preset and --layers (given: {', '.join(given) or 'none'})")
    if arguments.preset is not None:
        return dataclasses.replace(preset(arguments.preset, config), factors=arguments.factors, method=arguments.method)
    if arguments.plan is not None:
        plan = LrdPlan.from_dict(read_plan(arguments.plan), arguments.plan)
        return dataclasses.replace(plan, force=plan.force or arguments.force)
    tensors = arguments.tensors if arguments.tensors in ("all", "attn", "mlp") else tuple(arguments.tensors.split(","))
    return LrdPlan(parse_layers(arguments.layers), tensors, arguments.rank, arguments.factors, arguments.method,
                   force=arguments.force)


def parse_layers(text: str) -> str | tuple[int, ...]:
    """ "all", or numbers and ranges with commas, as LrdPlan takes them; "9,13,18-20" -> (9, 13, 18, 19, 20)."""
    from colora_ms.errors import ConfigError

    if text == "all":
        return text
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 8 \
                or (dash and int(last) < int(first)):
            raise ConfigError(f"--layers has {part.strip()!r:.60}, expected \"all\" or numbers and ranges such as "
                              "9,13,18-20")
        numbers += range(int(first), int(last if dash else first) + 1)
    return tuple(dict.fromkeys(numbers))


def read_plan(path: str | Path) -> Any:
    """The parsed content of a plan file, which is YAML (of which JSON is a part)."""
    import yaml

    from colora_ms.errors import ConfigError

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the plan {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the plan {path} is not valid YAML: {str(error).splitlines()[0]}") from None
