"""Latency of decomposed models: a decoding step and a prefill, in rounds that alternate with the model itself."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from colora_ms.decomposition.decompose import decompose

if TYPE_CHECKING:
    from colora_ms.evaluation.lrd_sweep import Variant
    from colora_ms.models.checkpoint import Checkpoint
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder
    from colora_ms.models.tokenizer import Tokenizer

#: Tokens of the prompt, and answers of these lengths: their difference is the time of the steps between.
PROMPT, SHORT = 128, 1


def without_layers(config: DecoderConfig, tensors: Mapping[str, np.ndarray],
                   layers: Sequence[int]) -> tuple[DecoderConfig, Mapping[str, np.ndarray]]:
    """A checkpoint's config and tensors with blocks left out and the rest numbered anew.

    Returns:
        (DecoderConfig, mapping of names to arrays).
    """
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in layers]
    smaller = dataclasses.replace(config, num_hidden_layers=len(kept))
    names = {}
    for name in smaller.parameter_shapes():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(kept[int(parts[2])])
        names[name] = ".".join(parts)
    return smaller, _Renamed(names, tensors)


class Clock:
    """Times one decoder: seconds of a step and of a prompt of ``PROMPT`` tokens with its first token."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, steps: int) -> None:
        from colora_ms.decoding import Generator

        self.generator = Generator(decoder, tokenizer, max_rows=2)
        self.steps = steps
        self.prompt = [3 + (7 * i) % 90 for i in range(PROMPT)]
        self.round()  # compiles and warms up

    def round(self) -> tuple[float, float]:
        """(seconds of a step, seconds of the prefill)."""
        short, long = self._run(SHORT), self._run(SHORT + self.steps)
        return (long - short) / self.steps, short

    def _run(self, tokens: int) -> float:
        start = time.perf_counter()
        self.generator.generate([self.prompt], max_new_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - start


def measure(checkpoint: Checkpoint, tokenizer: Tokenizer, variants: Sequence[Variant], steps: int = 48,
            repeats: int = 5, on_row: Callable[[Variant, dict], Any] | None = None) -> dict[str, dict]:
    """Time variants against the model itself.

    Args:
        checkpoint: opened original model; variants: those of a sweep, the model itself first.
        steps: decoding steps of one timing; repeats: rounds of each variant, alternating with the model.
        on_row: called with (variant, result) as soon as it is there.

    Returns:
        {variant name: {"step_ms", "step_ratio", "prefill_ms", "prefill_ratio"}}: medians; a ratio is the median of the
        rounds' ratios to the model itself, below 1 where the variant is faster.
    """
    from colora_ms.models.decoder import Decoder

    positions = 2 * (PROMPT + steps)
    base = Clock(Decoder(checkpoint.config, checkpoint.tensors, max_positions=positions), tokenizer, steps)
    results = {}
    for variant in variants:
        config, tensors = checkpoint.config, checkpoint.tensors
        if variant.dropped:
            config, tensors = without_layers(config, tensors, variant.dropped)
        if variant.layers:
            decoder = Decoder(config, tensors, max_positions=positions)
            if variant.plan:
                decompose(decoder, variant.plan)
            clock = Clock(decoder, tokenizer, steps)
        else:
            clock = base
        pairs = [(base.round(), clock.round()) for _ in range(repeats)]
        result = {}
        for index, name in enumerate(("step", "prefill")):
            result[f"{name}_ms"] = 1000 * statistics.median(own[index] for _, own in pairs)
            result[f"{name}_ratio"] = 1.0 if clock is base else statistics.median(own[index] / ref[index] for ref,
                                                                                  own in pairs)
        results[variant.name] = result
        if on_row is not None:
            on_row(variant, result)
    return results


class _Renamed(dict):
    """{new name: old name} read through to the old tensors."""

    def __init__(self, names: dict[str, str], tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(names)
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[super().__getitem__(name)]
