"""Quantising a model as a recipe says: round to nearest, or LR-QAT on a text, then export as integers.

    model: smollm2-135m
    output: runs/w4
    adapter: {method: lrqat, bits: 4, r: 32, lora_alpha: 32}     # see LrQatConfig
    data: {train: corpus.txt, max_length: 129, batch_size: 4}    # running text; not needed for method rtn
    optimizer: {learning_rate: 1.0e-3, beta2: 0.95, scale_ratio: 0.1}
    loop: {steps: 150}

The output folder holds what ``trainer`` writes (``adapter/`` are the trained scales and factors) and ``model/``, the
exported model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.models.formats import weight_format
from colora_ms.training import checkpoint as checkpoints
from colora_ms.training.config import TrainingConfig
from colora_ms.training.run import data_report, warn_left_out
from colora_ms.training.settings import setting
from colora_ms.training.text import encode_text, read_text
from colora_ms.training.trainer import Callback, Trainer, TrainingResult

if TYPE_CHECKING:
    from colora_ms.quantization import LrQatConfig, QuantizedModel


@dataclasses.dataclass
class QuantizationConfig(TrainingConfig):
    """A recipe of ``colora-ms quantize``: the sections of ``TrainingConfig``, with LR-QAT's settings in ``adapter``."""

    adapter: dict = setting(None, "Settings of the quantisation; see LrQatConfig.", factory=dict)

    def _relations(self) -> list[str]:
        if self.train != "sft" or self.dpo is not None:
            return [f"train is {self.train}: a quantised model has no adapter that can be switched off for a "
                    "reference; leave out train and dpo"]
        try:
            method = self.quantization().method
        except ConfigError as error:
            return [f"section adapter: {error}"]
        for name in ("train", "validation"):
            value = getattr(self.data, name)
            if not isinstance(value, str) and (name == "train" and method != "rtn" or value is not None):
                return [f"data.{name} is {value!r:.60}, expected the path of a text file"]
        if not weight_format(self.weight_format).is_float:
            return [f"weight_format is {self.weight_format}: quantisation starts from float weights, expected float32 or "
                    "bfloat16"]
        if self.loop.evaluate_every is not None and self.data.validation is None:
            return ["loop.evaluate_every is given, but data.validation is not"]
        return []

    def quantization(self) -> LrQatConfig:
        """The settings as a :class:`colora_ms.quantization.LrQatConfig`."""
        from colora_ms.quantization import LrQatConfig
        return LrQatConfig.from_dict(self.adapter)


def quantize_model(config: QuantizationConfig | str | Path, resume: bool | str | Path = False,
                   callbacks: Iterable[Callback] = ()) -> tuple[Path, TrainingResult | None, QuantizedModel]:
    """Quantise a model: load, replace the linears, train unless the method is "rtn", export.

    Args:
        config: ``QuantizationConfig``, or the path of a recipe.
        resume, callbacks: see ``Trainer.train``.

    Returns:
        ``(folder, result, quantized)``: path of the exported model, ``TrainingResult`` (``None`` for "rtn"), and the
        :class:`colora_ms.quantization.QuantizedModel`.

    Raises:
        ColoraError: in one of its kinds; data, recipe and output folder are checked before anything is loaded.
    """
    from colora_ms import models
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    from colora_ms.quantization import quantize
    if not isinstance(config, QuantizationConfig):
        config = QuantizationConfig.from_yaml(config)
    train: Any = config.data.train  # a path, which _relations has checked
    settings, trains = config.quantization(), config.quantization().method != "rtn"
    held: Any = config.data.validation
    text = read_text(train) if trains else ""
    held_out = read_text(held) if trains and config.data.validation else None
    folder = Path(config.output) / "model"
    if not resume and (checkpoints.list_checkpoints(config.output) or folder.exists()):
        raise CheckpointError(f"{config.output} holds a run already; continue it with resume (--resume), or choose "
                              "another output folder")
    source = open_checkpoint(resolve_model(config.model)).tokenizer_source
    decoder, tokenizer = models.load_model(config.model, weight_format=config.weight_format)
    data: Any = None
    validation: Any = None
    if trains:
        size = min(config.data.max_length, decoder.max_positions + 1), decoder.config.vocab_size
        data = encode_text(text, tokenizer, size[0], size[1])
        validation = encode_text(held_out, tokenizer, size[0], size[1]) if held_out else None
    checkpoints.check_writable(config.output)
    quantized = quantize(decoder, settings, config.loop.seed)
    result = None
    if trains:
        report = data_report(data, validation)
        warn_left_out(report)
        trainer = Trainer(decoder, data, config, quantized.save, validation, callbacks, data_report=report)
        result = trainer.train(resume)
        if result.best_step not in (None, result.steps):
            quantized.load(result.adapter)
    quantized.export(folder, source, overwrite=resume)
    return folder, result, quantized
