"""Low-rank adapters and Contrastive LoRA Decoding (CoLD) in MindSpore graph mode.

The house in a few lines; every room imports only from those below it:

* ``cli``          the ``colora-ms`` command
* ``serving``      adapter bank, continuous batching, the HTTP front
* ``recipes``      a recipe from training to table, which is what the model zoo runs
* ``evaluation``   exact match, multiple choice, perplexity, paired tests
* ``training``     datasets, the train step in graph mode, atomic checkpoints
* ``decoding``     contrast, sampling, the generation loop as one static graph, ``Generator``
* ``distributed``  the processes of one job under msrun: workers, shards, tensor-parallel Cells
* ``quantization``, ``decomposition``  LR-QAT with its grids and export; Tucker decomposition without training
* ``adapters``     LoRA and Lily as Cells: inject, merge, PEFT's directory format
* ``models``       decoders of the Llama family, checkpoints, tokenizers
* ``kernels``      the operations that must be fast: a Python face, a reference form, a form for each device
* ``ops/``         (beside the package) the C++ and Ascend C sources of those operations
"""

from __future__ import annotations

from colora_ms import ascend_settings as _ascend_settings

_ascend_settings.prepare()  # MindSpore reads these variables when it is imported or runs its first operator

__version__ = "0.1.0"

_EXPORTS = {
    "Completion": "colora_ms.decoding",
    "Context": "colora_ms.decoding",
    "Contrast": "colora_ms.decoding",
    "Ensemble": "colora_ms.decoding",
    "Generator": "colora_ms.decoding",
    "Guide": "colora_ms.decoding",
    "Mix": "colora_ms.decoding",
    "Negative": "colora_ms.decoding",
    "Sampling": "colora_ms.decoding",
    "Voice": "colora_ms.decoding",
    "LilyConfig": "colora_ms.adapters",
    "LoraConfig": "colora_ms.adapters",
    "inject": "colora_ms.adapters",
    "load_adapter": "colora_ms.adapters",
    "load_model": "colora_ms.models",
    "ColoraError": "colora_ms.errors",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    # Names are imported when they are used: the package itself then costs nothing to import.
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'colora_ms' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
