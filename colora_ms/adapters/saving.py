"""Writing an adapter of a model as a PEFT folder."""

from __future__ import annotations

from typing import Any, Optional

from colora_ms.adapters.fused_writing import fused_groups
from colora_ms.adapters.matching import Matched
from colora_ms.adapters.peft_format import write_adapter
from colora_ms.adapters.principal import as_plain_lora
from colora_ms.adapters.registry import method
from colora_ms.adapters.starting import ChangedBase
from colora_ms.errors import AdapterError


def save_adapter(folder: Any, handle: Any, config: Any, matched: Matched, values: dict, changed: Optional[ChangedBase],
                 layout: Optional[str], as_lora: bool) -> None:
    """Write an adapter, whole or not at all; see :meth:`colora_ms.adapters.Adapters.save`.

    Args:
        folder: becomes the adapter's folder; handle: :class:`colora_ms.adapters.Adapters`; config, matched, values: the
            adapter.
        changed: what its start changed in the base weights, or None; layout, as_lora: as for ``save``.

    Raises:
        AdapterError: the layout is not known, a value is not finite, or the folder cannot be written.
    """
    if layout not in (None, "peft"):
        raise AdapterError(f"layout is {layout!r}, expected None or 'peft'")
    if handle.base_model and not config.base_model_name_or_path:
        config.base_model_name_or_path = str(handle.base_model)
    model = getattr(handle.net, "config", None)
    # The start of a fused linear is not the starts of its parts, so that only plain LoRA means the same there.
    if changed and (as_lora or fused_groups(matched, model)):
        config, matched, values = as_plain_lora(config, matched, values, changed.starts)
    elif changed and config.pissa_iterations is not None:
        raise AdapterError(f"init_lora_weights={config.init_lora_weights!r} starts from random numbers that a PEFT "
                           "folder does not hold; save it with as_lora=True")
    if layout == "peft":
        config = method(config.peft_type).peft_config(config, matched, handle.modules)
    write_adapter(folder, config, matched, handle.modules, values, copies=layout == "peft", model=model)
