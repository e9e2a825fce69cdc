"""Tucker decompositions in NumPy: the truncated SVD of a matrix, and HOOI for tensors of any order.

A matrix W (out, in) becomes ``outer @ core @ inner`` with outer (out, r), core (r, r) and inner (r, in). For matrices
both methods give the best approximation of rank r in the Frobenius norm (Eckart and Young), so they differ only in how
they get there. HOOI: De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1, ..., RN) approximation of
higher-order tensors", SIAM J. Matrix Anal. Appl. 21 (2000); used on weights by arXiv 2405.06626.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from colora_ms.errors import ConfigError, near

METHODS = ("svd", "hooi")


@dataclass(frozen=True)
class Factors:
    """The parts of one matrix; their product is its approximation.

    Attributes:
        inner: (r, in); core: (r, r), or None in the form with two factors; outer: (out, r).
        error: Frobenius norm of what the approximation leaves, relative to the matrix.
    """

    inner: np.ndarray
    core: Optional[np.ndarray]
    outer: np.ndarray
    error: float

    @property
    def product(self) -> np.ndarray:
        """The approximation, (out, in)."""
        outer = self.outer if self.core is None else self.outer @ self.core
        return outer @ self.inner

    def folded(self) -> Factors:
        """The same product with two factors: the core goes into ``inner``."""
        return self if self.core is None else Factors(self.core @ self.inner, None, self.outer, self.error)


def factorise(weight: np.ndarray, rank: int, factors: int = 3, method: str = "svd") -> Factors:
    """Approximate a matrix by factors of a given rank.

    Args:
        weight: (out, in), float32 or float64; the work is done in its dtype.
        rank: from 1 to min(out, in).
        factors: 3 for (outer, core, inner), 2 for the core folded into inner.
        method: "svd" or "hooi".

    Returns:
        :class:`Factors` of weight's dtype.

    Raises:
        ConfigError: an argument is out of its range, or the weight holds a value that is not finite.
    """
    weight = np.asarray(weight)
    if weight.ndim != 2:
        raise ConfigError(f"a matrix is decomposed, got the shape {weight.shape}")
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected one of {', '.join(METHODS)}." + near(method, METHODS))
    if factors not in (2, 3):
        raise ConfigError(f"factors is {factors!r}, expected 2 or 3")
    if not isinstance(rank, (int, np.integer)) or isinstance(rank, bool) or not 1 <= rank <= min(weight.shape):
        raise ConfigError(f"rank is {rank!r}, expected from 1 to {min(weight.shape)}, the smaller side of "
                          f"{weight.shape}")
    if not np.isfinite(weight).all():
        raise ConfigError(f"the weight of shape {weight.shape} holds values that are not finite, it cannot be "
                          "decomposed")
    if method == "svd":
        outer, values, inner = np.linalg.svd(weight, full_matrices=False)
        outer, core, inner = outer[:, :rank], np.diag(values[:rank]), inner[:rank]
    else:
        core, (outer, right) = hooi(weight, (rank, rank))
        inner = right.T
    # Contiguous copies: a slice would keep the whole decomposition alive.
    found = Factors(np.array(inner, order="C"), np.array(core, order="C"), np.array(outer, order="C"), 0.0)
    norm = np.linalg.norm(weight)
    error = float(np.linalg.norm(weight - found.product) / norm) if norm > 0 else 0.0
    found = Factors(found.inner, found.core, found.outer, error)
    return found if factors == 3 else found.folded()


def hooi(tensor: np.ndarray, ranks: Sequence[int], init: str = "svd", iterations: int = 100, tolerance: float = 1e-9,
         seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Higher-order orthogonal iteration: a small core and a basis for every axis.

    The bases are improved in turn: with all others fixed, the best basis of an axis holds the leading left singular
    vectors of the tensor projected on the others and unfolded along that axis.

    Args:
        tensor: array with at least one axis.
        ranks: the core's shape, one number an axis, each from 1 to the axis's length.
        init: "svd" starts from the singular vectors of the unfolded tensor (HOSVD), "random" from random bases.
        iterations: rounds at most.
        tolerance: the end, when a round changes the core's norm by less than this share.
        seed: of the random bases.

    Returns:
        (core, bases): core of shape ``ranks``; bases[k] (axis k's length, ranks[k]) with orthonormal columns.
    """
    tensor = np.asarray(tensor)
    if len(ranks) != tensor.ndim or not all(1 <= r <= n for r, n in zip(ranks, tensor.shape)):
        raise ConfigError(f"ranks is {tuple(ranks)}, expected one number an axis of {tensor.shape}, at most its length")
    if init == "svd":
        bases = [_leading(_unfold(tensor, axis), rank) for axis, rank in enumerate(ranks)]
    elif init == "random":
        random = np.random.default_rng(seed)
        bases = [np.linalg.qr(random.standard_normal((n, r)).astype(tensor.dtype))[0]
                 for n, r in zip(tensor.shape, ranks)]
    else:
        raise ConfigError(f"init is {init!r}, expected 'svd' or 'random'")
    before = 0.0
    core = _project(tensor, bases)
    for _ in range(iterations):
        for axis, rank in enumerate(ranks):
            bases[axis] = _leading(_unfold(_project(tensor, bases, skip=axis), axis), rank)
        core = _project(tensor, bases)
        norm = float(np.linalg.norm(core))
        if abs(norm - before) <= tolerance * norm:
            break
        before = norm
    return core, bases


def reconstruct(core: np.ndarray, bases: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor that a core and its bases stand for."""
    for axis, basis in enumerate(bases):
        core = _multiply(core, basis, axis)
    return core


def _unfold(tensor, axis):
    """The tensor as a matrix whose rows run along ``axis``."""
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def _multiply(tensor, matrix, axis):
    """Multiply every column along ``axis`` by a matrix (new length, old length)."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


def _project(tensor, bases, skip=None):
    for axis, basis in enumerate(bases):
        if axis != skip:
            tensor = _multiply(tensor, basis.T, axis)
    return tensor


def _leading(matrix, rank):
    """The leading left singular vectors, (rows, rank); more than the columns are filled up to an orthonormal basis."""
    vectors = np.linalg.svd(matrix, full_matrices=matrix.shape[1] < rank)[0]
    return vectors[:, :rank]
