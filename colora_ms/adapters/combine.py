"""Several adapters made into one: ``Adapters.add_weighted_adapter``, with PEFT's names of the ways to do it.

Written for the pairs (A_i, B_i) with scaling s_i and weight w_i, dW_i = s_i B_i A_i:

| combination_type | the new pair |
|---|---|
| ``cat`` | [w_1 s_1 A_1; w_2 s_2 A_2; ...] and [B_1 B_2 ...]: exactly sum w_i dW_i, at the sum of the ranks |
| ``svd`` | the best pair of rank ``svd_rank`` for sum w_i dW_i |
| ``linear`` | sum sign_i sqrt(\\|w_i s_i\\|) A_i and sum sqrt(\\|w_i s_i\\|) B_i: cross terms B_i A_j make it rough |
| ``ties`` | as linear, but each factor trimmed, then only values of the majority's sign are averaged |
| ``dare_linear``, ``dare_ties`` | as linear and ties, but values dropped at random, the rest divided by ``density`` |
| ``magnitude_prune`` | as linear, after trimming |
| ``..._svd`` | the same arithmetic on the dW_i in place of the factors, then as svd |

Sources: TIES, arXiv 2306.01708; DARE, arXiv 2311.03099. The arithmetic is that of PEFT 0.21
(``LoraModel.add_weighted_adapter``), pinned by goldens; PEFT's ``use_rslora`` slip (the new adapter's scaling becomes
sqrt(r) in place of 1) is not repeated.
"""

import copy
import math
import zlib
from typing import TYPE_CHECKING, Iterable, Optional

import numpy as np

from colora_ms.adapters.config import LoraConfig
from colora_ms.adapters.matching import Matched, match, shortest_names, value_shapes
from colora_ms.errors import AdapterError, near

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters

#: Arithmetic on the factors themselves, which must have equal ranks.
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")

#: Arithmetic on the products, cut back to a rank by a singular value decomposition.
ON_PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")

COMBINATIONS = ("cat", *ON_FACTORS, *ON_PRODUCTS)

MAJORITY_SIGNS = ("total", "frequency")


def combine(handle: 'Adapters', names: Iterable[str], weights: Iterable[float], combination_type: str = "svd",
            svd_rank: Optional[int] = None, svd_clamp: Optional[float] = None, density: Optional[float] = None,
            majority_sign_method: str = "total", seed: int = 0) -> tuple[LoraConfig, Matched, dict]:
    """The adapter that several others make together; nothing of ``handle`` changes.

    Args:
        handle: :class:`colora_ms.adapters.Adapters`.
        names: of the adapters, all LoRA without DoRA, biases or modules saved whole.
        weights: a number for each; negative ones subtract.
        combination_type: svd, cat, linear, ties, dare_linear, dare_ties, magnitude_prune, or one of the last four
            with ``_svd``, as in PEFT. With one adapter always linear.
        svd_rank: rank of the new adapter where the type ends in svd; by default the largest of the adapters'.
        svd_clamp: quantile at which the factors of a decomposition are cut off, or None.
        density: share of the values to keep, for the types with ties, dare or prune.
        majority_sign_method: how ties elects a sign: by the "total" of the values or their "frequency".
        seed: of the random choices of dare.

    Returns:
        (LoraConfig, Matched, {(module name, "lora"): {"down", "up"}} float32).
    """
    names, weights = list(names), list(weights)
    kind = _checked(handle, names, weights, combination_type, svd_rank, svd_clamp, density, majority_sign_method)
    adapters = []
    for name, weight in zip(names, weights):
        pairs, matched = {}, handle.matched(name)
        for place, shapes in value_shapes(matched, handle.modules).items():
            # PEFT's orientation: A (r, in), B (out, r), also for embeddings.
            values = handle.sites[place].read(handle.slot(name), shapes)
            target = matched.targets[place[0]]
            down = values["down"] if target.kind == "linear" else values["down"].T
            pairs[place[0]] = (down, values["up"], target.scaling)
        adapters.append((float(weight), pairs))
    rank = _rank(handle, names, kind, svd_rank)
    changed = {path: None for _, pairs in adapters for path in pairs}
    made = {}
    for path in changed:
        own = [(weight, *pairs[path]) for weight, pairs in adapters if path in pairs]
        random = [np.random.default_rng([seed, zlib.crc32(path.encode()), i]) for i in range(2 * len(own))]
        made[path] = _pair(kind, own, rank, path, density, majority_sign_method, svd_clamp, random)
    config = _config(handle, names, rank, changed)
    matched = match(config, handle.modules)
    values = {}
    for path, (down, up) in made.items():
        down = down if matched.targets[path].kind == "linear" else down.T
        values[path, "lora"] = {"down": np.ascontiguousarray(down, np.float32),
                                "up": np.ascontiguousarray(up, np.float32)}
    return config, matched, values


