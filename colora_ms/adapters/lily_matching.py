"""What a Lily config does to a model: which modules share A and B, the tensors on disk, and the values to start from.

Zhong et al., arXiv 2407.09946: one A for each block of ``stride_A`` neighbouring layers, one set of experts B for all
layers, one router a layer, all of it apart for each type of module (q_proj, v_proj, ...). A shared tensor is owned by
the first module that uses it, under whose name it is stored. Pure Python and NumPy: it sees names and shapes only.
"""

from dataclasses import dataclass
from typing import Any, Callable, Iterable, Optional

import numpy as np

from colora_ms.adapters import matching
from colora_ms.adapters.matching import Matched, Module, Target
from colora_ms.adapters.peft_format import PREFIX, Entry
from colora_ms.adapters.peft_format import entries as lora_entries
from colora_ms.errors import AdapterError


@dataclass(frozen=True)
class LilyTarget(Target):
    """One module with its part of a Lily adapter.

    Attributes:
        experts: number of B's; pool, form: ``router_pool`` and ``router_form`` of the config.
        group: what its modules have in common (for messages and tables); block: number of its A within the group.
        down_owner, up_owner: names of the modules that own its A and its B's.
    """

    experts: int = 0
    pool: str = "token"
    form: str = "code"
    group: str = ""
    block: int = 0
    down_owner: str = ""
    up_owner: str = ""


def match(config: Any, modules: dict[str, Module], defaults: Optional[list] = None) -> Matched:
    """The Matched of a LilyConfig, whose targets are :class:`LilyTarget`; arguments as ``matching.match``.

    Raises:
        AdapterError: what ``matching.match`` refuses; a matched module that is no linear; modules of one type whose
            shapes differ, so that they cannot share.
    """
    matched = matching.match(config.targets_of(), modules, defaults)
    wrong = [name for name, target in matched.targets.items() if target.kind != "linear"]
    if wrong:
        raise AdapterError(f"Lily adapts linears, but target_modules also matches {wrong[0]!r}, which is an embedding; "
                           "leave it out with exclude_modules")
    targets = {}
    for label, names in groups(config, matched.targets, modules, defaults).items():
        for number, name in enumerate(names):
            block = number // config.stride_A
            targets[name] = LilyTarget(
                name=name, kind="linear", r=config.r, alpha=config.scaling, scaling=config.scaling,
                experts=config.num_B,
                pool=config.router_pool, form=config.router_form, group=label, block=block,
                down_owner=names[block * config.stride_A], up_owner=names[0])
    return Matched({name: targets[name] for name in matched.targets}, matched.saved, matched.biases)


def groups(config: Any, names: Iterable[str], modules: dict[str, Module],
           defaults: Optional[list] = None) -> dict[str, list[str]]:
    """{label: module names, in the order of the model} of the modules that share experts.

    Args:
        config: LilyConfig; names: the adapted modules in the order of the model; modules: {name: Module}; defaults: as
            for ``matching.match``.
    """
    found = {}
    for name in names:
        module = modules[name]
        label = name.rsplit(".", 1)[-1]
        if config.share == "entry":
            label = f"{_entry(config, name, defaults) or label} ({module.out_features}, {module.in_features})"
        found.setdefault(label, []).append(name)
    for label, members in found.items():
        first = modules[members[0]]
        for name in members:
            module = modules[name]
            if (module.in_features, module.out_features) != (first.in_features, first.out_features):
                raise AdapterError(
                    f"the modules called {label!r} cannot share a Lily adapter: {members[0]} maps {first.in_features} "
                    f"to {first.out_features} features, {name} maps {module.in_features} to {module.out_features}; use "
                    "share=\"entry\", which shares among equal shapes only, or leave some out with exclude_modules or "
                    "layers_to_transform")
    return found


def _entry(config, name, defaults):
    """The entry of target_modules that matches a name (the longest, if several do), or "" for "all-linear"."""
    entries = config.target_modules if config.target_modules is not None else defaults
    if isinstance(entries, str):
        return "" if entries.lower() == matching.ALL_LINEAR else entries
    return max((entry for entry in entries if name == entry or name.endswith("." + entry)), key=len, default="")


