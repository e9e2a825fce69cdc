"""Decoding: the contrast between adapter and base, sampling, the generation loop as one static graph, ``Generator``."""

from colora_ms.decoding.completion import Completion, TokenRecord
from colora_ms.decoding.contrast import Contrast, Sampling, contrastive_scores
from colora_ms.decoding.generator import Generator

__all__ = ["Completion", "Contrast", "Generator", "Sampling", "TokenRecord", "contrastive_scores"]
