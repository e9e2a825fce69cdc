"""Decoding: the contrast between adapter and base, sampling, the generation loop as one static graph, ``Generator``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from colora_ms.decoding.completion import Completion, TokenRecord
    from colora_ms.decoding.contrast import contrastive_scores
    from colora_ms.decoding.generator import Generator
    from colora_ms.decoding.options import Contrast, Sampling

_EXPORTS = {
    "Completion": "colora_ms.decoding.completion",
    "Contrast": "colora_ms.decoding.options",
    "Generator": "colora_ms.decoding.generator",
    "Sampling": "colora_ms.decoding.options",
    "TokenRecord": "colora_ms.decoding.completion",
    "contrastive_scores": "colora_ms.decoding.contrast",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Names are imported when they are used: the command line reads the options without MindSpore.
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'colora_ms.decoding' has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted([*globals(), *_EXPORTS])
