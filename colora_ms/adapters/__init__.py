"""Low-rank adapters on any Cell tree: configs, Cells, injection, merging, and PEFT's directory format.

    adapters = inject(net, LoraConfig(r=16, target_modules="all-linear"))   # train adapters.trainable_params()
    adapters.save("out")                                                    # a PEFT folder
    adapters = load_adapter(net, "out")                                     # into another model

The adapter of a row is a tensor: ``net(ids, lengths, adapters.slots(rows))``. Adding, choosing, disabling and mixing
adapters compiles nothing anew.
"""

from colora_ms.adapters import lily_matching
from colora_ms.adapters.config import LoraConfig
from colora_ms.adapters.handle import Adapters
from colora_ms.adapters.inject import adapters_of, inject, load_adapter, load_adapters, wrap_lora
from colora_ms.adapters.lily import LilyDense, LilyLinear, StaticLilyLinear, wrap_lily
from colora_ms.adapters.lily_config import LilyConfig
from colora_ms.adapters.lily_format import export_lora, peft_config
from colora_ms.adapters.lora import LoraEmbedding, LoraLinear, initial_values
from colora_ms.adapters.peft_format import digest
from colora_ms.adapters.principal import start_from_base
from colora_ms.adapters.registry import Method, register
from colora_ms.adapters.store import adapter_path, check_name

register(Method(LoraConfig, wrap_lora, initial_values, start_from_base=start_from_base))
register(Method(LilyConfig, wrap_lily, lily_matching.initial_values, lily_matching.entries, lily_matching.match,
                lily_matching.value_shapes, lily_matching.why_not_merge, peft_config))

__all__ = [
    "Adapters",
    "LilyConfig",
    "LilyDense",
    "LilyLinear",
    "LoraConfig",
    "LoraEmbedding",
    "LoraLinear",
    "Method",
    "StaticLilyLinear",
    "adapter_path",
    "adapters_of",
    "check_name",
    "digest",
    "export_lora",
    "inject",
    "load_adapter",
    "load_adapters",
    "register",
]
