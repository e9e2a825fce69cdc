"""The ``colora-ms`` command: one module a sub-command, each with ``add_arguments(parser)`` and ``run(arguments)``."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

COMMANDS = {
    "quickstart": "train a small adapter, decode it greedily and contrastively, print the comparison",
    "generate": "answer prompts with a model, an adapter and a contrast",
    "serve": "answer requests over HTTP (OpenAI's API), many adapters in one batch",
    "route": "one address before several servers; a request goes where its adapter is",
    "chat": "talk to a model and its adapters in the terminal",
    "run": "train, evaluate and make the table of results, as a recipe says",
    "train": "train an adapter as a recipe says",
    "evaluate": "score a model, an adapter and a contrast on a set of problems",
    "tune-contrast": "choose alpha, beta and form of the contrast on validation problems, or answer \"off\"",
    "info": "show what a model or an adapter is",
    "decompose": "make a model smaller by low-rank decomposition, without training",
    "inspect": "list an adapter's tensors; show which of a Lily adapter's experts serve what",
    "convert": "write a model as a Hugging Face folder or a GGUF file, an adapter as a LoRA GGUF",
    "merge": "write a model with an adapter, or several, merged in",
    "quantize": "store the linears of a model as integers, rounded to nearest or trained (LR-QAT)",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; a command's module is imported only when its help or run needs it."""
    from colora_ms import __version__

    parser = argparse.ArgumentParser(
        prog="colora-ms", description="Low-rank adapters and Contrastive LoRA Decoding (CoLD) in MindSpore graph mode.",
        epilog="colora-ms COMMAND --help explains a command.")
    parser.add_argument("--version", action="version", version=f"colora-ms {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, sentence in COMMANDS.items():
        module = importlib.import_module(f"colora_ms.cli.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=sentence, description=sentence[0].upper() + sentence[1:] + ".",
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    """A warning as a sentence; those of other libraries keep Python's form."""
    own = Path(filename).is_relative_to(Path(__file__).resolve().parents[1])
    text = f"warning: {message}\n" if own else warnings.formatwarning(message, category, filename, lineno, line)
    print(text, end="", file=file or sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code. An expected failure is one paragraph, not a
    traceback."""
    # MindSpore's hundreds of thousands of objects come to stay: looking for garbage among them delays the start.
    gc.set_threshold(50_000, 20, 50)
    parsed = build_parser().parse_args(arguments)
    # MindSpore's own warnings are for its developers; set GLOG_v=2 to see them.
    os.environ.setdefault("GLOG_v", "3")
    from colora_ms.errors import ColoraError

    warnings.showwarning = _show_warning
    try:
        return parsed.run(parsed) or 0
    except ColoraError as error:
        print(f"colora-ms {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as reason:
        print(f"colora-ms {parsed.command}: {str(reason) or 'interrupted'}", file=sys.stderr)
        return 130
