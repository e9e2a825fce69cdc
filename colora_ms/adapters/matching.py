"""Which modules a config means, by PEFT's rules, and with which rank and alpha.

Pure Python: it sees a model as a table of module names, so that everything is decided, and every error raised, before
a model is touched.
"""

import re
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Iterable, Optional

from colora_ms.adapters import tied
from colora_ms.adapters.patterns import match_all
from colora_ms.errors import AdapterError, AdapterWarning, near

ALL_LINEAR = "all-linear"

#: What ``target_modules=None`` means on the decoders of this package (PEFT's table has the same).
DEFAULT_TARGETS = ["q_proj", "v_proj"]

#: Kinds of modules that a low-rank pair can be put beside.
TARGET_KINDS = ("linear", "embedding")


@dataclass(frozen=True)
class Module:
    """What matching and loading need to know of one module of a model.

    Attributes:
        kind: "linear", "embedding", "norm" (or any other leaf that can be saved whole) or "other" (containers, ...).
        in_features, out_features: sizes of a linear; vocabulary and hidden size of an embedding; else 0.
        parameters: {name on disk: shape} of a leaf that can be saved whole ("weight", "bias").
        is_head: the output head, which "all-linear" leaves out.
        refusal: why no low-rank pair can be put beside it, or "".
        whole: whether it can be saved whole.
        tied_to: name of the module before it whose weight it shares, or "".
    """

    kind: str
    in_features: int = 0
    out_features: int = 0
    parameters: dict = field(default_factory=dict)
    is_head: bool = False
    refusal: str = ""
    whole: bool = True
    tied_to: str = ""


@dataclass(frozen=True)
class Target:
    """One module with a low-rank pair of rank r; its product is multiplied by ``scaling``."""

    name: str
    kind: str
    r: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class LoraTarget(Target):
    """A Target of LoRA.

    Attributes:
        dora: whether the rows of the changed weight have trained lengths; up_bias: whether lora_B has a bias.
    """

    dora: bool = False
    up_bias: bool = False


@dataclass(frozen=True)
class Matched:
    """What a config does to a model.

    Attributes:
        targets: {module name: Target}, in the order of the model.
        saved: names of the leaf modules that are copied and trained whole.
        biases: names of the linears whose bias is trained.
        tokens: {module name: ids whose rows are trained}, of embeddings and heads.
        ties: {module name: name of the module whose copy, or rows, it uses} among ``saved`` and ``tokens``.
    """

    targets: dict
    saved: tuple
    biases: tuple
    tokens: dict = field(default_factory=dict)
    ties: dict = field(default_factory=dict)


def match(config: Any, modules: dict[str, Module], defaults: Optional[list] = None) -> Matched:
    """Match a config against a model.

    Args:
        config: LoraConfig.
        modules: {module name: Module} in the order of the model, without the empty name of the root.
        defaults: what ``target_modules=None`` means here, or None where it means nothing.

    Returns:
        Matched.

    Raises:
        AdapterError: nothing matches, everything that matches is excluded, or a matched module is of a kind that cannot
            be adapted.

    Warns:
        AdapterWarning: an entry of ``target_modules``, ``layers_to_transform`` or a pattern matches nothing while
            others do, which PEFT takes in silence.
    """
    targets = config.target_modules
    if targets is None:
        targets = defaults
        if targets is None and config.modules_to_save:
            targets = []
        if targets is None:
            raise AdapterError("target_modules is not given, and this model has no default; name the linears to adapt, "
                               f"or use \"{ALL_LINEAR}\". The model has {_examples(_linears(modules))}")
    tests = _Tests(config, targets, list(modules))
    problems = []
    saved, to_save_problems = _saved_leaves(config, modules)
    problems += to_save_problems
    remarks = []
    saved, ties = tied.saved(config, modules, saved)
    matched = _matched(config, targets, modules, tests, remarks)
    chosen = [name for name in matched if name not in tests.excluded and name not in saved]
    tokens, token_ties = tied.tokens(config, modules, chosen, saved, problems)
    ties.update(token_ties)
    tied.check(config, modules, chosen, ties, problems, remarks)
    if not problems and not chosen and (targets or not saved and not tokens):
        problems.append(_nothing_chosen(config, targets, modules, matched))
    wrong = [name for name in chosen if modules[name].kind not in TARGET_KINDS]
    if wrong:
        problems.append(f"target_modules={_show(targets)} also matches {_examples(wrong)}, which "
                        f"{'is' if len(wrong) == 1 else 'are'} neither linear nor embedding")
    embeddings = [name for name in chosen if modules[name].kind == "embedding"]
    problems += [f"{option} is implemented for linears, but target_modules={_show(targets)} also means "
                 f"{_examples(embeddings)}" for option in ("use_dora", "lora_bias")
                 if embeddings and getattr(config, option)]
    chosen = [name for name in chosen if modules[name].kind in TARGET_KINDS]
    refused = [name for name in chosen if modules[name].refusal]
    if refused:
        problems.append(f"{_examples(refused)} cannot be adapted: {modules[refused[0]].refusal}")
    result = {name: _target(config, name, modules[name].kind, tests) for name in chosen}
    for label, hits in (("rank_pattern", tests.ranks), ("alpha_pattern", tests.alphas)):
        unused = [key for key, names in hits.items() if not names & set(chosen)]
        if unused and chosen:
            remarks.append(f"{label} has {_examples(unused)}, which matches no adapted module."
                           + near(unused[0], {n.rsplit('.', 1)[-1] for n in chosen}))
    if problems:
        raise AdapterError("the adapter's config does not fit the model: " + "; ".join(problems + remarks))
    for remark in remarks:
        warnings.warn(f"the adapter's config has more than the model: {remark}", AdapterWarning, stacklevel=3)
    return Matched(targets=result, saved=tuple(saved), biases=_biases(config, modules, result, saved), tokens=tokens,
                ties=ties)


