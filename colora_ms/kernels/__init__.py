"""The operations that must be fast: one Python face each, a reference form, and a form for each device."""

import colora_ms.kernels.ascend_builtin  # noqa: F401  # puts its rows into the table
from colora_ms.kernels.activation import geglu, soft_cap, swiglu, swiglu_reference
from colora_ms.kernels.adjust import adjust_logits, adjust_logits_reference
from colora_ms.kernels.aot import ABSENT, KernelError
from colora_ms.kernels.attention import (
    causal_attention,
    causal_attention_reference,
)
from colora_ms.kernels.details import token_details, token_details_reference
from colora_ms.kernels.dropout import dropout, dropout_constants, dropout_reference
from colora_ms.kernels.embedding import embedding, embedding_reference
from colora_ms.kernels.flat_step import fuses_step, step
from colora_ms.kernels.linear import multi_lora_linear, multi_lora_linear_reference
from colora_ms.kernels.lora import lora_expand, lora_expand_reference, lora_shrink, lora_shrink_reference
from colora_ms.kernels.loss import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_token_cross_entropy,
    linear_token_losses,
    linear_token_losses_reference,
    token_losses_of_logits,
)
from colora_ms.kernels.norm import rms_norm, rms_norm_reference, rms_norm_residual, rms_norm_residual_reference
from colora_ms.kernels.paged import paged_attention, paged_attention_reference
from colora_ms.kernels.registry import backend, bind
from colora_ms.kernels.select import contrastive_select, contrastive_select_reference
from colora_ms.kernels.strength import contrast_strength, contrast_strength_reference

__all__ = [
    "ABSENT",
    "KernelError",
    "adjust_logits",
    "adjust_logits_reference",
    "backend",
    "bind",
    "causal_attention",
    "causal_attention_reference",
    "contrast_strength",
    "contrast_strength_reference",
    "contrastive_select",
    "contrastive_select_reference",
    "dropout",
    "dropout_constants",
    "dropout_reference",
    "embedding",
    "embedding_reference",
    "fuses_step",
    "geglu",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_token_cross_entropy",
    "linear_token_losses",
    "linear_token_losses_reference",
    "lora_expand",
    "lora_expand_reference",
    "lora_shrink",
    "lora_shrink_reference",
    "multi_lora_linear",
    "multi_lora_linear_reference",
    "paged_attention",
    "paged_attention_reference",
    "rms_norm",
    "rms_norm_reference",
    "rms_norm_residual",
    "rms_norm_residual_reference",
    "soft_cap",
    "step",
    "swiglu",
    "swiglu_reference",
    "token_details",
    "token_details_reference",
    "token_losses_of_logits",
]
