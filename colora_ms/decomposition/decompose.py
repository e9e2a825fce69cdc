"""``decompose`` and ``recompose``: linears of a decoder replaced by factors, without training, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindspore import nn

from colora_ms.adapters import tree
from colora_ms.adapters.handle import HANDLE
from colora_ms.decomposition.plan import LrdPlan, Piece, linear_shapes
from colora_ms.decomposition.tucker import Factors, factorise
from colora_ms.errors import AdapterError, ConfigError
from colora_ms.models.builder import linear_of
from colora_ms.models.formats import StoredFactors, stored_float, weight_format
from colora_ms.models.low_rank import LowRankLinear, low_rank_linear, replace_linears


@dataclass(frozen=True)
class Decomposed:
    """What became of one matrix: ``error`` is the relative Frobenius error of its factors in float32."""

    path: str
    shape: tuple
    rank: int
    factors: int
    error: float
    parameters_before: int
    parameters_after: int

    @classmethod
    def of(cls, path: str, piece: Piece, found: Factors) -> Decomposed:
        """The row of one piece and its factors."""
        before = piece.shape[0] * piece.shape[1]
        return cls(path, piece.shape, piece.rank, piece.factors, found.error, before, piece.parameters)


def decompose(model: nn.Cell, plan: LrdPlan) -> list[Decomposed]:
    """Replace the linears that a plan means by factors, in place. No data and no training is needed.

    The decomposition is done in float32 and kept in the model's dtype (bfloat16 for integer weights). Biases stay;
    embedding and head are not touched. LoRA goes on top afterwards: ``inject`` puts its pair around the whole chain.

    Args:
        model: :class:`colora_ms.models.decoder.Decoder` without adapters.
        plan: :class:`LrdPlan`.

    Returns:
        list of :class:`Decomposed`, in the order of the model.

    Raises:
        ConfigError: the plan does not fit the model, or a weight is not finite.
        AdapterError: the model has adapters, or a chosen linear is decomposed already. The model is unchanged.

    Source: arXiv 2405.06626.
    """
    cells = plain_cells(model)
    pieces = plan.resolve(_model_shapes(model))
    twice = [path for path in pieces if isinstance(cells[path], LowRankLinear)]
    if twice:
        raise AdapterError(f"{twice[0]} is decomposed already ({len(twice)} such linears in the plan); "
                           "recompose(model) first, or load the original model")
    made, report = {}, []
    for path, piece in pieces.items():
        cell = cells[path]
        found = factors_of(path, tree.base_values(cell)["weight"], piece)
        made[path] = low_rank_linear(path, stored_factors(found), model.weight_format, _bias(cell))
        report.append(Decomposed.of(path, piece, found))
    replace_linears(model, made)
    tree.forget_graphs()
    return report


def recompose(model: nn.Cell) -> list[str]:
    """Replace the factors of a decomposed model by their products, in place: the same output from full matrices.

    Returns:
        Names of the linears that were recomposed (none: the model is as it was).

    Raises:
        AdapterError: the model has adapters.
    """
    wanted = weight_format(model.weight_format)
    chains = {path: cell for path, cell in plain_cells(model).items() if isinstance(cell, LowRankLinear)}
    made = {path: linear_of(path, wanted.pack(cell.stored().values()), _bias(cell)) for path, cell in chains.items()}
    replace_linears(model, made)
    tree.forget_graphs()
    return list(made)


def stored_factors(found: Factors) -> StoredFactors:
    """The factors of a matrix as a decoder and a folder take them."""
    return StoredFactors(stored_float(found.inner), stored_float(found.outer),
                         None if found.core is None else stored_float(found.core))


def factors_of(path: str, weight: np.ndarray, piece: Piece) -> Factors:
    """The factors of one matrix (out, in) of a plan.

    Raises:
        ConfigError: the weight is not finite; the message begins with its name.
    """
    try:
        return factorise(weight, piece.rank, piece.factors, piece.method)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def plain_cells(model: nn.Cell) -> dict[str, nn.Cell]:
    """{name: Cell} of a decoder.

    Raises:
        AdapterError: it has adapters.
    """
    if getattr(model, HANDLE, None) is not None:
        raise AdapterError("this model has adapters; unload() them first, and inject again afterwards: LoRA goes on "
                           "top of a decomposed model")
    return tree.cells_by_name(model)


def _model_shapes(model):
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "parameter_shapes"):
        raise AdapterError(f"{type(model).__name__} is no decoder of this package, so it cannot be decomposed; load it "
                           "with load_model")
    return linear_shapes(config)


def _bias(cell):
    return cell.bias if cell.has_bias else None
