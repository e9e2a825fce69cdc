"""``colora-ms evaluate``: score a model, an adapter and a contrast on a set of problems."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from colora_ms.cli import options

if TYPE_CHECKING:
    from colora_ms.distributed.workers import Workers
    from colora_ms.evaluation.benchmarks import FewShotTemplate

TASKS = {
    "problems": "generate answers to --data and score them with --scorer",
    "gsm8k": "generate worked answers to GSM8K's JSON lines and compare the final numbers",
    "choice": "multiple choice by log-likelihood, the JSON layout of the commonsense sets",
    "perplexity": "perplexity of a text file, such as WikiText's",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    options.add_model(parser)
    options.add_decoding(parser)
    parser.add_argument("--task", default="problems", choices=TASKS,
                        help="; ".join(f"{name}: {sentence}" for name, sentence in TASKS.items()))
    parser.add_argument("--data", required=True, help="the task's file; for problems also a source as YAML: "
                        "'{kind: reasoning_gym, task: chain_sum, size: 100, seed: 7}'")
    parser.add_argument("--template", default=None,
                        help='prompt template, or "chat"; by default "{prompt}\\nAnswer: {completion}", and for gsm8k '
                        '"Question: {prompt}\\nAnswer: {completion}"')
    parser.add_argument("--scorer", default="number", help="how an answer is scored: number, exact, normalised")
    parser.add_argument("--shots", type=int, default=0,
                        help="gsm8k, choice: worked examples in front of each question; 0 for an adapter that was "
                             "trained on the template")
    parser.add_argument("--shots-data", default=None, metavar="FILE",
                        help="gsm8k, choice: where they are taken from, the first ones (train.jsonl); a question that "
                             "stands there itself is shown others in its place")
    parser.add_argument("--form", default="text", choices=("text", "label"),
                        help="choice: rank the answers' texts, or the labels that an adapter was trained to write")
    parser.add_argument("--normalise", default="token", choices=("none", "token", "byte"),
                        help="choice: divide the log-likelihood by this length")
    parser.add_argument("--window", type=int, default=512, help="perplexity: tokens of a window")
    parser.add_argument("--stride", type=int, default=None, help="perplexity: tokens between windows; half a window if "
                                                                 "left out")
    parser.add_argument("--limit", type=int, default=None, help="only the first problems (perplexity: characters)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in a batch")
    parser.add_argument("--output", default=None, metavar="FILE", help="JSON lines of all items; an interrupted run "
                                                                       "resumes")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.distributed import workers

    team = workers.start()
    _check_shots(arguments)
    if arguments.task in ("choice", "perplexity"):
        summary = _likelihood(arguments, team)
        if team.first:
            print(summary)
        return 0
    from colora_ms.evaluation.benchmarks import FEW_SHOT_STOP
    from colora_ms.evaluation.evaluate import evaluate
    from colora_ms.training.templates import make_template

    examples, few_shot = _problems(arguments)  # before the model, which takes longer
    if few_shot is not None and team.first:
        _say_own_shots(few_shot.check(examples), len(examples))
    generator, adapter = options.generator(arguments)
    template = few_shot or make_template(_template(arguments), generator.tokenizer)
    stop = list(FEW_SHOT_STOP) if few_shot else []
    hashes = _hashes(arguments)
    result = evaluate(
        generator, examples, arguments.scorer, template=template, path=arguments.output,
        batch_size=arguments.batch_size,
        options={"adapter": adapter, "stop": stop, "records": arguments.contrast, **options.decoding(arguments)},
        team=team, model_hash=hashes["model_hash"], adapter_hash=hashes["adapter_hash"])
    if not team.first:
        return 0
    print(result.summary())
    if result.changed_share is not None:
        print(f"the contrast changed {100 * result.changed_share:.1f} % of the tokens")
    return 0


def _hashes(arguments: argparse.Namespace) -> dict[str, str]:
    from colora_ms.adapters import digest

    return {"model_hash": options.model_hash(arguments),
            "adapter_hash": digest(arguments.adapter) if arguments.adapter else ""}


def _check_shots(arguments: argparse.Namespace) -> None:
    """Refuse options of few-shot prompts that do not go together."""
    from colora_ms.errors import ConfigError

    if arguments.shots < 0 or (arguments.shots > 0) != (arguments.shots_data is not None):
        raise ConfigError(f"--shots {arguments.shots} and --shots-data {arguments.shots_data} belong together: give "
                          "both for a few-shot prompt, or neither")
    if arguments.shots and arguments.task not in ("gsm8k", "choice"):
        raise ConfigError(f"--shots is for --task gsm8k and choice, not for {arguments.task}")
    if arguments.shots and arguments.template == "chat":
        raise ConfigError("few-shot prompts are made from a plain text template, not from the chat template; leave out "
                          "--template chat or --shots")


def _problems(arguments: argparse.Namespace) -> tuple[list, FewShotTemplate | None]:
    """(examples, few-shot template or None) of the tasks that generate."""
    from colora_ms.evaluation.benchmarks import FewShotTemplate, read_gsm8k
    from colora_ms.training.sources import load_examples
    from colora_ms.training.templates import make_template

    if arguments.task == "problems":
        return load_examples(source(arguments.data))[:arguments.limit], None
    examples = read_gsm8k(arguments.data, arguments.limit)
    if not arguments.shots:
        return examples, None
    return examples, FewShotTemplate(make_template(_template(arguments), None), read_gsm8k(arguments.shots_data),
                                     count=arguments.shots)


def _template(arguments: argparse.Namespace) -> str:
    """The template as text, or "chat"."""
    usual = "{prompt}\nAnswer: {completion}"
    return arguments.template or (f"Question: {usual}" if arguments.task == "gsm8k" else usual)


def _say_own_shots(own: int, total: int) -> None:
    if own:
        print(f"{own} of {total} questions stand among the worked examples themselves; others are shown to them")


def _likelihood(arguments: argparse.Namespace, team: Workers) -> str:
    """The summary of multiple choice or perplexity."""
    from colora_ms.evaluation.benchmarks import evaluate_choices, evaluate_perplexity, read_commonsense, read_text
    from colora_ms.evaluation.decoder_scorer import DecoderScorer
    from colora_ms.evaluation.shots import few_shot_choices

    perplexity = arguments.task == "perplexity"
    data: Any = read_text(arguments.data) if perplexity else \
        read_commonsense(arguments.data, arguments.form, arguments.limit)
    if arguments.shots:
        data, own = few_shot_choices(data, read_commonsense(arguments.shots_data, arguments.form), arguments.shots)
        if team.first:
            _say_own_shots(own, len(data))
    generator, adapter = options.generator(arguments)
    slot = -1 if adapter is None else generator.adapters.slot(adapter)
    scorer = DecoderScorer(generator.decoder, slot, rows=arguments.batch_size)
    shared = dict(path=arguments.output, batch_size=arguments.batch_size, team=team, **_hashes(arguments))
    if perplexity:
        return evaluate_perplexity(scorer, generator.tokenizer, data, window=arguments.window, stride=arguments.stride,
                                   limit=arguments.limit, **shared).summary()
    result = evaluate_choices(scorer, generator.tokenizer, data, normalise=arguments.normalise, **shared)
    low, high = result.interval
    return f"{100 * result.accuracy:.1f} % of {len(data)} [{100 * low:.1f}, {100 * high:.1f}]"


def source(text: str) -> Any:
    """A data source from the command line: YAML in braces, or a path."""
    if not text.lstrip().startswith("{"):
        return text
    import yaml

    from colora_ms.errors import DataError

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"the data source {text!r} is no YAML: {error}") from None
