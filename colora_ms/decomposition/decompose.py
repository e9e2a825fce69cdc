"""``decompose``: replace linears of a decoder by factors, without training; and the way to and from folders."""

import collections.abc
from dataclasses import dataclass

from colora_ms.decomposition.plan import linear_shapes
from colora_ms.decomposition.tucker import factorise
from colora_ms.errors import AdapterError, CheckpointError, ConfigError
from colora_ms.models.leaf import Leaf
from colora_ms.models.low_rank import CORE, INNER, OUTER, low_rank_linear
from colora_ms.models.replacing import replace_cells


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


def decompose(model, plan):
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
    cells = _plain_cells(model)
    pieces = plan.resolve(_model_shapes(model))
    twice = [path for path in pieces if _is_decomposed(cells[path])]
    if twice:
        raise AdapterError(f"{twice[0]} is decomposed already ({len(twice)} such linears in the plan); recompose(model) "
                           "first, or load the original model")
    made, report = {}, []
    for path, piece in pieces.items():
        cell = cells[path]
        found = _factorise(path, cell.base_values()["weight"], piece)
        made[path] = low_rank_linear(path, named(found), model.weight_format, cell.bias if cell.has_bias else None)
        report.append(_row(path, piece, found))
    replace_cells(model, made)
    return report


def recompose(model):
    """Replace the factors of a decomposed model by their products, in place: the same output from full matrices.

    Returns:
        Names of the linears that were recomposed (none: the model is as it was).

    Raises:
        AdapterError: the model has adapters.
    """
    from mindspore import Parameter

    from colora_ms.models.layers import Linear
    from colora_ms.models.quantize import to_format

    made = {}
    for path, cell in _plain_cells(model).items():
        if _is_decomposed(cell):
            tensor, scale = to_format(cell.product(), model.weight_format)
            weight = Parameter(tensor, name=f"{path}.weight", requires_grad=False)
            if scale is not None:
                scale = Parameter(scale, name=f"{path}.weight_scale", requires_grad=False)
            made[path] = Linear(weight, cell.in_features, cell.out_features, scale, cell.bias if cell.has_bias else None)
            weight.name = f"{path}.weight"
    replace_cells(model, made)
    return list(made)


def save_decomposed(model, folder, tokenizer=None, dtype="float32", overwrite=False):
    """Write a decomposed decoder as a folder that ``load_model`` reads.

    Args:
        model: float32 or bfloat16, decomposed, without adapters.
        folder: the folder to make; it appears complete or not at all.
        tokenizer: what ``load_tokenizer`` takes, or a Tokenizer, or None.
        dtype: "float32", "bfloat16" or "float16", of all tensors on disk.
        overwrite: replace a folder that is there.

    Raises:
        AdapterError: the model has adapters. CheckpointError: integer weights, nothing decomposed, or the folder cannot
            be written.
    """
    from colora_ms.adapters.slots import to_float32
    from colora_ms.models.low_rank_folder import low_rank_shapes, write_low_rank_folder

    chains = {path: cell for path, cell in _plain_cells(model).items() if _is_decomposed(cell)}
    if not chains:
        raise CheckpointError("nothing is decomposed in this model; call decompose(model, plan) first")
    if model.weight_format not in ("float32", "bfloat16"):
        raise CheckpointError(f"a model in {model.weight_format} cannot be saved; load and decompose it as float32 or "
                              "bfloat16, and choose the integer format when loading the decomposed folder")
    modules = {path: (cell.rank, cell.factors) for path, cell in chains.items()}
    parameters = {parameter.name: parameter for parameter in model.get_parameters()}
    tensors = _Tensors(low_rank_shapes(model.config, modules), lambda name: to_float32(parameters[name]))
    return write_low_rank_folder(folder, model.config, modules, tensors, tokenizer, dtype, overwrite)


def decompose_checkpoint(checkpoint, plan, folder, dtype="float32", dense=False, overwrite=False, on_row=None):
    """Decompose a model from file to file, one matrix in memory at a time.

    Args:
        checkpoint: what ``open_checkpoint`` returned.
        plan: :class:`LrdPlan`.
        folder: the folder to make; it appears complete or not at all.
        dtype: as in :func:`save_decomposed`.
        dense: write the products in place of the factors: a plain Hugging Face folder of the original size.
        on_row: called with every :class:`Decomposed`.

    Returns:
        list of :class:`Decomposed`.

    Raises:
        ConfigError: the plan does not fit the model. CheckpointError: the model is decomposed already, or the folder
            cannot be written.
    """
    from colora_ms.models.hf_folder import write_hf_folder
    from colora_ms.models.low_rank_folder import factor_shapes, low_rank_shapes, write_low_rank_folder

    if checkpoint.low_rank:
        raise CheckpointError(f"{checkpoint.path} is decomposed already; start from the original model")
    pieces = plan.resolve(linear_shapes(checkpoint.config))
    modules = {path: (piece.rank, piece.factors) for path, piece in pieces.items()}
    owner = {name: path for path, piece in pieces.items()
             for name in factor_shapes(path, piece.shape, piece.rank, piece.factors)}
    report, last = [], {}

    def factors_of(path):
        if path not in last:
            found = _factorise(path, checkpoint.tensors[f"{path}.weight"], pieces[path])
            last.clear()
            last[path] = found
            report.append(_row(path, pieces[path], found))
            if on_row is not None:
                on_row(report[-1])
        return last[path]

    def read(name):
        if dense:
            path = name[:-len(".weight")]
            return factors_of(path).product if path in pieces else checkpoint.tensors[name]
        if name in owner:
            return named(factors_of(owner[name]))[name[len(owner[name]) + 1:]]
        return checkpoint.tensors[name]

    if dense:
        write_hf_folder(folder, checkpoint.config, _Tensors(checkpoint.config.parameter_shapes(), read),
                        checkpoint.tokenizer_source, dtype, overwrite=overwrite)
    else:
        write_low_rank_folder(folder, checkpoint.config, modules, _Tensors(low_rank_shapes(checkpoint.config, modules), read),
                              checkpoint.tokenizer_source, dtype, overwrite)
    return report


def named(found):
    """{last part of the tensor's name: array} of :class:`Factors`."""
    core = {} if found.core is None else {CORE: found.core}
    return {INNER: found.inner, **core, OUTER: found.outer}


class _Tensors(collections.abc.Mapping):
    """Arrays by name, made when they are asked for; ``shapes`` without making them."""

    def __init__(self, shapes, read):
        self.shapes, self._read = shapes, read

    def __getitem__(self, name):
        return self._read(name)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def _plain_cells(model):
    """{name: Cell} of a decoder without adapters."""
    from colora_ms.adapters import tree
    from colora_ms.adapters.handle import HANDLE

    if getattr(model, HANDLE, None) is not None:
        raise AdapterError("this model has adapters; unload() them first, and inject again afterwards: LoRA goes on top of a "
                           "decomposed model")
    return tree.cells_by_name(model)


def _is_decomposed(cell):
    return isinstance(cell, Leaf) and cell.decomposed


def _model_shapes(model):
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "parameter_shapes"):
        raise AdapterError(f"{type(model).__name__} is no decoder of this package, so it cannot be decomposed; load it with "
                           "load_model")
    return linear_shapes(config)


def _factorise(path, weight, piece):
    try:
        return factorise(weight, piece.rank, piece.factors, piece.method)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _row(path, piece, found):
    before = piece.shape[0] * piece.shape[1]
    return Decomposed(path, piece.shape, piece.rank, piece.factors, found.error, before, piece.parameters)
