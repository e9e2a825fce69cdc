"""Options that several sub-commands share, and what they turn into."""


def add_model(parser):
    parser.add_argument("--model", default="smollm2-135m", help="known name, Hugging Face folder or GGUF file")
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16", "int8", "int4"),
                        help="format of the base weights")


def add_decoding(parser):
    parser.add_argument("--adapter", default=None, metavar="FOLDER", help="PEFT adapter folder; none: the base model")
    parser.add_argument("--contrast", action="store_true", help="contrast the adapter with the base model (CoLD)")
    parser.add_argument("--alpha", type=float, default=0.1, help="the expert's cut, in (0, 1]")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the base model's scores, >= 0")
    parser.add_argument("--adapt", default="fixed", help="form of the contrast: fixed, entropy, divergence, margin")
    parser.add_argument("--skip-copies", action="store_true", help="no contrast inside spans copied from the prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k best tokens; 0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the best tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")


def generator(arguments):
    """(Generator, adapter name or None) for the parsed options."""
    from colora_ms.decoding import Generator

    folder = getattr(arguments, "adapter", None)
    adapters = {"adapter": folder} if folder else None
    made = Generator.from_pretrained(arguments.model, adapters=adapters, weight_format=arguments.weights)
    return made, "adapter" if folder else None


def decoding(arguments):
    """Keyword arguments of ``Generator.generate`` for the parsed options, without the adapter."""
    from colora_ms.decoding import Contrast, Sampling

    return dict(
        contrast=Contrast(arguments.alpha, arguments.beta, arguments.adapt, arguments.skip_copies)
        if arguments.contrast else None,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed),
        max_new_tokens=arguments.max_new_tokens,
    )


def model_hash(arguments):
    """Digest of the model's files and the format of its weights, for results files."""
    from colora_ms.evaluation.evaluate import file_digest
    from colora_ms.models.checkpoint import resolve_model

    return f"{file_digest(resolve_model(arguments.model))}:{arguments.weights}"
