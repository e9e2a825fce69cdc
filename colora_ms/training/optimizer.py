"""AdamW inside the graph: schedule, clipping by the global norm, LoRA+ rates.

AdamW (Loshchilov and Hutter, arXiv 1711.05101), for the gradient g at update t:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p - lr (mhat / (sqrt(vhat) + eps) + decay p)
    mhat = m / (1 - b1^t)         vhat = v / (1 - b2^t)

Rate and bias corrections come in as tensors, computed in float64 outside, so that no update
compiles anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from colora_ms.errors import ConfigError

if TYPE_CHECKING:
    from colora_ms.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of one update.

    Rises linearly over ``warmup_ratio * steps`` updates, then falls along half a cosine or a line
    to ``min_ratio`` of its height, or stays.

    Args:
        config: ``OptimizerConfig``.
        step: the update, counted from 1.
        steps: number of all updates.

    Returns:
        float, above 0 for every step up to ``steps`` unless ``min_ratio`` is 0 and it is the last.
    """
    warmup = int(config.warmup_ratio * steps)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    # The first update after the warm-up has the full rate; one past the last would have the least.
    part = min((step - 1 - warmup) / max(steps - warmup, 1), 1.0)
    if config.schedule == "cosine":
        part = 0.5 * (1 - math.cos(math.pi * part))
    return config.learning_rate * (1 - (1 - config.min_ratio) * part)


def is_up_factor(name: str) -> bool:
    """Whether LoRA+ gives a parameter the higher rate: the second factor of an adapter (``....lora_B``, ``....up``)
    and, as in PEFT, vectors such as biases and DoRA's magnitudes."""
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return last in ("up", "lora_up", "lora_B", "lora_embedding_B", "lily_B", "lora_bias", "lora_up_bias",
                    "lora_magnitude_vector")


def is_learned_scale(name: str) -> bool:
    """Whether a parameter holds the learned scales of quantised weights (``....learned_scale``)."""
    return name.rsplit(".", 1)[-1] == "learned_scale"


_half_square = ops.MultitypeFuncGraph("half_square")
_adam = ops.MultitypeFuncGraph("adam")


@_half_square.register("Tensor")
def _half_square_of(grad: Tensor) -> Tensor:
    """sum(grad^2) / 2 in one operator."""
    return ops.L2Loss()(grad)


@_adam.register("Function", *["Tensor"] * 10)
def _adam_of(update: Any, rate: Tensor, beta1: Tensor, beta2: Tensor, epsilon: Tensor, decay: Tensor, factor: Tensor,
             parameter: Tensor, mean: Tensor, square: Tensor, grad: Tensor) -> Any:
    """Update one parameter in place. 0 * inf would be NaN; MulNoNan gives 0 for a factor of 0."""
    return update(parameter, mean, square, rate, beta1, beta2, epsilon, decay,
                  ops.MulNoNan()(grad, factor))


