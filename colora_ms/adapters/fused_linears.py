"""Adapters of linears that a family's folders keep as one (``qkv_proj``, ``gate_up_proj``), for decoders in which their
parts stand apart: each part has the same ``lora_A`` and its rows of ``lora_B``; or its own rows of ``lora_A`` and its
block of ``lora_B``, where :mod:`colora_ms.adapters.fused_writing` put them together."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Optional

import numpy as np

from colora_ms.adapters.fused_writing import patterns
from colora_ms.adapters.key_names import PREFIX
from colora_ms.errors import AdapterError, CheckpointError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family
from colora_ms.models.family_tensors import part_rows

_SHARED = ("lora_A.weight",)  # of which every part has the whole


class SplitFile:
    """A file of tensors in which fused linears stand apart, with the face of ``SafetensorsFile``.

    Args:
        file: the file; parts: {name here: (name in the file, a slice for each of its first axes, or None for all)}.
    """

    def __init__(self, file: Any, parts: dict[str, tuple[str, Any]]) -> None:
        self.file, self._parts = file, parts
        self.entries = {}
        for name, (own, cut) in parts.items():
            dtype, shape, *rest = file.entries[own]
            cut = cut or ()
            sizes = [len(range(*one.indices(size))) for one, size in zip(cut, shape)]
            self.entries[name] = (dtype, (*sizes, *shape[len(cut):]), *rest)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.entries[name][1])

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        own, cut = self._parts[name]
        value = self.file.read(own)
        return value if cut is None else np.ascontiguousarray(value[cut])

    def raw(self, name: str) -> Any:
        """The bytes of a tensor, uint8 (n,); of a part, of its values."""
        own, cut = self._parts[name]
        return self.file.raw(own) if cut is None else self.read(name).view(np.uint8).reshape(-1)


def split_fused(file: Any, config: Any, model: Any) -> tuple[Any, Any]:
    """(file, config) of an adapter with the fused linears of the model's family taken apart; the same where there are
    none.

    Args:
        file: has ``entries``, ``shape``, ``read`` and ``raw``; config: the method's config; model: the model's config.

    Raises:
        AdapterError: a fused tensor has other rows than its parts together.
    """
    fused = family(model.model_type).fused if isinstance(model, DecoderConfig) else {}
    if not fused:
        return file, config
    pattern = re.compile(re.escape(PREFIX) + rf"(model\.layers\.\d+\.)({'|'.join(map(re.escape, fused))})\.(.+)")
    sizes, parts, modules, found = part_rows(model), {}, [], False
    blocks = _Blocks(file, config, fused, sizes)
    for name in file.entries:
        match = pattern.fullmatch(name)
        if match is None:
            parts[name] = (name, None)
            modules.append(name.removeprefix(PREFIX).partition(".lora_")[0])
            continue
        found, begin = True, 0
        own = blocks.of(match.group(1), match.group(2))
        for part in fused[match.group(2)]:
            end = begin + sizes[part.rpartition(".")[2]]
            cut: Optional[tuple] = None if match.group(3) in _SHARED else (slice(begin, end),)
            begin = end
            if own is not None:
                if part not in own:
                    continue
                columns = slice(*own[part])
                cut = {"lora_A.weight": (columns,), "lora_B.weight": (cut or ()) + (columns,)}.get(match.group(3), cut)
            parts[f"{PREFIX}{match.group(1)}{part}.{match.group(3)}"] = (name, cut)
            modules.append(match.group(1) + part)
        if match.group(3) not in _SHARED and file.shape(name)[0] != begin:
            raise AdapterError(f"tensor {name!r} has {file.shape(name)[0]} rows, the model asks for {begin}")
    if not found:
        return file, config
    if blocks.any:
        return SplitFile(file, parts), blocks.config(list(dict.fromkeys(modules)))
    config = blocks.without_marks(config)
    names = {whole.rpartition(".")[2]: [part.rpartition(".")[2] for part in own] for whole, own in fused.items()}
    targets = config.target_modules
    if isinstance(targets, str):
        targets = targets if targets.lower() == "all-linear" else list(dict.fromkeys(modules))
    elif targets is not None:
        targets = [one for target in targets for one in _apart(target, names)]
    changes = {field: {one: value for key, value in getattr(config, field).items() for one in _apart(key, names)}
               for field in ("rank_pattern", "alpha_pattern") if getattr(config, field, None)}
    return SplitFile(file, parts), dataclasses.replace(config, target_modules=targets, **changes)


def _apart(text, names):
    """A name or pattern, once for each part where it ends with a fused linear's name."""
    for whole, parts in names.items():
        if text.rstrip("$").endswith(whole):
            return [text.replace(whole, part) for part in parts]
    return [text]


