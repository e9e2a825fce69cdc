"""LR-QAT (arXiv 2406.06385): low-rank adapters inside the quantiser, the grids of their integers, and the export.

    quantized = quantize(decoder, LrQatConfig(r=8, bits=4))     # train quantized.trainable_params()
    quantized.export("smaller", tokenizer_source)               # an integer model that load_model reads
"""

_EXPORTS = {
    "Grid": "grids",
    "LrQatConfig": "config",
    "LrQatLinear": "cells",
    "QuantizedModel": "quantized_model",
    "quantize": "quantized_model",
    "round_to_nearest": "cells",
    "write_quantized_folder": "export",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name):
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(f"colora_ms.quantization.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'colora_ms.quantization' has no attribute {name!r}")