class AdamW(nn.Cell):
    """One update of all trained parameters.

    ``trained`` holds them in three groups of one rate each: down factors and whatever has no group
    of its own, up factors (``loraplus_lr_ratio``), learned scales (``scale_ratio``, no decay);
    gradients come in that order. The graph maps over each (a Python loop over hundreds of
    parameters would compile for a minute).

    Args:
        parameters: list of ``Parameter``, float32.
        config: ``OptimizerConfig``.

    Raises:
        ConfigError: no parameters, or one that is not float32.
    """

    def __init__(self, parameters: Iterable[Parameter], config: OptimizerConfig) -> None:
        super().__init__()
        parameters = list(parameters)
        if not parameters:
            raise ConfigError("there is nothing to train: no parameter has requires_grad=True; "
                              "inject an adapter into the model first")
        for item in parameters:
            if item.dtype != ms.float32:
                raise ConfigError(f"the trained parameter {item.name} is {item.dtype}, expected "
                                  "float32; keep adapters in float32 whatever the base model is")
        self.config = config
        scales = [item for item in parameters if is_learned_scale(item.name)]
        ups = [item for item in parameters if is_up_factor(item.name)]
        downs = [item for item in parameters
                 if not is_up_factor(item.name) and not is_learned_scale(item.name)]
        self.downs, self.ups, self.scales = len(downs), len(ups), len(scales)
        parameters = downs + ups + scales
        self.trained = ParameterTuple(parameters)
        self.mean = ParameterTuple([_zeros(item, "adam_mean") for item in parameters])
        self.square = ParameterTuple([_zeros(item, "adam_square") for item in parameters])
        self.ratio, self.scale_ratio = config.loraplus_lr_ratio, config.scale_ratio
        self.beta1, self.beta2 = Tensor(config.beta1, ms.float32), Tensor(config.beta2, ms.float32)
        self.max_norm = config.max_grad_norm or 0.0
        self.update = ops.AdamWeightDecay()
        self.map = ops.HyperMap()

    def hyper(self, step: int, steps: int) -> Tensor:
        """The numbers of one update as a float32 tensor (3,).

        They are: rate with both bias corrections, epsilon in the uncorrected scale, and the decay
        that makes ``rate * decay`` the plain ``learning_rate * weight_decay``.
        """
        rate = learning_rate(self.config, step, steps)
        root = math.sqrt(1 - self.config.beta2 ** step)
        corrected = rate * root / (1 - self.config.beta1 ** step)
        decay = self.config.weight_decay * rate / corrected if corrected else 0.0
        return Tensor(np.array([corrected, self.config.epsilon * root, decay], np.float32))

    def construct(self, grads: tuple[Tensor, ...], divisor: Tensor, hyper: Tensor) -> Tensor:
        """Divide the gradients, clip them, update the parameters in place.

        Args:
            grads: tuple of float32 tensors, the gradients of a sum, in the order of ``trained``.
            divisor: 0-d float32, the number of terms of the sum (answer tokens).
            hyper: (3,) float32 from ``hyper``.

        Returns:
            0-d float32: the norm of the mean's gradient before clipping. If it is not finite, the
            parameters stay as they are.
        """
        grads, half = self.whole(grads)
        norm = ops.sqrt(2.0 * half) / divisor
        factor = 1.0 / divisor
        if self.max_norm > 0:
            # The small term is that of torch.nn.utils.clip_grad_norm_.
            factor = factor * ops.minimum(self.max_norm / (norm + 1e-6), Tensor(1.0, ms.float32))
        finite = ops.isfinite(norm)
        rate = ops.select(finite, hyper[0], ops.zeros_like(hyper[0]))
        factor = ops.select(finite, factor, ops.zeros_like(factor))
        epsilon, decay, n = hyper[1], hyper[2], self.downs
        if n > 0:
            one = ops.partial(_adam, self.update, rate, self.beta1, self.beta2, epsilon, decay,
                              factor)
            done = self.map(one, self.trained[:n], self.mean[:n], self.square[:n], grads[:n])
            norm = ops.depend(norm, done)
        if self.ups > 0:
            # LoRA+: another rate, but the same pull towards zero.
            one = ops.partial(_adam, self.update, rate * self.ratio, self.beta1, self.beta2,
                              epsilon, decay / self.ratio, factor)
            end = n + self.ups
            done = self.map(one, self.trained[n:end], self.mean[n:end], self.square[n:end],
                            grads[n:end])
            norm = ops.depend(norm, done)
        if self.scales > 0:
            # Scales live on another magnitude than factors, and decay would change the weights.
            n = n + self.ups
            one = ops.partial(_adam, self.update, rate * self.scale_ratio, self.beta1, self.beta2,
                              epsilon, ops.zeros_like(decay), factor)
            done = self.map(one, self.trained[n:], self.mean[n:], self.square[n:], grads[n:])
            norm = ops.depend(norm, done)
        return norm


    def whole(self, grads: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The gradients to update with, and half the square of their norm (0-d float32); a split model's differ from
        those that one of its workers computes."""
        return grads, half_square(self.map, grads)


def half_square(hyper_map: ops.HyperMap, grads: tuple[Tensor, ...]) -> Tensor:
    """Half the sum of squares of all gradients, 0-d float32; ``hyper_map``: an ``ops.HyperMap``."""
    return ops.addn(hyper_map(_half_square, grads))


def _zeros(parameter: Parameter, prefix: str) -> Parameter:
    return Parameter(Tensor(np.zeros(parameter.shape, np.float32)),
                     name=f"{prefix}.{parameter.name}", requires_grad=False)
