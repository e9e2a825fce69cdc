"""``colora-ms tune-contrast``: choose alpha, beta and the form of the contrast on validation problems, or none."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colora_ms.cli import options
from colora_ms.cli.evaluate import source
from colora_ms.models.formats import WEIGHT_CHOICES

if TYPE_CHECKING:
    from colora_ms.decoding import Contrast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("model", help="known name, Hugging Face folder or GGUF file")
    parser.add_argument("--weights", default="auto", choices=WEIGHT_CHOICES,
                        help="format of the base weights")
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="PEFT adapter folder")
    parser.add_argument("--data", required=True,
                        help="validation problems, never the test's: JSON lines, or a source as "
                             "YAML like '{kind: reasoning_gym, task: chain_sum, size: 100, seed: 7}'")
    parser.add_argument("--template", default="{prompt}\nAnswer: {completion}", help='prompt template, or "chat"')
    parser.add_argument("--scorer", default="number", help="how an answer is scored: number, exact, normalised")
    parser.add_argument("--limit", type=int, default=200, help="only the first problems")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--stop", action="append", default=[], help="end an answer before this text (repeatable)")
    parser.add_argument("--alphas", type=float, nargs="+", default=argparse.SUPPRESS, help="try these cuts")
    parser.add_argument("--betas", type=float, nargs="+", default=argparse.SUPPRESS, help="try these weights")
    parser.add_argument("--forms", nargs="+", default=argparse.SUPPRESS,
                        help="try these forms: fixed, entropy, divergence, margin, copies (fixed, off inside copied "
                             "spans)")
    parser.add_argument("--level", type=float, default=0.05, help="highest p-value that switches the contrast on")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch; a problem takes two")
    parser.add_argument("--output", default=None, metavar="FOLDER", help="all answers; an interrupted run resumes")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the choice and the table's numbers")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.adapters import digest
    from colora_ms.decoding import Generator
    from colora_ms.evaluation.tuning import choose_contrast, compare_contrasts
    from colora_ms.training.sources import load_examples
    from colora_ms.training.templates import make_template

    contrasts = grid(*(getattr(arguments, name, None) for name in ("alphas", "betas", "forms")))
    examples = load_examples(source(arguments.data))[:arguments.limit]
    generator = Generator.from_pretrained(arguments.model, {"adapter": arguments.adapter},
                                          weight_format=arguments.weights, max_rows=arguments.rows)
    comparison = compare_contrasts(
        generator, examples, "adapter", contrasts, template=make_template(arguments.template, generator.tokenizer),
        scorer=arguments.scorer, max_new_tokens=arguments.max_new_tokens, stop=arguments.stop,
        batch_size=max(arguments.rows // 2, 1), folder=arguments.output, adapter_hash=digest(arguments.adapter),
        model_hash=options.model_hash(arguments), progress=lambda name, line: print(f"{name}: {line}", flush=True))
    choice = choose_contrast(comparison, arguments.level)
    print(f"\n{comparison.table()}\n\n{choice.summary()}")
    if arguments.json:
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        options.write_json(path, {"choice": choice.to_json(), "validation": comparison.to_json()})
    return 0


def grid(alphas: Sequence[float] | None = None, betas: Sequence[float] | None = None,
         forms: Sequence[str] | None = None) -> list[Contrast]:
    """The contrasts to try: all combinations of what is given, or the default grid if nothing is.

    Raises:
        ConfigError: an unknown form. DecodingError: an alpha or beta outside its range.
    """
    from colora_ms.decoding import Contrast
    from colora_ms.errors import ConfigError, near
    from colora_ms.evaluation.tuning import DEFAULT_GRID
    from colora_ms.kernels.strength import FORMS

    if alphas is None and betas is None and forms is None:
        return list(DEFAULT_GRID)
    known = [*FORMS, "copies"]
    for form in forms or ():
        if form not in known:
            raise ConfigError(f"--forms: there is no form {form!r}; known: {', '.join(known)}.{near(form, known)}")
    return [Contrast(alpha, beta, "fixed" if form == "copies" else form, form == "copies")
            for form in dict.fromkeys(forms or known) for alpha in dict.fromkeys(alphas or (0.1,))
            for beta in dict.fromkeys(betas or (0.25, 0.5, 1.0))]
