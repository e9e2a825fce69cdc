"""``colora-ms generate``: answer prompts."""

import json
import sys

from colora_ms.cli import options


def add_arguments(parser):
    parser.add_argument("prompts", nargs="*", help="the prompts; none: one a line from standard input")
    options.add_model(parser)
    options.add_decoding(parser)
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument("--stop", action="append", default=[], help="end the answer before this text (repeatable)")
    parser.add_argument("--records", action="store_true", help="list the tokens where the contrast changed the choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")


def run(arguments):
    prompts = arguments.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        print("colora-ms generate: no prompt was given", file=sys.stderr)
        return 2
    generator, adapter = options.generator(arguments)
    settings = options.decoding(arguments)
    inputs = [[{"role": "user", "content": p}] for p in prompts] if arguments.chat else prompts
    live = len(prompts) == 1 and not arguments.json
    completions = generator.generate(
        inputs, adapter=adapter, stop=arguments.stop, records=arguments.records or arguments.json,
        on_text=(lambda _, text: print(text, end="", flush=True)) if live else None, **settings)
    for prompt, completion in zip(prompts, completions):
        if arguments.json:
            print(json.dumps(_as_json(prompt, completion), ensure_ascii=False))
            continue
        print("" if live else completion.text)
        if arguments.records:
            from colora_ms.decoding.completion import changes

            print(changes(completion, generator.tokenizer))
    return 0


def _as_json(prompt, completion):
    return {
        "prompt": prompt,
        "text": completion.text,
        "tokens": list(completion.tokens),
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "records": [vars(r) for r in completion.records],
    }
