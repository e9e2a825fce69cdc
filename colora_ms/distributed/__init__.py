"""The processes of one job under msrun: workers, and a decoder whose linears are split over them.

    team = workers.start()
    decoder, tokenizer, handle = load_sharded("smollm2-135m", team, adapters={"a": folder})     # this worker's share
"""

_EXPORTS = {"Workers": "workers", "load_sharded": "loading", "save_whole": "adapter_files", "shard_decoder": "loading"}

__all__ = sorted(_EXPORTS)


def __getattr__(name):
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(f"colora_ms.distributed.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'colora_ms.distributed' has no attribute {name!r}")
