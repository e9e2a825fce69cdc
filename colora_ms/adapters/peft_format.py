"""PEFT's directory format: ``adapter_config.json`` beside ``adapter_model.safetensors``, read strictly and written.

On disk: ``base_model.model.<module>.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r); embeddings
``.lora_embedding_A`` (r, vocab) and ``.lora_embedding_B`` (hidden, r); DoRA's ``.lora_magnitude_vector`` (out,) and a
bias on lora_B, ``.lora_B.bias`` (out,); a trained bias of an adapted linear
``.base_layer.bias``; modules saved whole under their own names; rows of single tokens
``.token_adapter.trainable_tokens_delta`` (ids, hidden), which replace the base's whatever they are called. The scaling
is not stored but follows from the config. This file alone knows that form; everything else uses down (r, in) or (vocab,
r), and up (out, r).
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np

from mindspore import nn

from colora_ms.adapters import pickle_file, store
from colora_ms.adapters.expert_parameters import split_experts, without_parameters
from colora_ms.adapters.fused_linears import split_fused
from colora_ms.adapters.fused_writing import fuse
from colora_ms.adapters.gguf_lora import GgufLoraFile
from colora_ms.adapters.key_names import PREFIX, PlainFile, plain_names
from colora_ms.adapters.matching import Matched, Module, shortest_names
from colora_ms.adapters.registry import method
from colora_ms.errors import AdapterError, AdapterWarning, CheckpointError, near
from colora_ms.models.recognise import is_gguf
from colora_ms.models.safetensors_file import SafetensorsFile, write_safetensors

#: Lines of a list of problems, at most.
MAX_LINES = 100


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter file: where its values belong, and its shape on disk."""

    path: str
    role: str
    field: str
    shape: tuple
    transposed: bool = False
    alias: str = ""
    #: Names under which PEFT writes the same tensor again, for other modules that share it.
    copies: tuple = ()
    #: Copies that are always written, since PEFT does not load a folder without them.
    tied: tuple = ()


