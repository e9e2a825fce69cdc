"""What a model and each of its layers say of their form to the fused step: a pair of tensors (int32, float32) each.

``ops/cpu/form.h`` has the same lists in the same order, and says what the numbers mean;
``tests/kernels/test_operands.py`` holds them equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindspore import Tensor

from colora_ms.kernels.aot import KernelError

NORM_KINDS = ("rms", "rms_plus_one", "layer")
ACTIVATIONS = ("silu", "gelu_tanh")
LAYER_WHOLE = ("parts", "norm", "whole_qk_norm", "parallel", "activation", "window", "rotary_table", "rotary_width",
               "rotary_pairs", "experts", "experts_per_token", "normalised")
LAYER_REAL = ("query_factor", "score_cap", "branch_factor")
MODEL_WHOLE = ("norm", "rotary_tables")
MODEL_REAL = ("embedding_factor", "hidden_factor", "logit_cap")


def form_tensors(whole: tuple[str, ...], real: tuple[str, ...], values: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """The pair of tensors of a form.

    Args:
        whole, real: LAYER_WHOLE and LAYER_REAL, or MODEL_WHOLE and MODEL_REAL; values: a number for each name.

    Raises:
        KernelError: names are missing or unknown.
    """
    if set(values) != {*whole, *real}:
        raise KernelError(f"a form has {sorted(values)}, expected {sorted((*whole, *real))}")
    return (Tensor(np.array([values[name] for name in whole], np.int32)),
            Tensor(np.array([values[name] for name in real], np.float32)))


def channel_order(dim: int, width: int, pairs: bool) -> list[int]:
    """The order in which a head's channels are taken so that those that turn together are ``dim / 2`` apart, as in
    ``ops/cpu/form.h``; [] where they lie so already.

    Args:
        dim: channels of a head; width: how many of them turn, the first ones; pairs: neighbours, else halves.
    """
    half, turning = dim // 2, width // 2
    first = [(2 * i if pairs else i) if i < turning else width + i - turning for i in range(half)]
    second = [(2 * i + 1 if pairs else turning + i) if i < turning else width + i + half - 2 * turning
              for i in range(half)]
    return [] if first + second == list(range(dim)) else first + second
