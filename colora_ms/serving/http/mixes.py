"""Mixes that are served under names of their own: files of :mod:`colora_ms.decoding.mix_file` in one folder.

A name that clients ask for means one thing: a mix whose adapter got other content since it was saved is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional

from colora_ms.decoding.mix import Mix
from colora_ms.decoding.mix_file import SavedMix, load_mix
from colora_ms.errors import AdapterError, ConfigError
from colora_ms.serving.engine import Engine


class Mixes:
    """The mixes of a folder.

    Args:
        engine: :class:`colora_ms.serving.Engine`; its bank gets the adapters that it does not have.
        folder: of the files, NAME.yaml each; None: there are none.
        base_model: the base model's name, which no mix may have.

    Raises:
        ConfigError: a file cannot be used, or its name or one of its adapters' is taken by something else.
        AdapterError: an adapter cannot be loaded.
    """

    def __init__(self, engine: Engine, folder: Optional[str], base_model: str) -> None:
        self._engine = engine
        self._saved: Dict[str, SavedMix] = {}
        for path in [] if folder is None else sorted(Path(folder).glob("*.yaml")):
            saved = load_mix(path)
            if engine.bank is None and saved.adapters:
                raise ConfigError(f"{path} has adapters; start the server with --adapters FOLDER")
            if saved.name in (base_model, *self._saved, *([] if engine.bank is None else engine.bank.names())):
                raise ConfigError(f"{path}: {saved.name!r} is the name of another model here; give the mix another "
                                  "name")
            self._add_adapters(path, saved)
            self._saved[saved.name] = saved

    def _add_adapters(self, path: Path, saved: SavedMix) -> None:
        bank = self._engine.bank
        for name, folder in saved.adapters.items():
            assert bank is not None
            digest = bank.resolve(name) if name in bank.names() else bank.attach(name, folder)
            if digest != saved.digests[name]:
                raise ConfigError(f"{path}: there is an adapter {name!r} here, but its content is another one than the "
                                  "mix's; rename one of them")

    @property
    def names(self) -> List[str]:
        """Their names, sorted."""
        return sorted(self._saved)

    def get(self, name: str) -> Optional[Mix]:
        """The mix of a name; None: there is none.

        Raises:
            AdapterError: one of its adapters is another one by now. UnknownAdapterError: one was unloaded.
        """
        saved = self._saved.get(name)
        if saved is None:
            return None
        for adapter, digest in saved.digests.items():
            assert self._engine.bank is not None
            if self._engine.bank.resolve(adapter) != digest:
                raise AdapterError(f"the mix {name!r} was saved with another content of adapter {adapter!r} than the "
                                   "one that is loaded; save it anew")
        return saved.mix
