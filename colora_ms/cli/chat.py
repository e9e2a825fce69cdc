"""``colora-ms chat``: talk to a model and its adapters in the terminal."""

from __future__ import annotations

import argparse
import sys

from colora_ms.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    options.add_model(parser)
    options.add_engine(parser)
    parser.add_argument("--adapter", default=None, metavar="NAME", help="adapter to begin with; needs --adapters")
    parser.add_argument("--contrast", action="store_true", help="begin with the contrast on")
    parser.add_argument("--alpha", type=float, default=0.1, help="the expert's cut, in (0, 1]")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the base model's scores, >= 0")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the best tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--system", default=None, help="system message at the head of the conversation")
    parser.add_argument("--plain", action="store_true",
                        help="send each line as it is, without chat template and memory")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.decoding import Contrast, Sampling
    from colora_ms.serving.chat import Chat

    sampling = Sampling.asked(arguments.temperature, 0, arguments.top_p, arguments.seed)
    contrast = Contrast(arguments.alpha, arguments.beta)
    # Two rows are one contrastive request; short chunks make a smooth stream.
    engine, name = options.engine(arguments, rows=2, chunk=4)
    with engine:
        chat = Chat(engine, name, contrast, sampling=sampling, max_new_tokens=arguments.max_new_tokens,
                    system=arguments.system, plain=arguments.plain)
        if arguments.adapter is not None:
            chat.command(f"/adapter {arguments.adapter}")
        if arguments.contrast:
            chat.command("/contrast on")
        chat.loop(sys.stdin, prompt="> " if sys.stdin.isatty() else "")
    return 0
