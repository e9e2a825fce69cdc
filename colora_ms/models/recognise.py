"""What a path is that was given in the place of something else, as one sentence that says what to do.

Nothing is loaded: names, the keys of one small JSON file, and the first bytes of a file decide.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from colora_ms.files import PathLike

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                  "pytorch_model.bin.index.json")

#: Keys that mlx-lm writes into an adapter_config.json, and PEFT does not.
_MLX_KEYS = ("fine_tune_type", "lora_parameters", "lora_layers", "adapter_path")

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def is_gguf(path: PathLike) -> bool:
    """Whether a path is a file that begins as a GGUF does."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def not_an_adapter(path: PathLike) -> str:
    """Why a path cannot be loaded as a PEFT adapter folder, or "" if it looks like one (or is unknown).

    Args:
        path: as it was given.

    Returns:
        One sentence.
    """
    path = Path(path)
    if path.is_file():
        return _file_as_adapter(path)
    if not path.is_dir():
        return ""
    mlx = _mlx(path)
    if mlx:
        return mlx
    if (path / ADAPTER_CONFIG).is_file():
        return ""
    inside = _adapters_inside(path)
    if inside:
        return f"{path} is a folder above adapters, it holds {_listed(path, inside)}; name one of them: {inside[-1]}"
    names = sorted(one.name for one in path.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    if _is_model(path) and not any(name in names for name in _ADAPTER_WEIGHTS):
        return (f"{path} is a model, not an adapter: it has {_model_files(names)} and no {ADAPTER_CONFIG}; give it as "
                "the model (--model), and the folder that holds the adapter's adapter_config.json as the adapter")
    if ggufs:
        return (f"{path} holds {ggufs[0]}, a GGUF file, and no {ADAPTER_CONFIG}; name the file itself if it is a LoRA")
    if any(name in names for name in _ADAPTER_WEIGHTS):
        return (f"{path} has an adapter's weights, but no {ADAPTER_CONFIG}, without which nobody can tell its rank and "
                "scaling; copy that file from where the adapter was trained")
    return (f"{path} cannot be read as an adapter: it holds {', '.join(names[:4]) if names else 'nothing'}"
            + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            + f", an adapter has {ADAPTER_CONFIG} and adapter_model.safetensors")


def not_a_model(path: PathLike) -> str:
    """Why a path is an adapter and not a model, or "" if it is none.

    Args:
        path: as it was given.

    Returns:
        One sentence.
    """
    path = Path(path)
    if path.is_file() and path.name in (*_ADAPTER_WEIGHTS, "adapters.safetensors"):
        path = path.parent
    if not path.is_dir() or _is_model(path):
        return ""
    names = {one.name for one in path.iterdir()}
    if ADAPTER_CONFIG in names:
        values = _config(path)
        mlx = _mlx(path)
        base = values.get("base_model_name_or_path") or values.get("model")
        made_for = f", made for {base!r:.200}" if isinstance(base, str) and base else ""
        if mlx:
            return f"{mlx}{made_for}; it is no model"
        return (f"{path} is an adapter ({values.get('peft_type', 'of an unknown kind')!s:.40}{made_for}), not a model; "
                "give its base model as the model and this folder as the adapter (--adapter), or merge the two first")
    inside = _adapters_inside(path)
    if inside and "config.json" not in names:
        return (f"{path} is a folder above adapters ({_listed(path, inside)}), not a model; give the base model as the "
                f"model and {inside[-1]} as the adapter (--adapter)")
    return ""


def _file_as_adapter(path):
    if is_gguf(path):
        return (f"{path} is a GGUF file, which is loaded as an adapter where one file can stand (--adapter); a folder "
                f"of it is made by: colora-ms convert --adapter {path} --to FOLDER --base MODEL")
    if path.name == "adapters.safetensors":
        return _mlx(path.parent) or (f"{path} is an mlx adapter's file; fuse the adapter there, or train it again with "
                                     "PEFT")
    if path.suffix in (".safetensors", ".bin", ".json"):
        return f"{path} is a file; an adapter is the folder that holds it: {path.parent}"
    return f"{path} is a file; an adapter is a folder with {ADAPTER_CONFIG} and adapter_model.safetensors"


def _mlx(path):
    """A sentence if a folder is an adapter of mlx-lm."""
    own_file = (path / "adapters.safetensors").is_file() and \
        not any((path / name).is_file() for name in _ADAPTER_WEIGHTS)
    values = _config(path)
    own_keys = [key for key in _MLX_KEYS if key in values]
    if not (own_file or own_keys) or "peft_type" in values:
        return ""
    signs = (["adapters.safetensors"] if own_file else []) + own_keys
    return (f"{path} is an mlx adapter ({', '.join(signs[:3])}), which names, transposes and scales its factors in "
            "another way than PEFT; fuse it into its model there (mlx_lm.fuse) and load that model, or convert it to "
            "PEFT's format")


def _config(path):
    """The JSON object of a folder's adapter_config.json, {} if it is not readable as one."""
    try:
        with open(path / ADAPTER_CONFIG, encoding="utf-8") as file:
            values = json.loads(file.read(4 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _adapters_inside(path):
    """Sub-folders (or theirs) with an adapter, checkpoints in the order of their numbers and last."""
    found = [one.parent for one in path.glob(f"*/{ADAPTER_CONFIG}")] or \
        [one.parent for one in path.glob(f"*/*/{ADAPTER_CONFIG}")]

    def place(one):
        match = _CHECKPOINT.fullmatch(one.name) or _CHECKPOINT.fullmatch(one.parent.name)
        return (match is not None, int(match[1]) if match else 0, one.name)

    return sorted(found, key=place)


def _listed(path, inside):
    """The first few folders inside ``path``, and how many more there are."""
    more = f" and {len(inside) - 4} more" if len(inside) > 4 else ""
    return ", ".join(str(one.relative_to(path)) for one in inside[:4]) + more


def _is_model(path):
    if any((path / name).is_file() for name in _MODEL_WEIGHTS):
        return True
    return (path / "config.json").is_file() and not (path / ADAPTER_CONFIG).is_file()


def _model_files(names):
    return next((name for name in (*_MODEL_WEIGHTS, "config.json") if name in names), "a model's files")
