"""A model's tensors by name: read when they are asked for, compared with what its config calls for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from colora_ms.errors import CheckpointError, near

# Buffers that older releases of transformers saved; they follow from the config.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")



class LazyTensors(Mapping):
    """A mapping that reads a tensor when it is asked for.

    Attributes:
        shapes: ``{name: shape}`` in the order of the forward pass.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
        self.shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(f"no tensor {name!r} in this model.{near(name, self.shapes)}")
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare a model's tensors with what its config calls for.

    Args:
        found: ``{name: shape}`` of the files.
        expected: ``{name: shape}`` of the config.
        where: path for the message.

    Raises:
        CheckpointError: lists the missing, unexpected and mis-shaped tensors: the first of each
            by name (with both shapes), and how many more there are.
    """
    problems = []
    wrong = [name for name in expected if name in found and tuple(found[name]) != expected[name]]
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not _HARMLESS.fullmatch(name)]
    if wrong:
        name = wrong[0]
        problems.append(f"{name} has shape {tuple(found[name])}, the config calls for "
                        f"{expected[name]}{_more(wrong, 'mis-shaped')}")
    if missing:
        problems.append(f"{missing[0]} is missing{_more(missing, 'missing')}")
    if extra:
        problems.append(f"{extra[0]} is unexpected{_more(extra, 'unexpected')}."
                        f"{near(extra[0], missing or expected, 1)}")
    if problems:
        raise CheckpointError(f"{where}: the tensors do not fit the config: " + "; ".join(problems))


def _more(names, kind):
    return f" ({len(names) - 1} more {kind})" if len(names) > 1 else ""
