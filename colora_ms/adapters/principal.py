"""Adapters that start from the base weight: PiSSA and OLoRA, DoRA's magnitudes, and the way back to plain LoRA.

    PiSSA (arXiv 2404.02948):  W = U S V^T,  down = sqrt(S_r / scale) V_r^T,  up = U_r sqrt(S_r / scale)
    OLoRA (arXiv 2406.01775):  W = Q R,      down = R_r,                      up = Q_r

and W - scale up down stays in the base, so that the model computes at first what it did before. Such an adapter means
nothing on the untouched base. As plain LoRA of twice the rank it does (PEFT's conversion):

    scale (up down - up_0 down_0) = scale [up, -up_0] [down; down_0]
"""

import copy
import dataclasses
import math
from typing import Any, Callable, Optional

import numpy as np

from mindspore import nn

from colora_ms.adapters.dora import row_lengths
from colora_ms.adapters.matching import Matched, Module, Target
from colora_ms.adapters.outside import leaf
from colora_ms.errors import AdapterError


def start_from_base(config: Any, target: Target, values: dict[str, np.ndarray], weight: Callable,
                    random: np.random.Generator) -> tuple[dict, Optional[np.ndarray]]:
    """The parts of a new LoRA adapter that depend on the base weight of its module.

    Args:
        config: LoraConfig; target: LoraTarget.
        values: {"down": (r, in), "up": (out, r), ...} float32, what the adapter starts from otherwise.
        weight: function that returns the base weight (out, in) as float32.
        random: numpy Generator.

    Returns:
        (values, what is added to the base weight: (out, in) float32, or None).
    """
    change = None
    if config.changes_base:
        w = weight()
        values = {**values, **principal_pair(config, target, w, random)}
        change = np.float32(-target.scaling) * (values["up"] @ values["down"])
    if target.dora:
        w = weight() if change is None else weight() + change
        values = {**values, "magnitude": row_lengths(w, target.scaling * (values["up"] @ values["down"]))}
    return values, change


def check_splittable(config: Any, matched: Matched, modules: dict[str, Module], cells: dict[str, nn.Cell]) -> None:
    """Refuse PiSSA and OLoRA on anything but plain linears, and at ranks above the number of a weight's directions."""
    problems = []
    for path, target in matched.targets.items():
        most = min(modules[path].in_features, modules[path].out_features)
        if target.kind != "linear":
            problems.append(f"{path} is an {target.kind}")
        elif not leaf(cells[path]).plain:
            problems.append(f"{path} is a {type(cells[path]).__name__}, not a plain linear")
        elif target.r > most:
            problems.append(f"{path} has rank {target.r}, but its weight has only {most} directions (use rank_pattern)")
    if problems:
        raise AdapterError(f"init_lora_weights={config.init_lora_weights!r} splits the weights of linears: "
                           + "; ".join(problems[:8]))


def principal_pair(config: Any, target: Target, weight: np.ndarray,
                   random: Optional[np.random.Generator]) -> dict[str, np.ndarray]:
    """{"down", "up"} float32 of PiSSA or OLoRA for a weight (out, in)."""
    if config.init_lora_weights == "olora":
        q, r = np.linalg.qr(weight)
        return {"down": np.ascontiguousarray(r[:target.r]), "up": np.ascontiguousarray(q[:, :target.r])}
    if config.pissa_iterations is None:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = truncated_svd(weight, target.r, config.pissa_iterations, random)
    root = np.sqrt(s[:target.r] / np.float32(target.scaling))
    return {"down": root[:, None] * v[:target.r], "up": np.ascontiguousarray(u[:, :target.r] * root)}


def truncated_svd(weight: np.ndarray, rank: int, iterations: int,
                  random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values of a matrix by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 5.1).

    Returns:
        (u (out, rank), s (rank,), v (rank, in)) float32.
    """
    basis = np.linalg.qr(weight @ random.standard_normal((weight.shape[1], rank), np.float32))[0]
    for _ in range(iterations):
        basis = np.linalg.qr(weight.T @ basis)[0]
        basis = np.linalg.qr(weight @ basis)[0]
    u, s, v = np.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, v


def as_plain_lora(config: Any, matched: Matched, values: dict[tuple[str, str], dict[str, np.ndarray]],
                  starts: dict) -> tuple[Any, Matched, dict]:
    """An adapter with PiSSA's or OLoRA's start as plain LoRA for the untouched base.

    Args:
        config: LoraConfig; matched: its Matched; values: {(module name, role): {field: array}}.
        starts: {module name: {"down", "up"}} of the pair that was taken from each base weight.

    Returns:
        (config, matched, values) of the same change at twice the rank; the arguments are left alone.
    """
    config = copy.deepcopy(config)
    alpha = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, alpha * config.lora_alpha, True
    config.rank_pattern = {key: 2 * r for key, r in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha * one for key, one in config.alpha_pattern.items()}
    targets = {path: dataclasses.replace(one, r=2 * one.r, alpha=alpha * one.alpha)
               for path, one in matched.targets.items()}
    joined = dict(values)
    for path, start in starts.items():
        own = values[path, "lora"]
        joined[path, "lora"] = {**own, "down": np.concatenate([own["down"], start["down"]]),
                                "up": np.concatenate([own["up"], -start["up"]], 1)}
    return config, dataclasses.replace(matched, targets=targets), joined


def starts_on(config: Any, matched: Matched, weight: Callable) -> dict:
    """The pairs that PiSSA or OLoRA took from the base, found again: {module name: {"down", "up"}}.

    Args:
        config: LoraConfig of an adapter on disk; matched: its Matched.
        weight: function (module name) -> the untouched base weight, float32.

    Raises:
        AdapterError: the start was random, so that the base alone does not tell it.
    """
    if config.pissa_iterations is not None:
        raise AdapterError(f"init_lora_weights={config.init_lora_weights!r} starts from random numbers that the folder "
                           "does not hold, so the base weight that the adapter belongs to cannot be found again; save "
                           "it as plain LoRA (here: save(..., as_lora=True); PEFT: "
                           "path_initial_model_for_weight_conversion)")
    # The pair itself is unique up to signs, its product is unique; only the product counts.
    return {path: principal_pair(config, target, weight(path), None) for path, target in matched.targets.items()}
