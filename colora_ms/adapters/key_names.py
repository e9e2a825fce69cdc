"""Names of an adapter's tensors on disk: PEFT's prefix, and the adapter's own name that some writers leave inside.

PEFT keeps ``q_proj.lora_A.default.weight`` in memory and writes ``q_proj.lora_A.weight``. Whoever saves a model's
``state_dict()`` by hand writes the former, which PEFT loads under the same adapter name and which means the same.
"""

import re
from typing import Any, Optional

import numpy as np

PREFIX = "base_model.model."

#: What an adapter's name follows, and what stands behind it: .lora_A.NAME.weight, .lora_embedding_A.NAME, ...
_NAMED = (
    re.compile(r"(?P<head>.+\.(?:lora_[AB]|lily_[AB]|lily_router))\.(?P<name>[^.]+)(?P<tail>\.(?:weight|bias))"),
    re.compile(r"(?P<head>.+\.(?:lora_embedding_[AB]|trainable_tokens_delta))\.(?P<name>[^.]+)"),
    re.compile(r"(?P<head>.+\.lora_magnitude_vector)\.(?P<name>(?!weight$)[^.]+)(?:\.weight)?"),
    re.compile(r"(?P<head>.+)\.modules_to_save\.(?P<name>[^.]+)(?P<tail>\.[^.]+)"),
)

_PLAIN_MAGNITUDE = re.compile(r"(.+\.lora_magnitude_vector)\.weight")


def plain_names(names: list[str]) -> tuple[dict[str, str], Optional[str]]:
    """{plain name: name in the file} of an adapter's tensors.

    The adapter's name is taken out where it is the same in all tensors that have one and nothing collides; otherwise
    the names stay as they are, and the check of the tensors will say what is wrong.

    Args:
        names: the tensors' names in the file.

    Returns:
        (the dict, in the order of the file; the adapter's name that was taken out, or None).
    """
    found, adapters = {}, set()
    for name in names:
        match = next(filter(None, (one.fullmatch(name) for one in _NAMED)), None)
        if match:
            adapters.add(match["name"])
        parts = match.groupdict() if match else {}
        plain = _PLAIN_MAGNITUDE.sub(r"\1", parts["head"] + (parts.get("tail") or "") if match else name)
        found[plain] = name
    if len(found) < len(names) or len(adapters) > 1:
        return {name: name for name in names}, None
    return found, next(iter(adapters), None)


class PlainFile:
    """A file of tensors under other names, with the face of :class:`colora_ms.models.safetensors_file.SafetensorsFile`.

    Args:
        file: the file; names: {name here: name in the file}.
    """

    def __init__(self, file: Any, names: dict[str, str]) -> None:
        self.file, self.names = file, names
        self.entries = {name: file.entries[own] for name, own in names.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, a tuple of ints."""
        return self.entries[name][1]

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32; see ``SafetensorsFile.read``."""
        return self.file.read(self.names[name])

    def raw(self, name: str) -> Any:
        """The bytes of a tensor, uint8 (n,)."""
        return self.file.raw(self.names[name])
