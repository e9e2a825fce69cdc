"""Adapter folders of a split model: cut into the workers' shares, and put together again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Optional

from colora_ms.adapters.handle import Adapters
from colora_ms.adapters.key_names import plain_names
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE, read_config, regular_file, write_folder
from colora_ms.distributed.shares import joined, share_of
from colora_ms.distributed.workers import Workers
from colora_ms.errors import AdapterError
from colora_ms.files import PathLike


def shard_adapter(source: PathLike, folder: PathLike, team: Workers) -> Path:
    """Write this worker's share of a PEFT folder of plain LoRA to ``folder``; returns it.

    Raises:
        AdapterError: the adapter holds tensors other than lora_A and lora_B, is none of LoRA, or started from the base
            weights (PiSSA, OLoRA), whose decomposition a share of them does not have.
    """
    from safetensors.numpy import load_file, save_file

    source, folder = Path(source), Path(folder)
    values = read_config(source)
    stored = load_file(regular_file(source / WEIGHTS_FILE))
    tensors = {name: stored[own] for name, own in plain_names(list(stored))[0].items()}
    other = sorted(name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if values.get("peft_type") != "LORA" or values.get("use_dora") or other:
        what = f"peft_type {values.get('peft_type')}" + (", use_dora" if values.get("use_dora") else "")
        what += f" and tensors such as {', '.join(other[:3])}" if other else ""
        raise AdapterError(f"the adapter in {source} cannot be split over workers: only plain LoRA (lora_A and lora_B) "
                           f"can, this one has {what}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(("pissa", "olora")):
        raise AdapterError(f"the adapter in {source} cannot be split over workers: init_lora_weights={start!r} changes "
                           "the base weights; save it with as_lora=True first")
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_bytes((source / CONFIG_FILE).read_bytes())
    save_file({name: share_of(name, value, team) for name, value in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def save_whole(handle: Adapters, folder: PathLike, team: Workers, name: Optional[str] = None,
               writes: bool = True) -> None:
    """Write a split adapter (by default the active one) as one PEFT folder: the inverse of :func:`shard_adapter`.

    Args:
        handle: this worker's ``Adapters``.
        folder: as for ``Adapters.save``; worker 0 writes it.
        team: ``Workers``; all of them make this call.
        writes: whether the first one does write, where several teams hold the same adapter.

    Raises:
        AdapterError: a value is not finite, or the folder cannot be written.
    """
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="colora-share-") as share:
        handle.save(Path(share) / "mine", name)
        values = (Path(share) / "mine" / CONFIG_FILE).read_bytes()
        parts = team.gather(load_file(Path(share) / "mine" / WEIGHTS_FILE))

    def write(place):
        (place / CONFIG_FILE).write_bytes(values)
        save_file({key: joined(key, [part[key] for part in parts]) for key in parts[0]}, place / WEIGHTS_FILE)

    if team.first and writes:
        write_folder(folder, write)
    team.wait()
