"""llama.cpp's LoRA files (GGUF), read as PEFT's tensors and written from them.

The layout is that of llama.cpp's converter: ``general.type`` "adapter", ``adapter.type`` "lora",
``adapter.lora.alpha``, and for every module ``blk.N.attn_q.weight.lora_a`` (r, in) and ``.lora_b`` (out, r), float32.
llama.cpp multiplies the product by alpha / r, with one alpha for all and r of each tensor, or by 1 where alpha is 0.
The rows of ``lora_b`` stand in the order of the base weight's rows: interleaved for q and k of the ``llama``
architecture. The pair of the embedding is stored as (vocab, r) and (hidden, r).
"""

import math
import os
import re
import warnings
from typing import Any, Optional, Union

import numpy as np

from mindspore import nn

from colora_ms.adapters.key_names import PREFIX
from colora_ms.adapters.matching import Matched
from colora_ms.errors import AdapterError, AdapterWarning, CheckpointError
from colora_ms.files import replacing
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family, find_gguf_family
from colora_ms.models.gguf_names import gguf_module, hf_module, interleave_rows, interleaved_heads, restore_rows
from colora_ms.models.gguf_reader import GgufFile

_TENSOR = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<half>[ab])")
_EMBEDDING = "model.embed_tokens"
_ALPHA = "adapter.lora.alpha"


class GgufLoraFile:
    """The tensors of a LoRA GGUF under PEFT's names; has the face of ``SafetensorsFile``.

    Attributes:
        path: as given.
        entries: {PEFT's name: (type, shape, begin, end)}.
        values: the dict of an adapter_config.json that says the same.
        problems: sentences about what cannot be used.
    """

    def __init__(self, path: Union[str, os.PathLike]) -> None:
        """
        Raises:
            AdapterError: not a GGUF file, damaged, or not a LoRA.
        """
        self.path = str(path)
        try:
            self._file = GgufFile(path)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        metadata = self._file.metadata
        if metadata.get("general.type") != "adapter":
            raise AdapterError(f"{path} is a GGUF file of the type {metadata.get('general.type', 'model')!r}, not an "
                               "adapter; give it as the model, or name the adapter's own file")
        self.architecture = metadata.get("general.architecture")
        self.problems, self._heads = [], None
        if metadata.get("adapter.type") != "lora":
            self.problems.append(f"adapter.type is {metadata.get('adapter.type')!r:.60}, only 'lora' is read")
        alpha = metadata.get(_ALPHA, 0.0)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            self.problems.append(f"{_ALPHA} is {alpha!r:.60}, expected a finite number")
            alpha = 0.0
        known = ("adapter.type", _ALPHA, "adapter.lora.task_name", "adapter.lora.prompt_prefix")
        self.problems += [f"{key} is set: {'activated LoRA (aLoRA)' if 'alora' in key else 'this setting'} is not "
                          "implemented"
                          for key in metadata if key.startswith("adapter.") and key not in known]
        ranks = self._find_pairs()
        self.values = self._as_config(ranks, float(alpha))

    def _find_pairs(self):
        """Fill the table of tensors; returns {Hugging Face module: rank}."""
        self.entries, self._source, halves, ignored = {}, {}, {}, []
        record = find_gguf_family(self.architecture)
        for name, tensor in self._file.tensors.items():
            match = _TENSOR.fullmatch(name)
            module = hf_module(match["module"], record) if match else None
            if match is None and name.endswith("_norm.weight"):
                ignored.append(name)
            elif module is None:
                self.problems.append(f"tensor {name!r:.200} of shape {tensor.shape} belongs to no linear of the "
                                     "decoders known here")
            elif len(tensor.shape) != 2:
                self.problems.append(f"tensor {name!r} has the shape {tensor.shape}, expected two dimensions")
            else:
                halves.setdefault(module, {})[match["half"]] = tensor
        if ignored:
            warnings.warn(f"{self.path}: {len(ignored)} norms, {ignored[0]!r} first, are left out, as llama.cpp "
                          "leaves them out",
                          AdapterWarning, stacklevel=4)
        ranks = {}
        for module, pair in halves.items():
            if len(pair) < 2:
                one = next(iter(pair.values()))
                self.problems.append(f"tensor {one.name!r} has no partner, lora_{'b' if 'a' in pair else 'a'}")
                continue
            down, up = pair["a"], pair["b"]
            flipped = module == _EMBEDDING
            rank = up.shape[1]
            if down.shape[1 if flipped else 0] != rank:
                self.problems.append(f"{down.name!r} {down.shape} and {up.name!r} {up.shape} have different ranks")
                continue
            ranks[module] = rank
            names = ("lora_embedding_A", "lora_embedding_B") if flipped else ("lora_A.weight", "lora_B.weight")
            for name, tensor, turned in zip(names, (down, up), (flipped, False)):
                key = f"{PREFIX}{module}.{name}"
                self.entries[key] = (_type_name(tensor), tensor.shape[::-1] if turned else tensor.shape, tensor.begin,
                                     tensor.end)
                self._source[key] = (tensor.name, module, turned, tensor is up)
        return ranks

    @staticmethod
    def _as_config(ranks: dict[str, int], alpha: float) -> dict[str, Any]:
        common = max(sorted(set(ranks.values())), key=list(ranks.values()).count, default=1)
        others = {module: rank for module, rank in ranks.items() if rank != common}
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": common, "target_modules": list(ranks),
                "lora_alpha": alpha or common, "rank_pattern": {re.escape(name): r for name, r in others.items()},
                # alpha 0: the factor is 1, whatever the rank
                "alpha_pattern": {} if alpha else {re.escape(name): r for name, r in others.items()}}

    def fit(self, net: nn.Cell) -> list[str]:
        """Prepare for a model: rows are put into its order. Returns what is wrong, as a list of sentences."""
        config = getattr(net, "config", None)
        if not isinstance(config, DecoderConfig):
            return [f"a LoRA GGUF fits the decoders of this package, not a {type(net).__name__}"]
        expected = family(config.model_type).gguf
        if expected != self.architecture:
            return [f"it was made for the architecture {self.architecture!r:.60}, the model is {expected!r}"]
        self._heads = {module: interleaved_heads(config, module) for _, module, _, _ in self._source.values()}
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as PEFT stores it."""
        return self.entries[name][1]

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, as PEFT stores it; the rows in llama.cpp's order before :meth:`fit`."""
        source, module, turned, is_up = self._source[name]
        value = self._file.read(source)
        if turned:
            return np.ascontiguousarray(value.T)
        return restore_rows(value, self._heads[module]) if is_up and self._heads else value

    def raw(self, name: str) -> Any:
        """The stored bytes of a tensor, uint8."""
        return self._file.raw(self._source[name][0])


