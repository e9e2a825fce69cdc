"""``colora-ms generate``: answer prompts."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from colora_ms.cli import options

if TYPE_CHECKING:
    from colora_ms.decoding import Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("prompts", nargs="*", help="the prompts; none: one a line from standard input")
    options.add_model(parser)
    options.add_decoding(parser)
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument("--stop", action="append", default=[], help="end the answer before this text (repeatable)")
    parser.add_argument("--stop-token-id", type=int, action="append", default=[], metavar="ID",
                        help="end the answer at this token, too (repeatable)")
    parser.add_argument("--records", action="store_true", help="list the tokens where the contrast changed the choice")
    parser.add_argument("--output", default=None, metavar="FILE", help="write the answers there instead of printing "
                                                                       "them")
    parser.add_argument("--tensor-parallel", action="store_true",
                        help="split the model, not the prompts, over the workers of scripts/msrun_evaluate.sh")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.distributed import workers
    from colora_ms.evaluation.sharded import ShardedGenerator

    team = workers.start()
    # Of several workers one reads, or each would get some of the lines.
    prompts = arguments.prompts or team.share([line.rstrip("\n") for line in sys.stdin if line.strip()] if team.first
                                              else None)
    if not prompts:
        print("colora-ms generate: no prompt was given", file=sys.stderr)
        return 2
    if arguments.tensor_parallel and team.world == 1:
        print("colora-ms generate: --tensor-parallel needs several workers; start them with "
              "bash scripts/msrun_evaluate.sh generate -n 2 --tensor-parallel ...", file=sys.stderr)
        return 2
    settings = options.decoding(arguments)  # a bad number is told before anything is loaded
    generator: Any
    generator, adapter = options.generator(arguments, team if arguments.tensor_parallel else None)
    inputs = [[{"role": "user", "content": p}] for p in prompts] if arguments.chat else prompts
    live = len(prompts) == 1 and not arguments.json and arguments.output is None and team.world == 1
    if team.world > 1 and not arguments.tensor_parallel:
        generator = ShardedGenerator(generator, team)
    completions = generator.generate(
        inputs, adapter=adapter, stop=arguments.stop, stop_token_ids=arguments.stop_token_id,
        records=arguments.records or arguments.json,
        **({"on_text": lambda _, text: print(text, end="", flush=True)} if live else {}), **settings)
    if not team.first:
        return 0
    lines = []
    for prompt, completion in zip(prompts, completions):
        if arguments.json:
            lines.append(json.dumps(_as_json(prompt, completion), ensure_ascii=False))
            continue
        lines.append("" if live else completion.text)
        if arguments.records:
            from colora_ms.decoding.completion import changes

            lines.append(changes(completion))
    return _write(lines, arguments.output)


def _write(lines: list[str], path: str | None) -> int:
    """Print the lines, or make a file of them; returns the exit code."""
    if path is None:
        print("\n".join(lines))
        return 0
    try:
        with open(path, "w", encoding="utf-8") as handle:
            handle.writelines(line + "\n" for line in lines)
    except OSError as error:
        print(f"colora-ms generate: cannot write {path}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _as_json(prompt: str, completion: Completion) -> dict:
    return {
        "prompt": prompt,
        "text": completion.text,
        "tokens": list(completion.tokens),
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "records": [vars(r) for r in completion.records],
    }