def _checked(handle, names, weights, kind, svd_rank, svd_clamp, density, majority_sign_method):
    """The way to combine, after checking everything that was asked for; all problems in one error."""
    problems = []
    if not names:
        problems.append("no adapter is named")
    if len(names) != len(weights):
        problems.append(f"{len(names)} adapters but {len(weights)} weights; give one weight for each")
    problems += [f"the weight of {name!r} is {weight!r}, expected a finite number"
                 for name, weight in zip(names, weights) if not _is_number(weight) or not math.isfinite(weight)]
    if kind not in COMBINATIONS:
        problems.append(f"combination_type is {kind!r}, expected one of {', '.join(COMBINATIONS)}."
                        + near(kind, COMBINATIONS))
    elif kind not in ("cat", "svd", "linear"):
        if not _is_number(density) or not 0 < density <= 1:
            problems.append(f"density is {density!r}; {kind} needs the share of the values to keep, above 0 and at "
                            "most 1")
    if svd_rank is not None and (not isinstance(svd_rank, int) or isinstance(svd_rank, bool) or svd_rank < 1):
        problems.append(f"svd_rank is {svd_rank!r}, expected a whole number above 0, or None for the largest rank")
    if svd_clamp is not None and (not _is_number(svd_clamp) or not 0 < svd_clamp <= 1):
        problems.append(f"svd_clamp is {svd_clamp!r}, expected a quantile above 0 and at most 1, or None")
    if majority_sign_method not in MAJORITY_SIGNS:
        problems.append(f"majority_sign_method is {majority_sign_method!r}, expected total or frequency")
    for name in names:
        config, matched = handle.config(name), handle.matched(name)
        if not isinstance(config, LoraConfig):
            problems.append(f"{name!r} is a {config.peft_type} adapter; only LoRA adapters can be combined")
            continue
        if matched.saved or matched.biases or matched.tokens:
            more = ", ".join([*matched.saved, *matched.biases, *matched.tokens][:3])
            problems.append(f"{name!r} also trains {more}, of which no sum is defined")
        for field, what in (("use_dora", "DoRA, whose change is not a low-rank product"),
                            ("lora_bias", "a bias on lora_B")):
            if getattr(config, field, False):
                problems.append(f"{name!r} uses {what}; merge it in place of combining it")
    if problems:
        raise AdapterError("the adapters cannot be combined: " + "; ".join(problems))
    return "linear" if len(names) == 1 else kind


def _rank(handle, names, kind, svd_rank):
    ranks = [max((target.r for target in handle.matched(name).targets.values()), default=0) for name in names]
    if kind == "cat":
        return sum(ranks)
    if kind in ON_PRODUCTS:
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        raise AdapterError(f"combination_type {kind!r} adds the factors themselves, which needs equal ranks, but "
                           + ", ".join(f"{name!r} has {r}" for name, r in zip(names, ranks))
                           + "; use 'cat' or 'svd'")
    return ranks[0]


