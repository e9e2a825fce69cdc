"""``colora-ms evaluate``: score a model, an adapter and a contrast on a set of problems."""

from colora_ms.cli import options


def add_arguments(parser):
    options.add_model(parser)
    options.add_decoding(parser)
    parser.add_argument("--data", required=True, help="JSON lines, or a source as YAML: "
                        "'{kind: reasoning_gym, task: chain_sum, size: 100, seed: 7}'")
    parser.add_argument("--template", default="{prompt}\nAnswer: {completion}", help='prompt template, or "chat"')
    parser.add_argument("--scorer", default="number", help="how an answer is scored: number, exact, normalised")
    parser.add_argument("--limit", type=int, default=None, help="only the first problems")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in a batch")
    parser.add_argument("--output", default=None, metavar="FILE", help="JSON lines of all items; an interrupted run resumes")


def run(arguments):
    from colora_ms.adapters import digest
    from colora_ms.evaluation.evaluate import evaluate
    from colora_ms.training.sources import load_examples
    from colora_ms.training.templates import make_template

    examples = load_examples(source(arguments.data))[:arguments.limit]
    generator, adapter = options.generator(arguments)
    result = evaluate(
        generator, examples, arguments.scorer, template=make_template(arguments.template, generator.tokenizer),
        path=arguments.output, batch_size=arguments.batch_size,
        options={"adapter": adapter, **options.decoding(arguments)},
        model_hash=f"{arguments.model}:{arguments.weights}", adapter_hash=digest(arguments.adapter) if adapter else "")
    print(result.summary())
    return 0


def source(text):
    """A data source from the command line: YAML in braces, or a path."""
    if not text.lstrip().startswith("{"):
        return text
    import yaml

    from colora_ms.errors import DataError

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"the data source {text!r} is no YAML: {error}") from None
