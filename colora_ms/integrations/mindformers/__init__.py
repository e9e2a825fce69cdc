"""colora_ms inside mindformers 1.9: its linears as targets, pet types, weight names, LoRA files, CoLD in its
generation.

    import colora_ms.integrations.mindformers as bridge
    bridge.register()                 # pet_config: {pet_type: colora_lora, ...} trains through mindformers' Trainer
    inject(llama, LoraConfig(target_modules=["wq", "wv"]))          # needs no registration

``cells`` makes mindformers' Cells known to ``inject`` (which imports it by itself); ``pet`` registers pet types;
``names`` maps weights to Hugging Face's names and back; ``lora_files`` reads and writes mindformers' LoRA tensors;
``contrast`` is CoLD as a logits processor.
"""

from __future__ import annotations

from typing import Any

_EXPORTS = {
    "BaseLogits": "contrast",
    "ContrastProcessor": "contrast",
    "LAYOUTS": "names",
    "Layout": "names",
    "from_peft": "lora_files",
    "layout_of": "names",
    "register": "pet",
    "to_huggingface": "names",
    "to_mindformers": "names",
    "to_peft": "lora_files",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    # mindformers takes seconds to import, and not every part of this package needs it.
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