def _pair(kind, own, rank, path, density, majority, clamp, random):
    """The new (A, B) of one module from its [(weight, A, B, scaling)]; random: two generators for each of them."""
    if kind == "cat":
        down = np.concatenate([weight * scaling * down for weight, down, _, scaling in own])
        return down, np.concatenate([up for _, _, up, _ in own], 1)
    if kind == "svd":
        down = np.concatenate([weight * scaling * down for weight, down, _, scaling in own])
        return _clamped(*_low_rank_svd(down, np.concatenate([up for _, _, up, _ in own], 1), rank), clamp)
    if kind in ON_PRODUCTS:
        change = _arithmetic(kind.removesuffix("_svd"), [scaling * (up @ down) for _, down, up, scaling in own],
                             [weight for weight, *_ in own], density, majority, random)
        u, s, v = np.linalg.svd(change.astype(np.float64), full_matrices=False)
        return _clamped(v[:rank], u[:, :rank] * s[:rank], clamp)
    if len({down.shape for _, down, _, _ in own}) > 1:
        raise AdapterError(f"combination_type {kind!r} adds the factors themselves, but at {path} the adapters have "
                           "ranks " + ", ".join(str(down.shape[0]) for _, down, _, _ in own) + "; use 'cat' or 'svd'")
    roots = [math.sqrt(abs(weight * scaling)) for weight, _, _, scaling in own]
    # The sign goes to one factor only, or it would cancel in the product.
    signed = [root if weight * scaling >= 0 else -root for root, (weight, _, _, scaling) in zip(roots, own)]
    n = len(own)
    return (_arithmetic(kind, [down for _, down, _, _ in own], signed, density, majority, random[:n]),
            _arithmetic(kind, [up for _, _, up, _ in own], roots, density, majority, random[n:]))


def _arithmetic(kind, tensors, weights, density, majority, random):
    """Sum of arrays of one shape after pruning, as ``kind`` says."""
    if kind.startswith("dare"):
        tensors = [_dropped(tensor, density, one) for tensor, one in zip(tensors, random)]
    elif kind != "linear":
        tensors = [_trimmed(tensor, density) for tensor in tensors]
    stack = np.stack(tensors).astype(np.float32)
    weighted = stack * np.array(weights, np.float32).reshape((-1,) + (1,) * (stack.ndim - 1))
    if not kind.endswith("ties"):
        return weighted.sum(0)
    sign = np.sign(stack)
    total = stack.sum(0) if majority == "total" else sign.sum(0)
    agree = sign == np.where(total >= 0, 1, -1)
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


def _trimmed(tensor, density):
    """The ``density`` share of the values that are largest in magnitude; zeros elsewhere."""
    if density >= 1:
        return tensor
    kept = np.zeros(tensor.size, bool)
    kept[np.argsort(-np.abs(tensor).reshape(-1), kind="stable")[:int(density * tensor.size)]] = True
    return tensor * kept.reshape(tensor.shape)


def _dropped(tensor, density, random):
    """Each value kept with probability ``density`` and divided by it, so that the mean stays."""
    if density >= 1:
        return tensor
    return tensor * (random.random(tensor.shape, np.float32) < density) / np.float32(density)


def _low_rank_svd(down, up, rank):
    """The best pair of ``rank`` for up @ down, without the product itself: (A, B)."""
    q_up, r_up = np.linalg.qr(up.astype(np.float64))
    q_down, r_down = np.linalg.qr(down.T.astype(np.float64))
    u, s, v = np.linalg.svd(r_up @ r_down.T)
    return v[:rank] @ q_down.T, (q_up @ u)[:, :rank] * s[:rank]


def _clamped(down, up, quantile):
    if quantile is None:
        return down, up
    limit = np.quantile(np.concatenate([up.reshape(-1), down.reshape(-1)]), quantile)
    return np.clip(down, -limit, limit), np.clip(up, -limit, limit)


def _config(handle, names, rank, changed):
    """Scaling 1, one rank, and exactly the modules that one of the adapters changes."""
    config = copy.deepcopy(handle.config(names[0]))
    config.r, config.lora_alpha, config.use_rslora = rank, rank, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.target_modules = shortest_names(changed, handle.modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.modules_to_save = None
    config.bias, config.init_lora_weights = "none", True
    return config


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
