"""``AdapterBank``: thousands of adapter folders, some of them in host memory, a few of them in the model's slots.

The slots are stacked Parameters of one shape, so that putting another adapter into one compiles nothing. Slots and host
memory are keyed by content, a name only says which content it stands for now: two names of equal folders share a slot,
and a name that gets new content never meets what was computed with the old one.

Threads: every method may be called from any thread, except :meth:`AdapterBank.lease`, which writes the model and so
belongs to the thread that runs its graphs.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from colora_ms.adapters import LoraConfig, adapter_path, check_name, inject
from colora_ms.adapters.store import CONFIG_FILE
from colora_ms.errors import AdapterError, ConfigError, UnknownAdapterError, near
from colora_ms.serving.content import Content, read_content


@dataclass(frozen=True)
class Lease:
    """The right to use a slot: as long as it is held, the slot keeps its content.

    Attributes:
        slot: the slot's number; -1 for the base model.
        digest: the content's digest; "" for the base model.
    """

    slot: int = -1
    digest: str = ""


@dataclass
class _Counters:
    """Events since the bank was made, and the time of the last ones in milliseconds."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    reads: int = 0
    host_evictions: int = 0
    read_ms: float = 0.0
    place_ms: float = 0.0


class AdapterBank:
    """The adapters that one model serves.

    Args:
        decoder: a model without adapters; its Cells get ``max_loaded`` slots.
        folder: adapters are the PEFT folders inside it, by their names; None: only those that :meth:`add` names.
        max_loaded: slots, the adapters that one batch can mix.
        max_rank: the largest rank; smaller ones are padded with zeros, which changes nothing.
        host_bytes: bytes of adapters that are kept in host memory behind the slots.
        targets: modules that adapters may change: "all-linear", a list of names, or a LoraConfig with all that they may
            have (modules_to_save, bias).
        base_model: the base model's name, for messages.
        allow_pickle: take adapters whose weights are a pickle (adapter_model.bin), read without running it.
        adapter_format: "float32" or "bfloat16", of the pairs in the slots; see :func:`colora_ms.adapters.inject`. With
            eight adapters in a batch, half their bytes are a tenth of a step of a small float32 model.

    Raises:
        AdapterError: the model has adapters already, or ``targets`` does not fit it.
        ConfigError: a number is out of range, or there is no such folder.
    """

    def __init__(self, decoder, folder=None, max_loaded=8, max_rank=16, host_bytes=1 << 30, targets="all-linear",
                 base_model=None, allow_pickle=False, adapter_format="float32"):
        for label, value in (("max_loaded", max_loaded), ("max_rank", max_rank), ("host_bytes", host_bytes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{label}={value!r} is not a whole number >= 1")
        self.folder = None if folder is None else Path(folder)
        if folder is not None and not self.folder.is_dir():
            raise ConfigError(f"there is no adapter folder {folder}; make it, or give another one")
        if not isinstance(targets, LoraConfig):
            targets = LoraConfig(target_modules=targets, r=max_rank)
        self.decoder = decoder
        self.max_loaded = max_loaded
        self.max_rank = max_rank
        self.host_bytes = host_bytes
        self.allow_pickle = allow_pickle
        self.adapters = inject(decoder, None, slots=max_loaded, max_rank=max_rank, reserve=targets, trainable=False,
                               base_model=base_model, adapter_format=adapter_format)
        self.adapter_format = adapter_format
        own = {id(p): p for cell in self.adapters.sites.values() for p in _own_parameters(cell)}
        self.slot_bytes = sum(int(p.size) * p.itemsize for p in own.values())
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self._added = {}  # name -> folder outside of self.folder
        self._withdrawn = set()
        self._digests = {}  # name -> digest of the content that it stands for
        self._host = OrderedDict()  # digest -> Content, the least recently used first
        self._slots = self.adapters.slot_table
        self._counters = _Counters()

    # -- names ---------------------------------------------------------------------------------------------------------

    def names(self) -> List[str]:
        """Names that a request may use, sorted."""
        found = set(self._added)
        if self.folder is not None:
            for path in self.folder.iterdir():
                if (path / CONFIG_FILE).is_file() and _is_name(path.name):
                    found.add(path.name)
        with self._lock:
            # One that was deleted from disk stays as long as its content is here.
            found.update(name for name, digest in self._digests.items() if self._in_memory(digest))
            return sorted(found - self._withdrawn)

    def add(self, name: str, folder: Union[str, Path]) -> None:
        """Give a folder outside of the bank's own a name; it is read when it is first used.

        Raises:
            AdapterError: the name is not allowed or taken.
        """
        check_name(name)
        if name in self.names():
            raise AdapterError(f"there is an adapter {name!r} already; unload it first, or choose another name")
        with self._lock:
            self._added[name] = Path(folder)
            self._withdrawn.discard(name)

    def attach(self, name: str, folder: Union[str, Path], replace: bool = False) -> str:
        """:meth:`add` and :meth:`load` in one step: what cannot be read leaves nothing behind; returns the digest.

        Args:
            replace: a name that there is gets the content of this folder.

        Raises:
            AdapterError: the name is not allowed or taken, or all that is wrong with the folder; nothing was changed.
        """
        check_name(name)
        if not replace and name in self.names():
            raise AdapterError(f"there is an adapter {name!r} already; unload it first, or choose another name")
        content = self._read(name, Path(folder))
        with self._lock:
            self._added[name] = Path(folder)
            self._digests[name] = content.digest
            self._withdrawn.discard(name)
        return content.digest

    def load(self, name: str) -> str:
        """Read and check an adapter now, so that its first request does not wait; returns its digest.

        A name that is loaded already gets the present content of its folder. Requests that run keep the content that
        they began with, and a failure leaves the former content serving.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterError: all that is wrong with it; nothing was changed.
        """
        content = self._read(name)
        with self._lock:
            self._digests[name] = content.digest
            self._withdrawn.discard(name)
        return content.digest

    def unload(self, name: str) -> None:
        """Withdraw an adapter: new requests for it are refused until :meth:`load`; those that run go on to their end.

        Raises:
            UnknownAdapterError: there is no such adapter.
        """
        with self._lock:
            known = name in self._digests or name in self._added
        if not known:
            self._path(name)
        with self._lock:
            digest = self._digests.pop(name, None)
            if self._added.pop(name, None) is None:
                self._withdrawn.add(name)
            if digest is not None and digest not in self._digests.values():
                self._host.pop(digest, None)
                self._slots.forget(digest)

    def resolve(self, name: str) -> str:
        """The digest that a name stands for; its content is read and checked if it is not in memory.

        Raises:
            UnknownAdapterError: there is no such adapter, or it was withdrawn.
            AdapterError: all that is wrong with it.
        """
        digest = self._known(name)
        if digest is not None:
            return digest
        with self._reading:  # many requests may name a cold adapter at once: one of them reads it
            return self._known(name) or self.load(name)

    def _known(self, name):
        """The digest of a name whose content is in memory, else None."""
        with self._lock:
            if name in self._withdrawn:
                raise UnknownAdapterError(f"adapter {name!r} was unloaded; load it again before a request names it")
            digest = self._digests.get(name)
            return digest if self._in_memory(digest) else None

    def _in_memory(self, digest):
        return digest in self._host or self._slots.content(digest) is not None

    # -- slots ---------------------------------------------------------------------------------------------------------

    def lease(self, digest: str) -> Optional[Lease]:
        """Pin the slot that holds a content, put it there first if it is in host memory.

        Returns:
            :class:`Lease`, to be given back with :meth:`release`; None if all slots are leased, or named by the handle.

        Raises:
            KeyError: the content is neither in a slot nor in host memory; :meth:`resolve` its name first.
        """
        with self._lock:
            if self._slots.content(digest) is not None:
                self._counters.hits += 1
            elif not self._place(self._host[digest]):
                return None
            if digest in self._host:
                self._host.move_to_end(digest)
            return Lease(self._slots.pin(digest), digest)

    def _place(self, content):
        """Put a content into a slot, by eviction if need be; False if all are leased or have a name."""
        found = self._slots.place(content.digest, content.rank)
        if found is None:
            return False
        number, evicted = found
        self._counters.evictions += evicted
        started = time.perf_counter()
        try:
            self.write(number, content)
        except BaseException:
            self._slots.forget(content.digest)
            raise
        self._counters.place_ms = 1e3 * (time.perf_counter() - started)
        self._counters.loads += 1
        return True

    def write(self, number: int, content: Content) -> None:
        """Put a content into a slot of the model."""
        self.adapters.write_slot(number, content.matched, content.values)

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        if lease.slot < 0:
            return
        with self._lock:
            if self._slots.unpin(lease.digest) and lease.digest not in self._digests.values():
                self._slots.forget(lease.digest)  # withdrawn, or replaced by new content, while it was in use

    # -- folders and host memory ---------------------------------------------------------------------------------------

    def _path(self, name):
        with self._lock:
            if name in self._added:
                return self._added[name]
        check_name(name)
        path = None if self.folder is None else adapter_path(self.folder, name)
        if path is None or not path.is_dir():
            known = self.names()
            raise UnknownAdapterError(f"there is no adapter {name!r:.80}; " + (
                f"there are {len(known)}, such as {', '.join(map(repr, known[:5]))}." if known else "there is none.")
                + near(name, known))
        return path

    def _read(self, name, path=None):
        path = self._path(name) if path is None else path
        started = time.perf_counter()
        content = self.read(path)
        with self._lock:
            self._counters.reads += 1
            self._counters.read_ms = 1e3 * (time.perf_counter() - started)
            self._host[content.digest] = content
            self._host.move_to_end(content.digest)
            while self._used() > self.host_bytes and len(self._host) > 1:
                self._host.popitem(last=False)
                self._counters.host_evictions += 1
        return content

    def read(self, path: Path) -> Content:
        """The checked content of a folder; any thread may call this."""
        return read_content(self.adapters, path, self.max_rank, self.host_bytes, self.allow_pickle)

    def _used(self):
        return sum(content.nbytes for content in self._host.values())

    # -- report --------------------------------------------------------------------------------------------------------

    def info(self) -> Dict[str, Any]:
        """The state of the bank.

        Returns:
            dict: ``max_loaded``, ``max_rank``, ``adapter_format``, ``loaded`` and ``pinned`` (slots), ``slot_bytes``
            (all slots, whether used or not), ``host_bytes`` (used) and ``host_limit``; counters ``hits``, ``loads``,
            ``evictions`` (slots), ``reads`` (folders), ``host_evictions``; ``read_ms`` and ``place_ms`` of the last
            folder read and the last slot written; ``adapters``: a list with a dict for each name: ``name``, ``state``
            ("slot", "host" or "disk"), ``slot``, ``pins``, ``digest``, ``rank``, ``bytes`` (None where it is not known
            yet).
        """
        names = self.names()
        with self._lock:
            adapters = [self._entry(name) for name in names]
            c, slots = self._counters, self._slots.contents
            return {
                "max_loaded": self.max_loaded, "max_rank": self.max_rank, "adapter_format": self.adapter_format,
                "loaded": len(slots), "pinned": sum(slot.pins > 0 for slot in slots.values()),
                "slot_bytes": self.slot_bytes,
                "host_bytes": self._used(), "host_limit": self.host_bytes, "hits": c.hits, "loads": c.loads,
                "evictions": c.evictions, "reads": c.reads, "host_evictions": c.host_evictions, "read_ms": c.read_ms,
                "place_ms": c.place_ms, "adapters": adapters,
            }

    def _entry(self, name):
        digest = self._digests.get(name)
        slot, content = self._slots.content(digest), self._host.get(digest)
        state = "slot" if slot is not None else "host" if content is not None else "disk"
        return {"name": name, "state": state, "slot": slot.number if slot is not None else None,
                "pins": slot.pins if slot is not None else 0, "digest": digest,
                "rank": getattr(slot or content, "rank", None),
                "bytes": content.nbytes if content is not None else None}


def _own_parameters(cell):
    """Parameters that an adapter Cell adds to its base Cell."""
    base = {id(p) for p in cell.base_layer.get_parameters()}
    return [p for p in cell.get_parameters() if id(p) not in base]


def _is_name(name):
    try:
        check_name(name)
    except AdapterError:
        return False
    return True