def value_shapes(matched: Matched, modules: dict[str, Module]) -> dict[tuple[str, str], dict]:
    """{(module name, role): {field: shape}} of the values that each module owns.

    "down" (r, in); "up" (out, experts * r): the experts side by side; "router" (experts, r), or (experts,) if static.
    """
    shapes = matching.value_shapes(Matched({}, matched.saved, matched.biases), modules)
    for name, target in matched.targets.items():
        module, own = modules[name], {}
        if target.down_owner == name:
            own["down"] = (target.r, module.in_features)
        if target.up_owner == name:
            own["up"] = (module.out_features, target.experts * target.r)
        own["router"] = (target.experts,) if target.pool == "static" else (target.experts, target.r)
        shapes[name, "lora"] = own
    return shapes


def parameter_count(matched: Matched, modules: dict[str, Module], shapes: Optional[Callable] = None) -> int:
    """Numbers that an adapter of these targets has (trains and stores); from shapes alone.

    Args:
        matched, modules: as :func:`value_shapes`; shapes: another method's ``value_shapes``, by default Lily's.
    """
    found = (shapes or value_shapes)(matched, modules)
    return sum(int(np.prod(shape)) for own in found.values() for shape in own.values())


def entries(matched: Matched, modules: dict[str, Module]) -> dict[str, Entry]:
    """{key on disk: Entry}: PEFT's names, where a shared tensor's copies are those of the modules that do not own it.

    On disk ``lily_A.weight`` (r, in), ``lily_B.weight`` (experts * r, out), ``lily_router.weight`` (experts, r).
    """
    copies = {}
    for name, target in matched.targets.items():
        for owner, tensor in ((target.down_owner, "lily_A"), (target.up_owner, "lily_B")):
            if owner != name:
                copies.setdefault((owner, tensor), []).append(f"{PREFIX}{name}.{tensor}.weight")
    found = {}
    for (name, role), own in value_shapes(matched, modules).items():
        if role != "lora":
            continue
        for field, tensor in (("down", "lily_A"), ("up", "lily_B"), ("router", "lily_router")):
            if field in own:
                shape = own[field][::-1] if field == "up" else own[field]
                found[f"{PREFIX}{name}.{tensor}.weight"] = Entry(
                    name, "lora", field, shape, transposed=field == "up", copies=tuple(copies.get((name, tensor), ())))
    return {**found, **lora_entries(Matched({}, matched.saved, matched.biases), modules)}


def initial_values(config: Any, target: Target, module: Module, random: np.random.Generator) -> dict[str, np.ndarray]:
    """The values that a module owns at the start, float32: A and router uniform as in PEFT, experts zero.

    Static weights start from a normal distribution, since experts with equal weights everywhere would stay equal.

    Args:
        config: LilyConfig; target: LilyTarget; module: its Module; random: numpy Generator.
    """
    def uniform(shape, inner):
        # Kaiming-uniform with a = sqrt(5) is the uniform distribution on +-1/sqrt(inner).
        return random.uniform(-1, 1, shape).astype(np.float32) / np.float32(np.sqrt(inner))

    static = target.pool == "static"
    values = {"router": random.standard_normal(target.experts, np.float32) if static
              else uniform((target.experts, target.r), target.r)}
    if target.down_owner == target.name:
        values["down"] = uniform((target.r, module.in_features), module.in_features)
    if target.up_owner == target.name:
        shape = (module.out_features, target.experts * target.r)
        values["up"] = np.zeros(shape, np.float32) if config.init_weights else uniform(shape, module.out_features)
    return values


def why_not_merge(config: Any) -> str:
    """Why such an adapter cannot be merged, or ""."""
    if config.router_pool == "static":
        return ""
    return (f"with router_pool={config.router_pool!r} the router weighs the experts by each input, so that no one "
            "matrix equals the adapter; use it unmerged, or train with router_pool=\"static\"")