class StoredAdapter:
    """An adapter folder, or llama.cpp's LoRA GGUF, opened and not yet read: its config, its tensors, and what is
    already known to be wrong.

    Attributes:
        folder: Path; config: the method's config, or None if its values cannot be used; problems: list of sentences.

    ``allow_pickle``: read an adapter_model.bin where there is no safetensors file, by a reader that runs nothing of it.
    """

    def __init__(self, folder: Union[str, os.PathLike], allow_pickle: bool = False) -> None:
        self.folder = Path(folder)
        if self.folder.is_file() and is_gguf(self.folder):
            self.file = GgufLoraFile(self.folder)
            self.values = self.file.values
        else:
            self.values = store.read_config(folder)
            self.file = _plain(_open_weights(self.folder, allow_pickle), self.folder)
        self._stored = self.file
        kind = self.values.get("peft_type") if isinstance(self.values, dict) else None
        values, self._parameters = without_parameters(self.values)
        self.config, self.problems = method(kind, self.folder).config.parse_peft(values)
        self.problems = [*getattr(self.file, "problems", ()), *self.problems]

    def fit(self, net: nn.Cell) -> list[str]:
        """Prepare for a model (anything with its ``config``); returns what is wrong, as a list of sentences."""
        fit = getattr(self.file, "fit", None)
        problems = fit(net) if fit else []
        if self.config is not None:
            try:
                model, version = getattr(net, "config", None), self.values.get("peft_version")
                self.file, self.config = split_fused(self.file, self.config, model)
                self.file, self.config = split_experts(self.file, self.config, model, self._parameters, version)
            except AdapterError as error:
                problems = [*problems, str(error)]
        return problems

    def digest(self) -> str:
        """Digest of the content; see :func:`colora_ms.adapters.store.digest`."""
        return store.digest(self.values, self._stored)

    def refuse(self, problems: list[str], base_model: Optional[str] = None) -> None:
        """Raise AdapterError with all problems, if there are any."""
        if not problems:
            return
        shown = list(problems[:MAX_LINES])
        if len(problems) > MAX_LINES:
            shown.append(f"and {len(problems) - MAX_LINES} more")
        made_for = self.values.get("base_model_name_or_path") if isinstance(self.values, dict) else None
        hint = ""
        if made_for and base_model != made_for:
            hint = (f"\nMaybe it was made for another base model: it names {made_for!r:.200}"
                    + (f", this is {base_model!r:.200}." if base_model else "."))
        raise AdapterError(f"the adapter in {self.folder} cannot be loaded, and nothing was changed. "
                           f"{len(problems)} problem{'s' if len(problems) > 1 else ''}:\n  - " + "\n  - "
                                                                                                 "".join(shown) + hint)

    def read(self, matched: Matched, modules: dict[str, Module], base: Callable,
             base_model: Optional[str] = None) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """Read and check all tensors.

        Args:
            matched: Matched of the config on the model; modules: {name: Module}.
            base: function (module name) -> {name on disk: float32 array} of the base model, for tensors of the base
                that PEFT stores beside an adapter: they must be equal to it.
            base_model: name of the base model, for the hint.

        Returns:
            {(module name, role): {field: float32 array}}.

        Raises:
            AdapterError: everything that is missing, unexpected, mis-shaped, not finite or not implemented, at once.
        """
        wanted = (method(self.config.peft_type).entries or entries)(matched, modules)
        problems = list(self.problems)
        found, used = {}, set()
        for key, entry in wanted.items():
            name = key if key in self.file.entries or entry.alias not in self.file.entries else entry.alias
            if name not in self.file.entries:
                problems.append(f"tensor {key!r} of shape {entry.shape} is missing")
                continue
            used.add(name)
            value = self._tensor(name, entry.shape, problems)
            if value is not None:
                used.update(self._check_copies(name, value, entry.copies + entry.tied, problems))
                value = np.ascontiguousarray(value.T) if entry.transposed else value
                found.setdefault((entry.path, entry.role), {})[entry.field] = value
        for name in self.file.entries:
            if name not in used and not self._is_base_copy(name, modules, base, problems):
                problems.append(f"tensor {name!r:.300} of shape {self.file.shape(name)} is not part of the adapter "
                                "that the config describes."
                                + near(name, [key for key in wanted if key not in used], 1))
        self.refuse(problems, base_model)
        for path, source in matched.ties.items():
            for role in ("saved", "tokens"):
                if (source, role) in found:
                    found[path, role] = found[source, role]
        return found

    def _check_copies(self, name, value, copies, problems):
        """The copies of a shared tensor that the file has; one that differs is a problem."""
        there = [copy for copy in copies if copy in self.file.entries]
        for copy in there:
            other = self._tensor(copy, value.shape, problems)
            if other is not None and not np.array_equal(other, value):
                problems.append(f"tensors {name!r} and {copy!r} differ by up to {np.abs(other - value).max():.3g}, but "
                                "the config says that these modules share one: the file is damaged, or the config is "
                                "not its")
        return there

    def _tensor(self, name, shape, problems):
        if self.file.shape(name) != shape:
            problems.append(f"tensor {name!r} has shape {self.file.shape(name)}, the config and the model ask for "
                            f"{shape}")
            return None
        try:
            value = self.file.read(name)
        except CheckpointError as error:
            problems.append(str(error))
            return None
        bad = value.size - int(np.isfinite(value).sum())
        if bad:
            problems.append(f"tensor {name!r} has {bad} value{'s' if bad > 1 else ''} that "
                            f"{'are' if bad > 1 else 'is'} not finite")
            return None
        return value

    def _is_base_copy(self, name, modules, base, problems):
        """PEFT adds the base's embedding and head in some cases: harmless if equal to ours, an error if changed. Beside
        modules saved whole it adds them a second time, as ``modules_to_save``, when the vocabulary was resized."""
        path, _, field = name.removeprefix(PREFIX).rpartition(".")
        if path.endswith(".modules_to_save"):
            twin = f"{PREFIX}{path.removesuffix('.modules_to_save')}.{field}"
            return twin in self.file.entries and np.array_equal(self.file.raw(twin), self.file.raw(name))
        path = path.removesuffix(".base_layer").removesuffix(".original_module")
        if not name.startswith(PREFIX) or path not in modules or field not in modules[path].parameters:
            return False
        own, shape = base(path).get(field), self.file.shape(name)
        # Of a resized base the first rows are the base's; the others are what Growth puts behind them.
        grown = own is not None and len(shape) == 2 and modules[path].parameters[field] == shape and shape[0] > len(own)
        if own is None or own.shape != shape and not grown:
            problems.append(f"tensor {name!r} of shape {self.file.shape(name)} replaces the base's {path}, which has "
                            f"shape {None if own is None else own.shape}: the vocabulary was changed; use that base "
                            "model")
            return True
        value = self._tensor(name, shape, problems)
        value = value if value is None else value[:len(own)]
        if value is not None and not np.allclose(value, own, rtol=1e-2, atol=1e-2 * float(np.abs(own).max(initial=0))):
            problems.append(f"tensor {name!r} is a copy of the base's {path} but differs from it: the adapter was made "
                            "for another base model, or trained it outside modules_to_save")
        return True