def places_of(matched: Matched) -> list[tuple[str, str]]:
    """The (module name, "lora", "saved" or "tokens") that an adapter uses."""
    low_rank = dict.fromkeys([*matched.targets, *matched.biases])
    return ([(path, "lora") for path in low_rank] + [(path, "saved") for path in matched.saved]
            + [(path, "tokens") for path in matched.tokens])


def value_shapes(matched: Matched, modules: dict[str, Module]) -> dict[tuple[str, str], dict]:
    """{(module name, role): {field: shape}} of an adapter's values in the Cells' orientation: down (r, in), for an
    embedding (vocab, r); up (out, r); a bias; the parameters of modules saved whole; rows (ids, hidden)."""
    shapes = {}
    for path, target in matched.targets.items():
        module = modules[path]
        down = (target.r, module.in_features) if target.kind == "linear" else (module.in_features, target.r)
        shapes[path, "lora"] = {"down": down, "up": (module.out_features, target.r)}
        if target.dora:
            shapes[path, "lora"]["magnitude"] = (module.out_features,)
        if target.up_bias:
            shapes[path, "lora"]["up_bias"] = (module.out_features,)
    for path in matched.biases:
        shapes.setdefault((path, "lora"), {})["bias"] = modules[path].parameters["bias"]
    for path in matched.saved:
        shapes[path, "saved"] = modules[path].parameters
    for path, ids in matched.tokens.items():
        shapes[path, "tokens"] = {"rows": (len(ids), modules[path].parameters["weight"][1])}
    return shapes


def widest(targets: list[Target]) -> Optional[Target]:
    """The Target of the largest rank, with the options that any of them has; None of an empty list."""
    if not targets:
        return None
    options = {name: True for name in ("dora", "up_bias") if any(getattr(one, name, False) for one in targets)}
    return replace(max(targets, key=lambda one: one.r), **options)


def shortest_names(names: Iterable[str], modules: dict[str, Module]) -> list[str]:
    """A list for ``target_modules`` that means exactly ``names``: their last parts if those suffice, else whole
    names."""
    short = {name.rsplit(".", 1)[-1] for name in names}
    meant = {name for name in modules if not short.isdisjoint(_endings(name))}
    return sorted(short if meant == set(names) else names)


class _Tests:
    """All regular expressions of a config, matched against all names at once."""

    def __init__(self, config, targets, names):
        wanted = []
        if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
            wanted.append(("target", "target_modules", "fullmatch", targets))
        if isinstance(config.exclude_modules, str) and config.exclude_modules:
            wanted.append(("exclude", "exclude_modules", "fullmatch", config.exclude_modules))
        for entry in config.modules_to_save or ():
            wanted.append(("save", "modules_to_save", "match", rf"(^|.*\.){entry}($|\..*)"))
        for key in config.rank_pattern:
            wanted.append((("rank", key), f"rank_pattern[{key!r}]", "match", rf"(.*\.)?({key})$"))
        for key in config.alpha_pattern:
            wanted.append((("alpha", key), f"alpha_pattern[{key!r}]", "match", rf"(.*\.)?({key})$"))
        hits = match_all([one[1:] for one in wanted], names)
        self.target = set()
        self.excluded = set()
        self.ranks, self.alphas = {}, {}
        for (role, *_), found in zip(wanted, hits):
            if role == "target":
                self.target = found
            elif role in ("exclude", "save"):
                self.excluded |= found
            elif role[0] == "rank":
                self.ranks[role[1]] = found
            else:
                self.alphas[role[1]] = found
        if isinstance(config.exclude_modules, list):
            excluded = set(config.exclude_modules)
            self.excluded |= {name for name in names if _ends_with_any(name, excluded)}


