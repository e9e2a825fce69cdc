"""Cross-entropy of a language model's head, fused with the head's product so that no (tokens, vocab) matrix is kept."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.dequantize import dequantize
from colora_ms.kernels.linear_operator import check_linear_dtypes, check_matrix
from colora_ms.kernels.operands import flat_base, read_linear
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

#: Label of a token that has no part in the loss.
IGNORED = -100


def linear_cross_entropy(hidden: Tensor, base: tuple, labels: Tensor) -> Tensor:
    """Summed cross-entropy of ``softmax(hidden @ weight.T)``.

    Semantics, over the tokens n with ``labels[n] != -100``: ``loss_sum = sum(logsumexp(z[n]) - z[n, labels[n]])`` with
    ``z = hidden @ weight.T`` in float32; the other tokens are not computed. The forward pass also computes the gradient
    of ``hidden``, block by block (the idea of Cut Cross-Entropy, arXiv 2411.09009); for a loss alone, without training,
    :func:`linear_token_losses` costs half.

    Args:
        hidden: (tokens, hidden_size) float32.
        base: the weight (vocab, hidden_size) as a linear's base without a bias
            (:func:`colora_ms.kernels.operands.base_of`), in any format of :func:`colora_ms.kernels.multi_lora_linear`.
        labels: (tokens,) int32, each -100 or 0 <= label < vocab.

    Returns:
        ``(loss_sum, count)``: float32 of rank 0, the sum and the number of tokens in it (0 and 0 if there is none).

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a label is out of range.

    Gradients: hidden, and a float32 or bfloat16 weight; that of weight is computed only where weight is trained.
    """
    return bound.linear_cross_entropy(hidden, base, labels)


def linear_token_cross_entropy(hidden: Tensor, base: tuple, labels: Tensor) -> Tensor:
    """The cross-entropy of each token, for losses that weigh answers or tokens; the arguments of linear_cross_entropy.

    As there, the forward pass also computes the gradient of ``hidden``; the gradient that arrives from behind
    multiplies each token's row of it. No logits are kept.

    Returns:
        (tokens,) float32: ``logsumexp(z[n]) - z[n, labels[n]]``, and 0 where the label is -100; equal to
        :func:`linear_token_losses` to the last bit.

    Raises:
        KernelError, RuntimeError: as :func:`linear_cross_entropy`.

    Gradients: hidden, and a float32 or bfloat16 weight; that of weight is computed only where weight is trained.
    """
    return bound.linear_token_cross_entropy(hidden, base, labels)


def linear_token_losses(hidden: Tensor, base: tuple, labels: Tensor) -> Tensor:
    """The cross-entropy of each token, for perplexity and multiple choice; the arguments of linear_cross_entropy.

    Returns:
        (tokens,) float32: ``logsumexp(z[n]) - z[n, labels[n]]``, and 0 where the label is -100.

    Raises:
        KernelError, RuntimeError: as :func:`linear_cross_entropy`.

    Gradients: hidden, and a float32 or bfloat16 weight, at twice the cost of the forward pass; where a gradient is
    wanted, :func:`linear_token_cross_entropy` computes it on the way.
    """
    return bound.linear_token_losses(hidden, base, labels)


def linear_token_losses_reference(hidden: Tensor, base: tuple, labels: Tensor) -> Tensor:
    """:func:`linear_token_losses` in built-in operators; differentiable, any device; labels are not checked."""
    form, tensors, _ = base
    if len(tensors) > 2:
        raise ValueError("linear_cross_entropy takes one matrix whose columns lie as they are counted")
    return token_losses_of_logits(ops.matmul(hidden, dequantize(form, *tensors).transpose((1, 0))), labels)


def token_losses_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each token through the whole logits, for heads that are not one float matrix.

    Args:
        logits: (tokens, vocab) float32.
        labels: (tokens,) int32, each -100 or 0 <= label < vocab (not checked).

    Returns:
        (tokens,) float32, 0 where the label is -100; differentiable, any device.
    """
    picked = ops.gather_elements(logits, 1, ops.maximum(labels, 0).reshape((-1, 1)))
    losses = ops.logsumexp(logits, 1) - picked.reshape((-1,))
    return ops.where(labels == IGNORED, ops.zeros_like(losses), losses)


def linear_cross_entropy_reference(hidden: Tensor, base: tuple, labels: Tensor) -> Tensor:
    """:func:`linear_cross_entropy` in built-in operators; differentiable, any device; labels are not checked."""
    losses = linear_token_losses_reference(hidden, base, labels)
    return losses.sum(), (labels != IGNORED).astype(ms.float32).sum()


# -- the CPU operators ------------------------------------------------------------------------------------------------
# Their inputs are hidden, labels and the flat tensors of the base.

def _check(name, shapes):
    hidden, labels = shapes[:2]
    require(len(hidden) == 2, name, "hidden", hidden, "(tokens, hidden_size)")
    require_shape(name, "labels", labels, hidden[:1])
    places, _ = read_linear(name, shapes, 2)
    require(set(places.base) <= {"weight", "weight_scale"} and not places.adapter, name, "base", places.form,
            "one matrix without a bias or an adapter")
    scale = shapes[places.base["weight_scale"]] if "weight_scale" in places.base else None
    return places, check_matrix(name, places.form, shapes[places.base["weight"]], scale, hidden[1])


