"""What a config does to the embedding and the head: rows of single tokens, and copies that stay tied as the base is.

PEFT's rules (0.21, ``set_additional_trainable_modules`` and ``LoraModel._add_modules_to_save_to_tie``):

* ``trainable_token_indices``, a list: the embedding's rows. If a head is tied to it, the head's too.
* ... a dict: the modules whose names end in its keys. On tied ones equal ids mean one set of rows, other ids two sets,
  which ``ensure_weight_tying`` refuses; a head alone gets rows of its own.
* ``ensure_weight_tying`` with ``modules_to_save``: naming the embedding or its head means one copy, which both use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable

if TYPE_CHECKING:
    from colora_ms.adapters.matching import Module


def tied_modules(modules: dict[str, Module]) -> dict[str, str]:
    """{module name: name of the embedding that it is tied to}."""
    return {name: module.tied_to for name, module in modules.items()
            if module.tied_to and modules[module.tied_to].kind == "embedding"}


def saved(config: Any, modules: dict[str, Module], names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The modules that are saved whole, and which of them use another one's copy.

    Args:
        config: LoraConfig; modules: {name: Module}; names: those that ``modules_to_save`` means.

    Returns:
        (names in the order of the model, {module name: the embedding whose copy it uses}).
    """
    if not getattr(config, "ensure_weight_tying", False):
        return names, {}
    ties = {head: source for head, source in tied_modules(modules).items() if head in names or source in names}
    wanted = {*names, *ties, *ties.values()}
    return [name for name in modules if name in wanted], ties


def tokens(config: Any, modules: dict[str, Module], chosen: list[str], whole: Iterable[str],
           problems: list[str]) -> tuple[dict, dict[str, str]]:
    """The ids whose rows are trained, of each module.

    Args:
        config: LoraConfig; modules: {name: Module}; chosen: names of the modules with a low-rank pair; whole: those
            that are saved whole; problems: gets what is wrong.

    Returns:
        ({module name: tuple of ids}, {module name: the embedding whose rows it uses}).
    """
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return {}, {}
    tied = tied_modules(modules)
    found = _named(wanted, modules, problems)
    ties = {}
    for head, source in tied.items():
        if source not in found:
            continue
        if head in found and found[head] != found[source]:
            if config.ensure_weight_tying:
                problems.append(f"ensure_weight_tying asks for one set of rows of {source} and {head}, but "
                                f"trainable_token_indices has {list(found[source])!r:.60} for the one and "
                                f"{list(found[head])!r:.60} for the other")
            continue
        found[head], ties[head] = found[source], source
    for name, ids in found.items():
        module = modules[name]
        if name in chosen or name in whole:
            other = "target_modules" if name in chosen else "modules_to_save"
            problems.append(f"trainable_token_indices and {other} both change {name}" + (
                f", which is tied to {tied[name]}" if name in ties else "") + "; leave it out of one of them")
        elif module.kind != "embedding" and not module.is_head:
            problems.append(f"trainable_token_indices means {name}, which is neither an embedding nor an output head")
        elif max(ids) >= module.parameters["weight"][0]:
            rows = module.parameters["weight"][0]
            problems.append(f"trainable_token_indices has {max(ids)}, but {name} has rows for {rows} tokens")
    return {name: found[name] for name in modules if name in found}, ties


def check(config: Any, modules: dict[str, Module], chosen: list[str], ties: dict[str, str], problems: list[str],
          remarks: list[str]) -> None:
    """What ``ensure_weight_tying`` asks for and is not done goes to ``problems``, what changes nothing to
    ``remarks``."""
    if not getattr(config, "ensure_weight_tying", False):
        return
    tied = tied_modules(modules)
    low_rank = [name for name in chosen if name in tied or name in tied.values()]
    if low_rank:
        problems.append(f"ensure_weight_tying with target_modules that mean {low_rank[0]} (factors that stay tied "
                        "across embedding and head) is not implemented; train the embedding with modules_to_save or "
                        "trainable_token_indices")
    elif not tied:
        remarks.append("ensure_weight_tying, but no head is tied to the model's embedding")
    elif not ties and not config.trainable_token_indices:
        remarks.append("ensure_weight_tying, but modules_to_save and trainable_token_indices name no tied module")


def _named(wanted, modules, problems):
    """{module name: tuple of ids} of what a config names."""
    if isinstance(wanted, list):
        embeddings = [name for name, module in modules.items() if module.kind == "embedding"]
        own = [name for name in embeddings if name.rsplit(".", 1)[-1] == "embed_tokens"] or embeddings
        if len(own) != 1:
            problems.append(f"trainable_token_indices is a list, but the model has {len(own)} embeddings; name the "
                            "module: {\"embed_tokens\": [...]}")
            return {}
        return {own[0]: tuple(wanted)}
    found = {}
    for ending, ids in wanted.items():
        names = [name for name in modules if name.endswith(ending) and "weight" in modules[name].parameters]
        if not names:
            problems.append(f"trainable_token_indices has {ending!r}, which the model does not have")
        found.update(dict.fromkeys(names, tuple(ids)))
    return found
