"""From stored weights to a decoder's leaf Cells: the one place where a Cell is chosen for what is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Optional, Union

import numpy as np
from tqdm import tqdm

from mindspore import Parameter, Tensor

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.models.activation_quant import ActivationQuantizedLinear
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family
from colora_ms.models.formats import StoredFactors, StoredWeight, stored_float, wanted_format
from colora_ms.models.layers import Embedding, LayerNorm, Linear, RMSNorm
from colora_ms.models.low_rank import LowRankLinear, low_rank_linear
from colora_ms.models.mapped import parameter_of
from colora_ms.models.repack import repacked

_PATIENCE = 2.0  # seconds without a bar

#: What a decoder is built from; see :class:`Builder`.
Weights = Mapping[str, Union[StoredWeight, StoredFactors, np.ndarray]]


class Builder:
    """Makes the leaf Cells of a decoder.

    Args:
        config: :class:`colora_ms.models.config.DecoderConfig`, for the shapes.
        weights: mapping of Hugging Face names to stored weights or float arrays, read one at a time; None for random
            weights (normal, standard deviation 0.02, seed 0; norms of ones).
        wanted: name of the format that matrices are stored in, or "auto": each as it comes.

    Attributes:
        names: {id: (Parameter, its name)}. A Cell renames the Parameters that are put into it; the names of the
            checkpoint are the ones that count, so they are given back when the tree is complete.
    """

    def __init__(self, config: DecoderConfig, weights: Optional[Weights], wanted: str) -> None:
        self.shapes = config.parameter_shapes()
        self.weights = weights
        self.wanted = wanted
        self.form = wanted_format(wanted)
        self.eps = config.rms_norm_eps
        self.norms = family(config.model_type).norm  # their kind
        self.random = np.random.default_rng(0)
        self.names: dict[int, tuple[Parameter, str]] = {}
        self._progress = _Progress(sum(map(math.prod, self.shapes.values())))

    def stored(self, name: str) -> Union[StoredWeight, StoredFactors]:
        """What is stored under a name.

        Raises:
            CheckpointError: nothing, or of another shape than the config's.
        """
        shape = tuple(self.shapes[name])
        self._progress.add(math.prod(shape))
        if self.weights is None:
            if name.endswith("norm.weight"):
                return stored_float(np.full(shape, 0 if self.norms == "rms_plus_one" else 1, np.float32))
            return stored_float((self.random.standard_normal(shape, np.float32) * np.float32(0.02)).astype(np.float32))
        if name not in self.weights:
            raise CheckpointError(f"tensor {name!r} of shape {shape} is missing")
        found = self.weights[name]
        if not isinstance(found, (StoredWeight, StoredFactors)):
            # An array that its owner may write into is copied; one that nobody writes into is not.
            found = stored_float(np.array(found) if getattr(found, "flags", None) and found.flags.writeable else found)
        if tuple(found.shape) != shape:
            raise CheckpointError(f"tensor {name!r} has shape {tuple(found.shape)}, the config asks for {shape}")
        return found

    def linear(self, prefix: str) -> Union[Linear, LowRankLinear, ActivationQuantizedLinear]:
        """The linear called ``prefix``: of one matrix, of factors, or with rounded activations."""
        stored = self.stored(f"{prefix}.weight")
        bias = self.vector(f"{prefix}.bias") if f"{prefix}.bias" in self.shapes else None
        if isinstance(stored, StoredFactors):
            cell = low_rank_linear(prefix, stored, self.wanted, bias)
            for part, parameter in cell.factor_parameters().items():
                self._keep(parameter, f"{prefix}.{part}")
            return cell
        cell = linear_of(prefix, self._in_format(f"{prefix}.weight", stored), bias)
        self._keep_weight(cell, prefix)
        inputs, outputs = stored.activations
        return ActivationQuantizedLinear(cell, inputs, outputs) if inputs or outputs else cell

    def embedding(self, prefix: str) -> Embedding:
        """The embedding called ``prefix``.

        Raises:
            CheckpointError: it is stored as only a linear can be.
        """
        stored = self.stored(f"{prefix}.weight")
        if isinstance(stored, StoredFactors) or any(stored.activations):
            raise CheckpointError(f"the embedding {prefix} is stored as factors or with rounded activations, which "
                                  "only linears can be")
        stored = self._in_format(f"{prefix}.weight", stored)
        if stored.order is not None:
            raise CheckpointError(f"the embedding {prefix} is stored as {stored.format.name}, which only linears can "
                                  "be; load the model in a format by name, such as weight_format=\"float32\"")
        weight, scale = weight_parameters(prefix, stored)
        cell = Embedding(weight, stored.shape[1], weight_scale=scale, weight_format=stored.format)
        self._keep_weight(cell, prefix)
        return cell

    def _in_format(self, name: str, stored: StoredWeight) -> StoredWeight:
        try:
            return repacked(stored, self.form)
        except (CheckpointError, ConfigError) as error:
            raise type(error)(f"tensor {name!r}: {error}") from None

    def norm(self, prefix: str) -> RMSNorm:
        """The norm called ``prefix``."""
        kind = LayerNorm if self.norms == "layer" else RMSNorm
        return kind(self.vector(f"{prefix}.weight"), self.eps, self.norms == "rms_plus_one")

    def vector(self, name: str) -> Parameter:
        """A float32 Parameter, for what is no matrix."""
        return self._keep(parameter_of(Tensor.from_numpy(np.array(self.stored(name).values())), name), name)

    def _keep_weight(self, cell: Union[Linear, Embedding], prefix: str) -> None:
        self._keep(cell.weight, f"{prefix}.weight")
        if cell.format.scaled:
            self._keep(cell.weight_scale, f"{prefix}.weight_scale")
        if cell.format.ordered:
            self._keep(cell.order, f"{prefix}.order")

    def _keep(self, parameter: Parameter, name: str) -> Parameter:
        self.names[id(parameter)] = (parameter, name)
        return parameter


class _Progress:
    """A bar on standard error, if that is a terminal and loading takes more than two seconds.

    Args:
        total: numbers that the model has.
    """

    def __init__(self, total: int) -> None:
        self.left = total
        self.bar = tqdm(total=total, desc="loading", unit=" weights", unit_scale=True, delay=_PATIENCE, disable=None,
                        leave=False)

    def add(self, count: int) -> None:
        """So many numbers more are being read; behind the last ones the bar goes."""
        self.left -= count
        self.bar.update(count)
        if self.left <= 0:
            self.bar.close()


def weight_parameters(path: str, stored: StoredWeight) -> tuple[Parameter, Optional[Parameter]]:
    """(``<path>.weight``, ``<path>.weight_scale`` or None), frozen."""
    weight, scale = stored.tensors()
    return (parameter_of(weight, f"{path}.weight"),
            None if scale is None else parameter_of(scale, f"{path}.weight_scale"))


def linear_of(path: str, stored: StoredWeight, bias: Optional[Parameter]) -> Linear:
    """A Linear of a stored matrix (out, in), in its own format; ``bias``: its Parameter (out,) or None."""
    weight, scale = weight_parameters(path, stored)
    order = None if stored.order is None else parameter_of(Tensor.from_numpy(stored.order), f"{path}.order")
    return Linear(weight, stored.shape[1], stored.shape[0], weight_scale=scale, bias=bias,
                  weight_format=stored.format, order=order)
