"""Decoding: mixes of adapters and the base, sampling, one graph for all loads, ``Generator``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from colora_ms.decoding.completion import Completion, TokenLogprob, TokenRecord
    from colora_ms.decoding.contrast import contrastive_scores
    from colora_ms.decoding.generator import Generator
    from colora_ms.decoding.grammar import Grammar
    from colora_ms.decoding.mix import Context, Ensemble, Guide, Mix, Negative, Voice
    from colora_ms.decoding.options import Contrast, Sampling

_EXPORTS = {
    "Completion": "colora_ms.decoding.completion",
    "Context": "colora_ms.decoding.mix",
    "Contrast": "colora_ms.decoding.options",
    "Ensemble": "colora_ms.decoding.mix",
    "Generator": "colora_ms.decoding.generator",
    "Grammar": "colora_ms.decoding.grammar",
    "Guide": "colora_ms.decoding.mix",
    "Mix": "colora_ms.decoding.mix",
    "Negative": "colora_ms.decoding.mix",
    "Sampling": "colora_ms.decoding.options",
    "TokenLogprob": "colora_ms.decoding.completion",
    "TokenRecord": "colora_ms.decoding.completion",
    "Voice": "colora_ms.decoding.mix",
    "contrastive_scores": "colora_ms.decoding.contrast",
}

__all__ = ["Completion", "Context", "Contrast", "Ensemble", "Generator", "Grammar", "Guide", "Mix", "Negative",
           "Sampling", "TokenLogprob", "TokenRecord", "Voice", "contrastive_scores"]


def __getattr__(name: str) -> Any:
    # Names are imported when they are used: the command line reads the options without MindSpore.
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'colora_ms.decoding' has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted([*globals(), *_EXPORTS])
