"""Cross-entropy of a language model's head, fused with the head's product so that no (tokens, vocab) matrix is kept."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

#: Label of a token that has no part in the loss.
IGNORED = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of ``softmax(hidden @ weight.T)``.

    Semantics, over the tokens n with ``labels[n] != -100``: ``loss_sum = sum(logsumexp(z[n]) - z[n, labels[n]])`` with
    ``z = hidden @ weight.T`` in float32; the other tokens are not computed. The forward pass also computes the gradient
    of ``hidden``, block by block (the idea of Cut Cross-Entropy, arXiv 2411.09009); for a loss alone, without training,
    :func:`linear_token_losses` costs half.

    Args:
        hidden: (tokens, hidden_size) float32.
        weight: (vocab, hidden_size) float32 or bfloat16.
        labels: (tokens,) int32, each -100 or 0 <= label < vocab.

    Returns:
        ``(loss_sum, count)``: float32 of rank 0, the sum and the number of tokens in it (0 and 0 if there is none).

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a label is out of range.

    Gradients: hidden and weight; that of weight is computed only where weight is trained.
    """
    return bound.linear_cross_entropy(hidden, weight, labels)


def linear_token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each token, for losses that weigh answers or tokens; the arguments of linear_cross_entropy.

    As there, the forward pass also computes the gradient of ``hidden``; the gradient that arrives from behind
    multiplies each token's row of it. No logits are kept.

    Returns:
        (tokens,) float32: ``logsumexp(z[n]) - z[n, labels[n]]``, and 0 where the label is -100; equal to
        :func:`linear_token_losses` to the last bit.

    Raises:
        KernelError, RuntimeError: as :func:`linear_cross_entropy`.

    Gradients: hidden and weight; that of weight is computed only where weight is trained.
    """
    return bound.linear_token_cross_entropy(hidden, weight, labels)


def linear_token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each token, for perplexity and multiple choice; the arguments of linear_cross_entropy.

    Returns:
        (tokens,) float32: ``logsumexp(z[n]) - z[n, labels[n]]``, and 0 where the label is -100.

    Raises:
        KernelError, RuntimeError: as :func:`linear_cross_entropy`.

    Gradients: hidden and weight, at twice the cost of the forward pass; where a gradient is wanted,
    :func:`linear_token_cross_entropy` computes it on the way.
    """
    return bound.linear_token_losses(hidden, weight, labels)


def linear_token_losses_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """:func:`linear_token_losses` in built-in operators; differentiable, any device; labels are not checked."""
    return token_losses_of_logits(ops.matmul(hidden, weight.astype(ms.float32).transpose((1, 0))), labels)


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


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """:func:`linear_cross_entropy` in built-in operators; differentiable, any device; labels are not checked."""
    losses = linear_token_losses_reference(hidden, weight, labels)
    return losses.sum(), (labels != IGNORED).astype(ms.float32).sum()


# -- the CPU operators ------------------------------------------------------------------------------------------------

def _check(name, hidden, weight, labels):
    require(len(hidden) == 2, name, "hidden", hidden, "(tokens, hidden_size)")
    require(len(weight) == 2 and weight[1] == hidden[1], name, "weight", weight, f"(vocab, {hidden[1]}) as in hidden")
    require_shape(name, "labels", labels, hidden[:1])


def _loss_shapes(hidden, weight, labels):
    _check("linear_cross_entropy", hidden, weight, labels)
    return [1], [1], hidden, labels, labels  # a rank of 0 would become a Python number in the graph


def _token_shapes(hidden, weight, labels):
    _check("linear_token_losses", hidden, weight, labels)
    return labels


def _dtype_function(name, outputs):
    def dtypes(hidden, weight, labels):
        require_dtype(name, "hidden", element_type(hidden), (ms.float32,))
        require_dtype(name, "weight", element_type(weight), (ms.float32, ms.bfloat16))
        require_dtype(name, "labels", element_type(labels), (ms.int32,))
        return (ms.float32,) * outputs if outputs > 1 else ms.float32
    return dtypes


def _bprop(hidden, weight, labels, out, dout):
    share = dout[0] + dout[4]  # of each token's loss in what is differentiated: through the sum, and by itself
    # The compiler drops the weight's part where the weight is frozen.
    dweight = bound.linear_cross_entropy_weight_grad(hidden, weight, labels, out[3], share)
    return out[2] * share.reshape((-1, 1)), dweight.astype(weight.dtype), ops.zeros_like(labels)


def _token_bprop(hidden, weight, labels, out, dout):
    """Computes the product again, with its gradient. Behind a stop_gradient the compiler drops all of it."""
    _, _, slope, lse, _ = bound.linear_cross_entropy_operator(hidden, weight, labels)
    dweight = bound.linear_cross_entropy_weight_grad(hidden, weight, labels, lse, dout)
    return slope * dout.reshape((-1, 1)), dweight.astype(weight.dtype), ops.zeros_like(labels)


# Outputs: loss_sum (1,), count (1,), d loss_sum / d hidden, the log-sum-exp of each token, the loss of each token.
def _linear_cross_entropy(hidden, weight, labels):
    loss_sum, count, _, _, _ = bound.linear_cross_entropy_operator(hidden, weight, labels)
    return loss_sum.reshape(()), count.reshape(())


def _linear_token_cross_entropy(hidden, weight, labels):
    return bound.linear_cross_entropy_operator(hidden, weight, labels)[4]


operation("linear_cross_entropy", reference=lambda: linear_cross_entropy_reference, cpu=lambda: _linear_cross_entropy)
operation("linear_token_cross_entropy", reference=lambda: linear_token_losses_reference,
          cpu=lambda: _linear_token_cross_entropy)
operation("linear_cross_entropy_operator", cpu=lambda: custom(
    "linear_cross_entropy", _loss_shapes, _dtype_function("linear_cross_entropy", 5), _bprop))
operation("linear_cross_entropy_weight_grad", cpu=lambda: custom(
    "linear_cross_entropy_weight_grad", lambda hidden, weight, labels, lse, share: weight, lambda *dtypes: ms.float32))
operation("linear_token_losses", reference=lambda: linear_token_losses_reference, cpu=lambda: custom(
    "linear_token_losses", _token_shapes, _dtype_function("linear_token_losses", 1), _token_bprop))