def _type_name(tensor):
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(tensor.type).name


def write_gguf_lora(path: Union[str, os.PathLike], config: Any, matched: Matched,
                    values: dict[tuple[str, str], dict[str, np.ndarray]], kind: str = "F32",
                    name: Optional[str] = None) -> list[str]:
    """Write a LoRA as llama.cpp reads it; the file appears complete or not at all.

    Args:
        path: the file to make; it must not exist.
        config: ``DecoderConfig`` of the base model.
        matched: the adapter's Matched on it; values: {(module name, "lora"): {"down", "up"}} float32, as
            ``handle.values()``.
        kind: type of the tensors, F32, F16, BF16, Q8_0 or Q4_0.
        name: ``general.name``; by default the file's name.

    Returns:
        List of sentences to be printed: what was rounded, or stored in another type.

    Raises:
        AdapterError: the file exists, or the adapter has what llama.cpp's LoRA cannot say (DoRA, biases, whole modules,
            the head of a tied model).
    """
    from gguf import GGUFWriter, Keys

    from colora_ms.models.gguf_writer import GGUF_TYPES, check_type, encode, stored_type

    path = os.path.abspath(os.fspath(path))
    check_type(kind)
    _check_expressible(config, matched, values)
    if os.path.lexists(path):
        raise AdapterError(f"{path} exists already; choose another name")
    alpha, factors, notes = _one_alpha(matched)
    record = family(config.model_type)
    tensors = {}
    for module, target in matched.targets.items():
        down, up = values[module, "lora"]["down"], values[module, "lora"]["up"]
        if factors[module] != 1:
            with np.errstate(all="ignore"):
                up = up * factors[module]
        heads = interleaved_heads(config, module)
        for half, value in (("a", down), ("b", interleave_rows(up, heads))):
            key = f"{gguf_module(module, record)}.weight.lora_{half}"
            if not np.isfinite(value).all():
                raise AdapterError(f"the adapter is not written to {path}, because {key} holds values that are not "
                                   "finite")
            tensors[key] = (np.ascontiguousarray(value, np.float32), stored_type(kind, value.shape))
    odd = [key for key, (_, own) in tensors.items() if own != kind]
    if odd:
        notes.append(f"{len(odd)} tensors are stored in F16, because their rows are no whole blocks of {kind} (such "
                     f"as {odd[0]})")
    writer = GGUFWriter(None, record.gguf)
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name or os.path.basename(path).removesuffix(".gguf"))
    writer.add_file_type(GGUF_TYPES[kind])
    writer.add_quantization_version(2)

    def refused(reason):
        return AdapterError(f"{path} cannot be written: {reason}")

    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        from gguf import GGMLQuantizationType
        for key, (value, own) in tensors.items():
            writer.add_tensor(key, encode(own, value, key), raw_dtype=GGMLQuantizationType[own])
        with replacing(path, refused, flush=True) as temporary:
            try:
                writer.write_header_to_file(temporary)
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
    except OSError as error:
        raise refused(error.strerror or error) from None
    return notes


