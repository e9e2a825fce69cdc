"""Mixes in files: ``mix.yaml`` says the voices of a :class:`colora_ms.decoding.mix.Mix`, and which adapters they are.

    name: support-and-law
    adapters:
      support: {path: ../runs/support, digest: 9f2c…}     # the folder, from here; the digest of its content
      law: {path: ../runs/law, digest: 04b1…}
    mix:
      ensemble: {adapters: [support, law], weights: [2, 1], mean: prob}

The digests are those of :func:`colora_ms.adapters.digest`. A file whose adapters have changed is refused, so that a
name that clients ask for means one thing.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Union

from colora_ms.decoding.mix import OWN, Mix, as_mapping, mix_of
from colora_ms.decoding.values import shown
from colora_ms.errors import ConfigError, near
from colora_ms.files import replacing

#: Keys of a file.
KEYS = ("name", "adapters", "mix")


@dataclasses.dataclass(frozen=True)
class SavedMix:
    """A mix with the adapters that it is made of.

    Attributes:
        name: what clients call it.
        mix: :class:`colora_ms.decoding.mix.Mix`; its voices name the adapters.
        adapters: {name: folder}; digests: {name: digest of its content}.
    """

    name: str
    mix: Mix
    adapters: Mapping[str, Path]
    digests: Mapping[str, str]


def used_adapters(mix: Mix) -> Tuple[str, ...]:
    """Names of the adapters that a mix has, in the order of its voices.

    Raises:
        ConfigError: a voice has the adapter of whoever asks, so that the mix alone is no model.
    """
    if mix.needs_adapter:
        raise ConfigError(f"the mix ({mix.label}) has a voice with the adapter that a request asks for; name its "
                          "adapter, so that the mix stands for itself")
    return tuple(dict.fromkeys(voice.adapter for voice in mix.voices if voice.adapter is not None))


def save_mix(path: Union[str, os.PathLike], mix: Mix, adapters: Mapping[str, Union[str, os.PathLike]],
             name: Optional[str] = None) -> SavedMix:
    """Write a mix.

    Args:
        path: of the file, such as ``mixes/support-and-law.yaml``.
        adapters: {name: its PEFT folder}, at least those of the mix.
        name: what clients call it; None: the file's name without its ending.

    Raises:
        ConfigError: an adapter of the mix has no folder, or the file cannot be written.
        AdapterError: a folder holds no adapter.
    """
    import yaml

    from colora_ms.adapters import digest

    target = Path(path)
    names = used_adapters(mix)
    missing = [one for one in names if one not in adapters]
    if missing:
        raise ConfigError(f"the mix has the adapter {missing[0]!r}, whose folder is not given; there are "
                          f"{', '.join(adapters) or 'none'}")
    folders = {one: Path(adapters[one]) for one in names}
    saved = SavedMix(name or target.stem, mix, folders, {one: digest(folder) for one, folder in folders.items()})
    value = {"name": saved.name,
             "adapters": {one: {"path": os.path.relpath(folder, target.parent or "."), "digest": saved.digests[one]}
                          for one, folder in folders.items()},
             "mix": as_mapping(mix)}
    with replacing(target, lambda reason: ConfigError(f"{target} cannot be written: {reason}")) as temporary:
        temporary.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return saved


def load_mix(path: Union[str, os.PathLike]) -> SavedMix:
    """Read a mix, and check that its adapters are what they were.

    Raises:
        ConfigError: the file cannot be read, holds something else, or an adapter's content has another digest; says
            which and why.
        DecodingError: the mix in it cannot be used.
        AdapterError: a folder holds no adapter.
    """
    import yaml

    from colora_ms.adapters import digest

    source = Path(path)
    try:
        value = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{source} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict) or "mix" not in value:
        raise ConfigError(f"{source} holds no mix; expected the keys {', '.join(KEYS)}")
    for key in value:
        if key not in KEYS:
            hint = near(key, KEYS) if isinstance(key, str) else ""
            raise ConfigError(f"{source} has {shown(key)}; there are {', '.join(KEYS)}.{hint}")
    name = value.get("name", source.stem)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{source}: name={shown(name)} is no name")
    mix = mix_of(value["mix"], f"{source}: mix")
    folders, digests = _adapters(source, value.get("adapters") or {})
    for one in used_adapters(mix):
        if one not in folders:
            raise ConfigError(f"{source}: the mix has the adapter {one!r}, which adapters does not name."
                              f"{near(one, list(folders))}")
        found = digest(folders[one])
        if found != digests.setdefault(one, found):
            raise ConfigError(f"{source}: the adapter {one!r} in {folders[one]} has the digest {found[:12]}…, the mix "
                              f"was made with {digests[one][:12]}…; save the mix again, or bring the adapter back")
    return SavedMix(name, mix, folders, digests)


def _adapters(source: Path, value: Any) -> Tuple[Dict[str, Path], Dict[str, str]]:
    """({name: folder}, {name: digest}) of the key ``adapters``; a digest may be left out."""
    if not isinstance(value, dict) or not all(isinstance(name, str) and name != OWN for name in value):
        raise ConfigError(f"{source}: adapters={shown(value)} is not a mapping of names to folders")
    folders, digests = {}, {}
    for name, one in value.items():
        entry = {"path": one} if isinstance(one, str) else one
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - {"path", "digest"} \
                or not isinstance(entry.get("digest", ""), str):
            raise ConfigError(f"{source}: adapters.{name}={shown(one)}: expected path and digest")
        folders[name] = source.parent / entry["path"]
        if entry.get("digest"):
            digests[name] = entry["digest"]
    return folders, digests
