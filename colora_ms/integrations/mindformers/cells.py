"""mindformers' linears, embeddings and norms as targets of ``inject``.

| class | called as | weight |
|---|---|---|
| ``modules.layers.Linear`` | y = f(x), with an activation perhaps | (out, in) or (in, out) |
| ``parallel_core.training_graph`` Column-, RowParallelLinear and subclasses | (y, bias) = f(x[, weight]) | both |
| ``parallel_core.inference`` Column-, Row-, QKV-, MergedColumn-, ReplicatedLinear | y = f(x[, weight]) | both |
| ``pynative.layers.linear.Linear`` | y = f(x[, weight]) | (out, in) |

With ``skip_bias_add`` the second result is the bias, which the caller adds: it is passed on as it is.
"""

from __future__ import annotations

import functools

import numpy as np

from mindformers.models.llama.llama_layer import LlamaEmbedding, LlamaRMSNorm
from mindformers.modules.layers import Linear
from mindformers.parallel_core.inference.tensor_parallel import layers as inference
from mindformers.parallel_core.training_graph.tensor_parallel import layers as training
from mindformers.parallel_core.training_graph.tensor_parallel import lora_layers
from mindformers.parallel_core.training_graph.transformer import norm as training_norms
from mindformers.parallel_core.training_graph.transformer.multi_token_prediction import MtpSharedVocabParallelEmbedding
from mindformers.pynative.base_models.common.embeddings.vocab_embedding import VocabEmbedding
from mindformers.pynative.layers import linear as pynative
from mindspore import Tensor

from colora_ms.adapters import tree
from colora_ms.adapters.tree import Traits


class ActivatedCall:
    """``modules.layers.Linear``, which applies its activation in its computing dtype."""

    def activate(self, y: Tensor) -> Tensor:
        """y: (..., out) -> the same shape and dtype."""
        return self.activation(y.astype(self.base_layer.dtype)).astype(y.dtype)


class WeightCall:
    """The call of a linear that takes its weight as a second argument where it is tied to another one."""

    def construct(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x: (..., in), weight: None or (out, in) -> (..., out) of x's dtype."""
        if weight is None:
            y = self.base_layer(x)
        else:
            y = self.base_layer(x, weight)
        return self.adapt(x, y)


class PairCall:
    """The call of a linear of ``training_graph``, which returns its result and the bias that it did not add."""

    def construct(self, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x: (..., in), weight: None or (out, in) -> ((..., out) of x's dtype, None or bias (out,))."""
        if weight is None:
            y, bias = self.base_layer(x)
        else:
            y, bias = self.base_layer(x, weight)
        return self.adapt(x, y), bias


class Transposed:
    """A base weight that is stored (in, out)."""

    def delta(self, slot: int) -> np.ndarray:
        """What a slot adds to the base weight as it is stored, float32."""
        return super().delta(slot).T


@functools.lru_cache(maxsize=None)
def _adapted(kind, call, transposed):
    """The class of adapter Cell ``kind`` with another call."""
    bases = (Transposed, call, kind) if transposed else (call, kind)
    return type(f"{kind.__name__}{call.__name__}", bases, {})


def _with(call):
    return lambda kind, cell: _adapted(kind, call, not cell.transpose_b)


def _parallel_sizes(cell):
    return cell.input_size, cell.output_size


def _is_split(cell):
    """Why a linear of the inference graph cannot be adapted: its weight is one device's part of the matrix."""
    parts = cell.tensor_parallel_group_size
    if parts == 1:
        return ""
    return (f"its weight is split over {parts} devices; merge the adapter into the weights before they are loaded, or "
            "run on one device")


def _add(cls, kind, traits):
    # In front of the table: a class here may be a subclass of one of MindSpore's.
    tree.KINDS.insert(0, (cls, kind))
    tree.TRAITS[cls] = traits


def _inference_sizes(cell):
    return cell.weight.shape[::-1] if cell.transpose_b else cell.weight.shape


_add(Linear, "linear", Traits(
    sizes=lambda cell: (cell.in_channels, cell.out_channels), transposed=lambda cell: not cell.transpose_b,
    adapted=_with(ActivatedCall), whole=False,
    refusal=lambda cell: "it holds the weights of several experts" if cell.expert_num > 1 else ""))
for _cls in (training.ColumnParallelLinear, training.RowParallelLinear):
    _add(_cls, "linear", Traits(
        sizes=_parallel_sizes, transposed=lambda cell: not cell.transpose_b, adapted=_with(PairCall), whole=False,
        heads=("output_layer",)))
for _cls in (inference.ColumnParallelLinear, inference.RowParallelLinear, inference.ReplicatedLinear):
    _add(_cls, "linear", Traits(
        sizes=_inference_sizes, transposed=lambda cell: not cell.transpose_b, adapted=_with(WeightCall), whole=False,
        refusal=_is_split, heads=("output_layer",)))
_add(pynative.Linear, "linear", Traits(
    sizes=_parallel_sizes, adapted=lambda kind, cell: _adapted(kind, WeightCall, False), whole=False,
    heads=("output_layer",)))
for _cls in (lora_layers.ColumnParallelLinearWithLoRA, lora_layers.RowParallelLinearWithLoRA):
    _add(_cls, "linear", Traits(sizes=_parallel_sizes, whole=False,
                                refusal=lambda cell: "it has a LoRA pair of mindformers already"))
for _cls in (LlamaEmbedding, training.VocabParallelEmbedding, VocabEmbedding):
    _add(_cls, "embedding", Traits())
_add(MtpSharedVocabParallelEmbedding, "other", Traits())  # it has no weight of its own
_add(inference.VocabParallelEmbedding, "embedding", Traits(refusal=_is_split))
for _cls in (LlamaRMSNorm, training_norms.LayerNorm, training_norms.RMSNorm, training_norms.FusedLayerNorm,
             training_norms.FusedRMSNorm):
    _add(_cls, "norm", Traits())
