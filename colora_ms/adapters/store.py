"""Adapter folders: safe names, whole-or-nothing writing, and the digest of what is in one."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path

from colora_ms.adapters.patterns import in_order
from colora_ms.errors import AdapterError
from colora_ms.files import read_json, replacing_folder
from colora_ms.models.recognise import not_an_adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: Bytes of an adapter_config.json, at most.
MAX_CONFIG_BYTES = 4 << 20

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HUB_NAME = re.compile(r"[A-Za-z0-9_-]+/[A-Za-z0-9._-]+")


def check_name(name):
    """Return ``name`` if an adapter may be called so; otherwise raise AdapterError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        raise AdapterError(f"{name!r:.80} cannot be an adapter's name: use 1 to 64 letters, digits, '.', '_' or '-'")
    return name


def adapter_path(root, name):
    """The folder of the adapter ``name`` inside ``root``.

    Raises:
        AdapterError: the name is not allowed, or the folder (through a symbolic link) or one of its files lies outside.
    """
    path = Path(root) / check_name(name)
    inside = Path(root).resolve()
    for one in (path, path / CONFIG_FILE, path / WEIGHTS_FILE, path / "adapter_model.bin"):
        if not one.resolve().is_relative_to(inside):
            raise AdapterError(f"adapter {name!r} lies outside {root}: {one} is a link to {one.resolve()}")
    return path


def regular_file(path):
    """Return ``path`` if it is a readable regular file (a pipe would hang, a device never end)."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path} is not a regular file")
    return path


def read_config(folder):
    """The JSON object of a folder's adapter_config.json.

    Raises:
        AdapterError: it is missing or no JSON; a model, an mlx or GGUF adapter, or a folder above adapters is said to be so.
    """
    reason = not_an_adapter(folder)
    if reason:
        raise AdapterError(reason)
    if not Path(folder).is_dir():
        hub = "; a name on a hub has to be downloaded first" if _HUB_NAME.fullmatch(str(folder)) else ""
        raise AdapterError(f"there is no adapter folder {folder}{hub}")
    path = regular_file(Path(folder) / CONFIG_FILE)
    return read_json(path, AdapterError, MAX_CONFIG_BYTES)


def config_text(values):
    """The text of an adapter_config.json: settings sorted by name, patterns in their own order, which is part of what
    they mean (sorting them, as PEFT 0.21 does when it saves, can take a module's own rank away)."""
    return json.dumps(dict(sorted(values.items())), indent=2) + "\n"


def write_folder(folder, write):
    """Create or replace an adapter folder, whole or not at all.

    Args:
        folder: the folder; other files that it holds are kept.
        write: function (temporary folder) that writes the new files.

    Raises:
        AdapterError: the folder cannot be written; what was there before is unchanged.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{folder} is a file; an adapter is a folder")
    with replacing_folder(target, lambda reason: AdapterError(f"the adapter cannot be written to {folder}: {reason}"),
                          keep=True) as temporary:
        write(temporary)


#: Settings that decide what an adapter computes.
_DIGESTED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
             "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias", "stride_A", "num_B",
             "scaling", "router_pool", "router_form", "share", "use_dora", "lora_bias", "trainable_token_indices",
             "ensure_weight_tying")


def _is_digested(key, value):
    """A start that changed the base decides what the factors mean; any other start leaves no trace."""
    return key in _DIGESTED or key == "init_lora_weights" and isinstance(value, str) and value.startswith(("pissa", "olora"))


def digest(config, file):
    """Digest of an adapter's content: the settings that count and all tensors, whatever their order in the file.

    Args:
        config: the dict of adapter_config.json; file: SafetensorsFile.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    total = hashlib.sha256()
    settings = {key: value for key, value in config.items()
                if _is_digested(key, value) and value is not None and value is not False and value not in ({}, [])}
    for key, value in settings.items():
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            settings[key] = sorted(value)  # peft writes its sets in any order
    total.update(json.dumps(in_order(settings), sort_keys=True).encode())
    for name in sorted(file.entries):
        dtype, shape = file.entries[name][:2]
        total.update(json.dumps([name, dtype, list(shape)]).encode())
        total.update(file.raw(name))
    return total.hexdigest()