class _Blocks:
    """Which fused linears of a file are parts put together, as ``rank_pattern`` marks them and the zeros confirm."""

    def __init__(self, file: Any, config: Any, fused: dict, sizes: dict[str, int]) -> None:
        self._file, self._config, self._fused, self._sizes = file, config, fused, sizes
        self._found: dict[str, Optional[dict]] = {}
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, float] = {}

    @property
    def any(self) -> bool:
        """Whether there was one."""
        return any(own is not None for own in self._found.values())

    def of(self, layer: str, whole: str) -> Optional[dict]:
        """{part: (first, last + 1) of its ranks} of a fused linear, or None where its parts share one lora_A."""
        if layer + whole not in self._found:
            try:
                self._found[layer + whole] = self._read(layer, whole)
            except CheckpointError:  # read again, and said, with all other tensors
                self._found[layer + whole] = None
            if self._found[layer + whole] is None:
                self._share(layer, whole)
        return self._found[layer + whole]

    def config(self, modules: list[str]) -> Any:
        """The config for these modules, the parts among them."""
        config = self.without_marks(self._config)
        ranks = {**patterns(self._ranks), **{name: r for name, r in config.rank_pattern.items() if not self._own(name)}}
        alphas = {**patterns(self._alphas), **{name: alpha for name, alpha in config.alpha_pattern.items()
                                               if not self._own(name)}}
        return dataclasses.replace(
            config, target_modules=self._targets(modules),
            rank_pattern={} if all(r == config.r for r in ranks.values()) else ranks,
            alpha_pattern={} if all(alpha == config.lora_alpha for alpha in alphas.values()) else alphas)

    def without_marks(self, config: Any) -> Any:
        """A config whose patterns do not name parts, which a file of fused linears does not have."""
        if not getattr(config, "rank_pattern", None) and not getattr(config, "alpha_pattern", None):
            return config
        parts = [part for own in self._fused.values() for part in own]
        return dataclasses.replace(config, **{
            field: {name: value for name, value in getattr(config, field).items() if not _is_one(name, parts)}
            for field in ("rank_pattern", "alpha_pattern")})

    def _read(self, layer, whole):
        config, marks = self._config, {}
        for part in self._fused[whole]:
            r, alpha = (_exact(getattr(config, field, None) or {}, layer, part)
                        for field in ("rank_pattern", "alpha_pattern"))
            if r is not None and alpha is not None:
                marks[part] = (r, alpha)
        key = f"{PREFIX}{layer}{whole}."
        if not marks or any(f"{key}{one}.weight" not in self._file.entries for one in ("lora_A", "lora_B")):
            return None
        rows, width = sum(self._size(part) for part in self._fused[whole]), sum(r for r, _ in marks.values())
        if self._file.shape(f"{key}lora_A.weight")[:1] != (width,) or self._file.shape(
                f"{key}lora_B.weight") != (rows, width):
            return None
        alpha = _exact(config.alpha_pattern, layer, whole)
        scale = config.scaling(width, config.lora_alpha if alpha is None else alpha)
        if not all(math.isclose(config.scaling(*one), scale, rel_tol=1e-9) for one in marks.values()):
            return None
        up, begin, column, found = self._file.read(f"{key}lora_B.weight"), 0, 0, {}
        for part in self._fused[whole]:
            end, last = begin + self._size(part), column + marks.get(part, (0,))[0]
            if up[begin:end, :column].any() or up[begin:end, last:].any():
                return None
            if part in marks:
                found[part] = (column, last)
                self._ranks[layer + part], self._alphas[layer + part] = marks[part]
            begin, column = end, last
        return found

    def _share(self, layer, whole):
        """Ranks and alphas of the parts of a linear that has no blocks."""
        config = self._config
        r, alpha = (_exact(getattr(config, field, None) or {}, layer, whole)
                    for field in ("rank_pattern", "alpha_pattern"))
        for part in self._fused[whole]:
            self._ranks[layer + part] = getattr(config, "r", 0) if r is None else r
            self._alphas[layer + part] = getattr(config, "lora_alpha", 0) if alpha is None else alpha

    def _size(self, part):
        return self._sizes[part.rpartition(".")[2]]

    def _own(self, name):
        return _is_one(name, list(self._fused))

    def _targets(self, modules):
        """``target_modules`` with the parts: by their last names if all layers have the same, else by whole names."""
        targets = self._config.target_modules
        if not isinstance(targets, list):
            return modules
        found = []
        for target in targets:
            kind = next((whole for whole in self._fused if _is_one(target, [whole, whole.rpartition(".")[2]])), None)
            if kind is None:
                found.append(target)
                continue
            own = {name: parts for name, parts in self._found.items()
                   if name.endswith("." + kind) and (name == target or not target.startswith("model."))}
            sets = {tuple(self._fused[kind] if parts is None else parts) for parts in own.values()}
            if target.startswith("model.") or len(sets) > 1:
                found += [name.removesuffix(kind) + part for name, parts in own.items()
                          for part in (self._fused[kind] if parts is None else parts)]
            else:
                found += [part.rpartition(".")[2] for one in sets for part in one]
        return list(dict.fromkeys(found))


def _is_one(name, kinds):
    """Whether a name is one of these, alone or behind its layer's."""
    return re.sub(r"^model\.layers\.\d+\.", "", name) in kinds


def _exact(values, layer, name):
    """The value of a pattern that names a module plainly, or None."""
    return values.get(layer + name, values.get(name))