def merge_command(config: Any) -> str:
    """How an adapter for which llama.cpp has no form is merged into a model with this config."""
    if family(config.model_type).gguf_writes:
        return "colora-ms merge MODEL ADAPTER OUT.gguf"
    return f"colora-ms merge MODEL ADAPTER OUT, into a folder ({config.model_type} models are not written as GGUF here)"


def _check_expressible(config, matched, values):
    """Refuse what llama.cpp's LoRA has no tensors for; all reasons in one error."""
    problems = [f"it trains {name} whole" for name in matched.saved[:3]]
    problems += [f"it trains the bias of {name}" for name in matched.biases[:1]]
    fields = {field: path for (path, role), own in values.items() for field in own if role == "lora"}
    named = {"magnitude": "DoRA's magnitudes", "up_bias": "a bias on lora_B"}
    problems += [f"{fields[field]} has {what}" for field, what in named.items() if field in fields]
    problems += [f"{path} has the values {field!r}" for field, path in fields.items()
                 if field not in ("down", "up", "magnitude", "up_bias", "bias")]
    problems += [f"it changes {path} ({role})" for path, role in values if role not in ("lora", "saved")]
    if config.tie_word_embeddings:
        problems += [f"{name} is adapted, but the model's head is tied to its embedding, which llama.cpp keeps as "
                     "one matrix"
                     for name in (_EMBEDDING, "lm_head") if name in matched.targets]
    problems += [f"{name} has no name in llama.cpp" for name in matched.targets
                 if gguf_module(name, family(config.model_type)) is None][:1]
    record = family(config.model_type)
    fused = [part for parts in (*record.fused.values(), *record.gguf_fused.values()) for part in parts]
    problems += [f"{name} is a part of a linear that llama.cpp keeps as one" for name in matched.targets
                 if name.endswith(tuple(fused))][:1]
    if problems:
        raise AdapterError("the adapter cannot be written as a LoRA of llama.cpp: " + "; ".join(problems)
                           + f". Merge it into the model instead: {merge_command(config)}")


def _one_alpha(matched):
    """(the file's alpha, {module: factor of lora_b}, notes): llama.cpp has one alpha, divided by each tensor's rank."""
    targets = matched.targets
    alphas = [target.alpha for target in targets.values() if target.alpha]
    alpha = np.float32(max(sorted(set(alphas)), key=alphas.count) if alphas else 1)
    factors = {name: np.float32(target.scaling * target.r / float(alpha)) for name, target in targets.items()}
    rounded = [name for name, factor in factors.items() if math.frexp(abs(float(factor)))[0] not in (0.0, 0.5)]
    folded = [name for name, factor in factors.items() if factor != 1]
    notes = []
    if folded:
        how = (f"; in {len(rounded)} of them the factor is no power of two, and values are rounded to float32 once more"
               if rounded else ", exactly")
        notes.append(f"lora_b of {len(folded)} modules is multiplied by what their alpha and rank ask for beside the "
                     f"file's one alpha ({alpha:g}){how}")
    return float(alpha), factors, notes
