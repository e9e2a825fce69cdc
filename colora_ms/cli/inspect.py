"""``colora-ms inspect``: what is in an adapter, and which of a Lily adapter's experts serve what."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from colora_ms.cli import options

if TYPE_CHECKING:
    from colora_ms.adapters.peft_format import StoredAdapter
    from colora_ms.models.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    parser.add_argument("adapter", help="adapter folder (LoRA or Lily)")
    options.add_model(parser)
    parser.add_argument("--prompts", nargs="+", default=None, metavar="TEXT", help="texts that a Lily adapter's "
                                                                                   "routers read")
    parser.add_argument("--data", default=None, metavar="SOURCE", help="or data: JSON lines, or YAML in braces as in a "
                                                                       "recipe")
    parser.add_argument("--template", default="{prompt}\nAnswer: {completion}",
                        help="text around the data, or \"chat\"")
    parser.add_argument("--limit", type=int, default=64, help="items of the data")
    parser.add_argument("--plot", default=None, metavar="PNG", help="draw the expert use (Lily) or the updates' norms "
                                                                    "(LoRA)")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.adapters.peft_format import StoredAdapter
    from colora_ms.errors import AdapterError

    stored = StoredAdapter(arguments.adapter)
    if stored.config is None:
        stored.refuse(stored.problems)
    for line in tensors(stored):
        print(line)
    lily = stored.config.peft_type == "LILY"
    static = lily and stored.config.router_pool == "static"
    if not lily:
        if arguments.prompts or arguments.data:
            raise AdapterError(f"{arguments.adapter} is a {stored.config.peft_type} adapter, which has no router: "
                               "--prompts and --data are for Lily")
        return updates(stored, arguments)
    if not (arguments.prompts or arguments.data or static):
        if arguments.plot or arguments.json:
            raise AdapterError("the expert use depends on the text: give --prompts or --data")
        print("\nexpert use: give --prompts or --data")
        return 0
    return experts(arguments)


def tensors(stored: StoredAdapter) -> list[str]:
    """Lines that list the settings that count and every tensor: shape and norm; shared ones are said to be so."""
    import numpy as np

    config = stored.config.to_peft()
    names = ("peft_type", "r", "lora_alpha", "use_rslora", "stride_A", "num_B", "scaling", "router_pool", "router_form",
             "share", "target_modules", "base_model_name_or_path")
    lines = [f"{name:24s} {config[name]}" for name in names if config.get(name) not in (None, False)]
    lines += ["", f"{'tensor':72s} {'shape':>14s} {'norm':>10s}"]
    total = 0
    for name in stored.file.entries:
        value = stored.file.read(name)
        total += value.size
        lines.append(f"{name.removeprefix('base_model.model.'):72s} {str(value.shape):>14s} "
                     f"{np.linalg.norm(value):10.4f}")
    return lines + [f"{len(stored.file.entries)} tensors, {total:,} numbers"]


def updates(stored: StoredAdapter, arguments: argparse.Namespace) -> int:
    """Print, draw and write the norm of each module's update, scaling * up @ down."""
    sizes = update_norms(stored)
    print(f"\n{'module':56s} {'rank':>4s} {'norm of the update':>18s}")
    for path, (rank, size) in sizes.items():
        print(f"{path:56s} {rank:4d} {size:18.4f}")
    write(arguments, {path: {"rank": rank, "norm": size} for path, (rank, size) in sizes.items()})
    if arguments.plot:
        from colora_ms.adapters.plots import draw_update_sizes

        draw_update_sizes({path: size for path, (_, size) in sizes.items()}, arguments.plot)
        print(f"picture: {arguments.plot}")
    return 0


def update_norms(stored: StoredAdapter) -> dict[str, tuple[int, float]]:
    """{module: (rank, Frobenius norm of scaling * up @ down)} of a LoRA folder; from r x r products, no model
    needed."""
    from dataclasses import replace

    import numpy as np

    from colora_ms.adapters.matching import Module, match
    from colora_ms.adapters.peft_format import PREFIX

    modules, factors = {}, {}
    for name in stored.file.entries:
        for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if name.endswith(down) and name.removesuffix(down) + up in stored.file.entries:
                path = name.removesuffix(down).removeprefix(PREFIX)
                factors[path] = (name, name.removesuffix(down) + up)
                modules[path] = Module("linear" if down.endswith("weight") else "embedding")
    if not factors:
        return {}
    # The table has the modules with a pair alone, which says nothing about whatever else the adapter changes.
    config = replace(stored.config, modules_to_save=None, trainable_token_indices=None, ensure_weight_tying=False)
    targets = match(config, modules, list({path.rsplit(".", 1)[-1]: None for path in modules})).targets
    found = {}
    for path, target in targets.items():
        first, second = (stored.file.read(name).astype(np.float64) for name in factors[path])
        # The squared norm of the product is the sum of the products of both Gram matrices.
        square = ((second.T @ second) * (first @ first.T)).sum()
        found[path] = (first.shape[0], abs(target.scaling) * float(np.sqrt(max(square, 0.0))))
    return found


def experts(arguments: argparse.Namespace) -> int:
    """Print, draw and write the expert use of a Lily adapter on the given texts."""
    from colora_ms.adapters import load_adapter
    from colora_ms.adapters.lily_usage import expert_use, table
    from colora_ms.models import load_model

    decoder, tokenizer = load_model(arguments.model, weight_format=arguments.weights)
    handle = load_adapter(decoder, arguments.adapter, name="adapter")
    uses = expert_use(handle, sequences(arguments, tokenizer), "adapter")
    print(f"\nexpert use over {uses[0].tokens:,} tokens" if uses[0].tokens else "\nexpert use (static: the same for "
                                                                                "every text)")
    for line in table(uses):
        print(line)
    write(arguments, [{"module": use.path, "group": use.group, "block": use.block, "mean": use.mean.tolist(),
                       "first_place": use.top.tolist(), "effective_experts": use.effective, "tokens": use.tokens}
                      for use in uses])
    if arguments.plot:
        from colora_ms.adapters.plots import draw_expert_use

        draw_expert_use(uses, arguments.plot)
        print(f"picture: {arguments.plot}")
    return 0


def sequences(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the prompts and of the data's items, prompt and answer."""
    from colora_ms.cli.evaluate import source
    from colora_ms.training.sources import load_examples
    from colora_ms.training.templates import make_template

    found = [tokenizer.encode(text) for text in arguments.prompts or ()]
    if arguments.data:
        template = make_template(arguments.template, tokenizer)
        for example in load_examples(source(arguments.data))[:arguments.limit]:
            found.append(tokenizer.encode(template.prompt(example) + template.answer(example),
                                          add_special_tokens=template.adds_special_tokens))
    return found


def write(arguments: argparse.Namespace, values: Any) -> None:
    """Write the numbers as JSON, if asked."""
    if arguments.json:
        options.write_json(arguments.json, values)
        print(f"numbers: {arguments.json}")
