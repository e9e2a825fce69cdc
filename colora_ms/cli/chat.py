"""``colora-ms chat``: talk to a model and its adapters in the terminal."""

from __future__ import annotations

import argparse
import sys

from colora_ms.cli import options
from colora_ms.decoding.options import Contrast, Sampling
from colora_ms.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    options.add_model(parser)
    options.add_engine(parser)
    parser.add_argument("--adapter", default=None, metavar="NAME", help="adapter to begin with; needs --adapters")
    parser.add_argument("--contrast", action="store_true", help="begin with the contrast on")
    options.add_record(parser, Contrast)
    options.add_record(parser, Sampling)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    options.add_mix(parser)
    parser.add_argument("--system", default=None, help="system message at the head of the conversation")
    parser.add_argument("--plain", action="store_true",
                        help="send each line as it is, without chat template and memory")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.serving.chat import Chat

    sampling = Sampling.asked(**options.given(arguments, Sampling))
    contrast = Contrast(**options.given(arguments, Contrast))
    asked = options.asked(arguments)
    mix, adapters = options.mix(arguments)
    # Two rows are one contrastive request; short chunks make a smooth stream.
    engine, name = options.engine(arguments, rows=2 if mix is None else max(2, len(mix.voices)), chunk=4)
    with engine:
        for one, folder in adapters.items():
            if engine.bank is None:
                raise ConfigError(f"the mix has the adapter {one!r}; start with --adapters FOLDER, which makes room "
                                  "for adapters")
            if one not in engine.bank.names():
                engine.bank.add(one, folder)
        chat = Chat(engine, name, contrast, sampling=sampling, max_new_tokens=arguments.max_new_tokens,
                    system=arguments.system, plain=arguments.plain, more=asked)
        if arguments.adapter is not None:
            chat.command(f"/adapter {arguments.adapter}")
        if arguments.contrast:
            chat.command("/contrast on")
        chat.loop(sys.stdin, prompt="> " if sys.stdin.isatty() else "")
    return 0