def _loss_shapes(*shapes):
    _check("linear_cross_entropy", shapes)
    return [1], [1], shapes[0], shapes[1], shapes[1]  # a rank of 0 would become a Python number in the graph


def _token_shapes(*shapes):
    _check("linear_token_losses", shapes)
    return shapes[1]


def _gradient_shapes(*shapes):
    return list(_check("linear_cross_entropy_weight_grad", shapes)[1])


def _dtype_function(name, outputs):
    def dtypes(shapes, *dtypes):
        kinds = [element_type(kind) for kind in dtypes]
        require_dtype(name, "hidden", kinds[0], (ms.float32,))
        require_dtype(name, "labels", kinds[1], (ms.int32,))
        check_linear_dtypes(name, _check(name, shapes)[0], kinds)
        return (ms.float32,) * outputs if outputs > 1 else ms.float32
    return dtypes


def _weight_gradient(hidden, labels, tag, weight, lse, share):
    """Of a float weight; the compiler drops it where the weight is frozen. Other formats are always frozen."""
    if weight.dtype == ms.float32 or weight.dtype == ms.bfloat16:
        dweight = bound.linear_cross_entropy_weight_grad(hidden, labels, tag, weight, lse, share)
        return dweight.astype(weight.dtype)
    return ops.zeros_like(weight)


def _plain_bprop(hidden, labels, tag, weight, out, dout):
    share = dout[0] + dout[4]  # of each token's loss in what is differentiated: through the sum, and by itself
    return (out[2] * share.reshape((-1, 1)), ops.zeros_like(labels), ops.zeros_like(tag),
            _weight_gradient(hidden, labels, tag, weight, out[3], share))


def _packed_bprop(hidden, labels, tag, weight, weight_scale, out, dout):
    share = dout[0] + dout[4]
    return (out[2] * share.reshape((-1, 1)), ops.zeros_like(labels), ops.zeros_like(tag), ops.zeros_like(weight),
            ops.zeros_like(weight_scale))


# The product is computed again, with its gradient. Behind a stop_gradient the compiler drops all of it.
def _plain_token_bprop(hidden, labels, tag, weight, out, dout):
    _, _, slope, lse, _ = bound.linear_cross_entropy_plain(hidden, labels, tag, weight)
    return (slope * dout.reshape((-1, 1)), ops.zeros_like(labels), ops.zeros_like(tag),
            _weight_gradient(hidden, labels, tag, weight, lse, dout))


def _packed_token_bprop(hidden, labels, tag, weight, weight_scale, out, dout):
    _, _, slope, _, _ = bound.linear_cross_entropy_packed(hidden, labels, tag, weight, weight_scale)
    return (slope * dout.reshape((-1, 1)), ops.zeros_like(labels), ops.zeros_like(tag), ops.zeros_like(weight),
            ops.zeros_like(weight_scale))


# Outputs: loss_sum (1,), count (1,), d loss_sum / d hidden, the log-sum-exp of each token, the loss of each token.
def _parts(hidden, base, labels):
    flat = flat_base(base)
    if len(flat) == 2:
        return bound.linear_cross_entropy_plain(hidden, labels, *flat)
    return bound.linear_cross_entropy_packed(hidden, labels, *flat)


def _linear_cross_entropy(hidden, base, labels):
    loss_sum, count, _, _, _ = _parts(hidden, base, labels)
    return loss_sum.reshape(()), count.reshape(())


def _linear_token_cross_entropy(hidden, base, labels):
    return _parts(hidden, base, labels)[4]


def _linear_token_losses(hidden, base, labels):
    flat = flat_base(base)
    if len(flat) == 2:
        return bound.linear_token_losses_plain(hidden, labels, *flat)
    return bound.linear_token_losses_packed(hidden, labels, *flat)


def _operator(name, shapes, outputs, bprop, tensors):
    # MindSpore keeps one gradient graph for all primitives whose attributes are equal.
    made = custom(name, shapes, _dtype_function(name, outputs), bprop, by_shapes=True)
    return made.add_prim_attr("tensors", tensors)


operation("linear_cross_entropy", reference=lambda: linear_cross_entropy_reference, cpu=lambda: _linear_cross_entropy)
operation("linear_token_cross_entropy", reference=lambda: linear_token_losses_reference,
          cpu=lambda: _linear_token_cross_entropy)
operation("linear_token_losses", reference=lambda: linear_token_losses_reference, cpu=lambda: _linear_token_losses)
operation("linear_cross_entropy_plain",
          cpu=lambda: _operator("linear_cross_entropy", _loss_shapes, 5, _plain_bprop, 1))
operation("linear_cross_entropy_packed",
          cpu=lambda: _operator("linear_cross_entropy", _loss_shapes, 5, _packed_bprop, 2))
operation("linear_token_losses_plain",
          cpu=lambda: _operator("linear_token_losses", _token_shapes, 1, _plain_token_bprop, 1))
operation("linear_token_losses_packed",
          cpu=lambda: _operator("linear_token_losses", _token_shapes, 1, _packed_token_bprop, 2))
operation("linear_cross_entropy_weight_grad",
          cpu=lambda: custom("linear_cross_entropy_weight_grad", _gradient_shapes, lambda *dtypes: ms.float32))