def _matched(config, targets, modules, tests, remarks):
    """Names that target_modules means, excluded ones among them; appends what is unmatched to ``remarks``."""
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return [name for name, module in modules.items() if module.kind == "linear" and not module.is_head]
        return [name for name in modules if name in tests.target]
    entries, found = set(targets), []
    for name in modules:
        if name in entries or _ends_with_any(name, entries) and _in_layers(config, name):
            found.append(name)
    known = {ending for name in modules for ending in _endings(name)}
    missing = [entry for entry in targets if entry not in known]
    if missing and len(missing) < len(targets):
        remarks.append(f"target_modules has {_examples(missing)}, which the model does not have."
                       + _near_names(missing, modules))
    layers = config.layers_to_transform
    if layers is not None and layers != []:
        layers = layers if isinstance(layers, list) else [layers]
        present = {_layer_index(config, name) for name in modules if _ends_with_any(name, entries)}
        absent = sorted(set(layers) - present)
        if absent and len(missing) < len(targets):
            have = sorted(i for i in present if i is not None)
            remarks.append(f"layers_to_transform has {_examples(absent)}, but the matching modules are in "
                           + (f"layers {have[0]} to {have[-1]}" if have else "no numbered layer"))
    return found


def _nothing_chosen(config, targets, modules, matched):
    if matched:
        return (f"all {len(matched)} modules that target_modules={_show(targets)} means are left out by "
                f"exclude_modules={_show(config.exclude_modules)} or modules_to_save={_show(config.modules_to_save)}")
    text = f"target_modules={_show(targets)} matches no module of the model."
    if isinstance(targets, list):
        text += _near_names(targets, modules)
    else:
        text += " A regular expression must match the whole name."
    return f"{text} The model has {_examples(_linears(modules))}"


def _saved_leaves(config, modules):
    """Leaf modules that modules_to_save means: a named container stands for all its leaves. PEFT matches plain endings,
    without a dot, so that "norm" also means "input_layernorm"."""
    found, problems = [], []
    for entry in config.modules_to_save or ():
        roots = [name for name in modules if name.endswith(entry)]
        if not roots:
            problems.append(f"modules_to_save has {entry!r}, which the model does not have."
                            + _near_names([entry], modules))
        for root in roots:
            inside = [name for name in modules if name == root or name.startswith(root + ".")]
            leaves = [name for name in inside if modules[name].parameters and modules[name].whole]
            if not leaves:
                problems.append(f"modules_to_save has {entry!r}, but {root!r} is not a module that can be saved whole")
            found += [name for name in leaves if name not in found]
    return [name for name in modules if name in found], problems


def _biases(config, modules, targets, saved):
    if config.bias == "none":
        return ()
    return tuple(name for name, module in modules.items()
                 if module.kind == "linear" and "bias" in module.parameters and name not in saved
                 and (config.bias == "all" or name in targets))


def _target(config, name, kind, tests):
    r = next((config.rank_pattern[key] for key, names in tests.ranks.items() if name in names), config.r)
    alpha = next((config.alpha_pattern[key] for key, names in tests.alphas.items() if name in names), config.lora_alpha)
    return LoraTarget(name=name, kind=kind, r=r, alpha=alpha, scaling=config.scaling(r, alpha),
                      dora=config.use_dora, up_bias=config.lora_bias)


def _endings(name):
    """The name and its endings after each dot."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _ends_with_any(name, entries):
    """Whether the set ``entries`` has the name or an ending of it, cut at a dot."""
    return not entries.isdisjoint(_endings(name))


def _in_layers(config, name):
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    return _layer_index(config, name) in (layers if isinstance(layers, list) else [layers])


def _layer_index(config, name):
    """Index of the (first) numbered layer in a module's name, or None."""
    patterns = config.layers_pattern
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
        return int(match["index"]) if match else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The name of a list of layers, taken literally: PEFT would take it as an expression, which no file uses.
        match = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"])
    return None


def _linears(modules):
    return [name for name, module in modules.items() if module.kind in TARGET_KINDS]


def _near_names(entries, modules):
    known = {name.rsplit(".", 1)[-1] for name in _linears(modules)} | set(_linears(modules))
    return near(entries[0], known)


def _examples(names, count=5):
    """The first few names, and how many more there are."""
    names = [repr(name) for name in names]
    if not names:
        return "no linear"
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _show(value):
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