def entries(matched: Matched, modules: dict[str, Module]) -> dict[str, Entry]:
    """{key on disk: Entry} of all tensors of an adapter; matched and modules as in :meth:`StoredAdapter.read`."""
    found = {}
    for name, target in matched.targets.items():
        module, r, key = modules[name], target.r, PREFIX + name
        if target.kind == "linear":
            found[f"{key}.lora_A.weight"] = Entry(name, "lora", "down", (r, module.in_features))
            found[f"{key}.lora_B.weight"] = Entry(name, "lora", "up", (module.out_features, r))
            if target.dora:
                found[f"{key}.lora_magnitude_vector"] = Entry(name, "lora", "magnitude", (module.out_features,))
            if target.up_bias:
                found[f"{key}.lora_B.bias"] = Entry(name, "lora", "up_bias", (module.out_features,))
        else:
            found[f"{key}.lora_embedding_A"] = Entry(name, "lora", "down", (r, module.in_features), transposed=True)
            found[f"{key}.lora_embedding_B"] = Entry(name, "lora", "up", (module.out_features, r))
    for name in matched.biases:
        shape = modules[name].parameters["bias"]
        if name in matched.targets:
            found[f"{PREFIX}{name}.base_layer.bias"] = Entry(name, "lora", "bias", shape, alias=f"{PREFIX}{name}.bias")
        else:
            found[f"{PREFIX}{name}.bias"] = Entry(name, "lora", "bias", shape)
    for name in matched.saved:
        if name in matched.ties:
            continue
        for field, shape in modules[name].parameters.items():
            copies = tuple(f"{PREFIX}{path}.{field}" for path, source in matched.ties.items() if source == name)
            found[f"{PREFIX}{name}.{field}"] = Entry(name, "saved", field, shape, tied=copies)
    for name, ids in matched.tokens.items():
        if name not in matched.ties:
            found[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = Entry(
                name, "tokens", "rows", (len(ids), modules[name].parameters["weight"][1]))
    return found


def write_adapter(folder: Union[str, os.PathLike], config: Any, matched: Matched, modules: dict[str, Module],
                  values: dict[tuple[str, str], dict[str, np.ndarray]], copies: bool = False,
                  model: Any = None) -> None:
    """Write an adapter as PEFT does, whole or not at all.

    Args:
        folder: created, or replaced while its other files are kept.
        config: the adapter's config; matched and modules: what it means on the model.
        values: {(module name, role): {field: float32 array}}, as :meth:`StoredAdapter.read` returns.
        copies: write a tensor that modules share once for each of them, as PEFT does, not once.
        model: the model's config, whose family may keep linears as one (:mod:`colora_ms.adapters.fused_writing`).

    Raises:
        AdapterError: a value is not finite, PEFT has no form for it, or the folder cannot be written.
    """
    tensors, broken = {}, []
    for key, entry in (method(config.peft_type).entries or entries)(matched, modules).items():
        value = values[entry.path, entry.role][entry.field]
        tensors[key] = np.ascontiguousarray(value.T) if entry.transposed else value
        if not np.isfinite(value).all():
            broken.append(key)
        tensors.update(dict.fromkeys(entry.tied + entry.copies * copies, tensors[key]))
    if broken:
        raise AdapterError(f"the adapter is not written to {folder}, because {len(broken)} of its tensors hold values "
                           f"that are not finite, {broken[0]!r} first: its training diverged; load an earlier "
                           "checkpoint")
    explicit = _explicit_targets(config, matched, modules)
    fused, tensors = fuse(config, matched, modules, tensors, model)
    text = store.config_text(fused.to_peft(explicit if fused is config else None))

    def write(temporary):
        write_safetensors(os.fspath(temporary / store.WEIGHTS_FILE),
                          {key: value.shape for key, value in tensors.items()}, tensors.__getitem__)
        with open(temporary / store.CONFIG_FILE, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    store.write_folder(folder, write)


def digest(folder: Union[str, os.PathLike]) -> str:
    """Digest of an adapter folder's content, 64 hexadecimal digits; the same for any order of tensors and any name."""
    return StoredAdapter(folder).digest()


def _explicit_targets(config, matched, modules):
    """What "all-linear" or no target_modules stood for, since other readers of the format know lists only."""
    if not (config.target_modules is None and matched.targets or
            isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return None
    return shortest_names(matched.targets, modules)


def _plain(file, folder):
    """The file with PEFT's names on disk; one whose tensors carry the adapter's own name is said."""
    names, adapter = plain_names(list(file.entries))
    if adapter is not None:
        first = next(own for plain, own in names.items() if plain != own)
        warnings.warn(f"the tensors in {folder} carry an adapter's name, such as {first!r}; {adapter!r} was "
                      "taken out, which means the same", AdapterWarning, stacklevel=4)
    return PlainFile(file, names)


def _open_weights(folder, allow_pickle=False):
    path = folder / store.WEIGHTS_FILE
    if not path.exists():
        old = folder / pickle_file.WEIGHTS_FILE
        if old.exists() and allow_pickle:
            return pickle_file.PickleFile(store.regular_file(old))
        if old.exists():
            raise AdapterError(f"{folder} holds adapter_model.bin, a pickle file, which can run any code when it is "
                               "read; save the adapter as safetensors (PEFT: save_pretrained(..., "
                               "safe_serialization=True))")
        raise AdapterError(f"{folder} has no {store.WEIGHTS_FILE}")
    store.regular_file(path)
    try:
        return SafetensorsFile(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
