"""A model with adapters merged in, as files: ``merge_model``, the command ``colora-ms merge``.

The merge is done in float32 by the adapters' own ``merge``; what is written is rounded once more only if that is asked
for. Both steps are measured: logits of some texts before and after the merge, and of the rounded model read back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from colora_ms.errors import AdapterError, CheckpointError, ConfigError, near
from colora_ms.models.formats import FOLDER_TYPES, FORMATS

#: Texts on which the logits are compared.
TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "The capital of France is Paris, and its population is about 2,102,650.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Question: What is 17 + 25?\nAnswer: 42\n",
    "Sehr geehrte Damen und Herren, hiermit sende ich Ihnen die Unterlagen.",
    "She said: \"I don't know what you mean -- but I'll try!\"",
)

#: Largest difference of a float32 merge, as a share of the logits' range.
MOST = 1e-3

#: Tokens of a text that are compared, at most.
_LONGEST = 48


@dataclasses.dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        path: what was written; texts: number of texts compared.
        difference: largest difference between the logits of the merged and the unmerged model, both in float32.
        span: largest minus smallest logit of the unmerged model.
        loss: mean negative log-likelihood of the texts' tokens, of the unrounded merge, in nats.
        rounded_difference, rounded_mean, rounded_loss: largest and mean difference between the logits of the files,
            read back, and the unrounded merge, and their loss; None where nothing was rounded.
        notes: sentences to be printed.
    """

    path: str
    texts: int
    difference: float
    span: float
    loss: float
    rounded_difference: Optional[float] = None
    rounded_mean: Optional[float] = None
    rounded_loss: Optional[float] = None
    notes: list = dataclasses.field(default_factory=list)

    @property
    def share(self) -> float:
        """The difference as a share of the logits' range."""
        return self.difference / self.span if self.span else 0.0


@dataclasses.dataclass
class _Source:
    """The tokenizer that goes into the merged model, and the adapter's folder that it comes from (None: the base)."""

    tokenizer: Any
    folder: Any


def merge_model(model: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]],
                target: str | os.PathLike[str], weights: Optional[Sequence[float]] = None,
                combine: Optional[str] = None, dtype: Optional[str] = None, kind: Optional[str] = None,
                group: Optional[int] = None, texts: Optional[Sequence[str]] = None, **options: Any) -> MergeReport:
    """Merge adapters into a model and write it.

    Args:
        model: what ``resolve_model`` takes: a known name, a folder or a file. Of integer linears, quantised GGUF
            blocks and factors the products are merged into.
        adapters: one or several adapter folders or LoRA GGUF files.
        target: folder to make, or a GGUF file if it ends in ``.gguf``; it must not exist.
        weights: a number for each adapter; by default 1.
        combine: how several are made into one before the merge, see :mod:`colora_ms.adapters.combine`; by default
            "cat", the exact weighted sum.
        dtype: of a folder, one of ``FOLDER_TYPES``, by default float32; kind: of a GGUF, a key of ``GGUF_TYPES``, by
            default F32; group: inputs that share a scale, for int8 and int4 (none: a channel).
        texts: on which the logits are compared, by default ``TEXTS``.
        options: ``svd_rank``, ``svd_clamp``, ``density``, ``majority_sign_method``, ``seed`` of the combination.

    Returns:
        MergeReport.

    Raises:
        AdapterError: an adapter does not fit or cannot be merged; CheckpointError, ConfigError, TokenizerError: as for
            loading and writing. Nothing is written then.
    """
    from colora_ms import runtime
    from colora_ms.models.checkpoint import open_checkpoint, resolve_model
    from colora_ms.models.decoder import Decoder
    from colora_ms.models.tokenizer import load_tokenizer

    runtime.configure()
    target, adapters = os.fspath(target), list(adapters)
    to_gguf = target.lower().endswith(".gguf")
    dtype, kind = _checked(target, to_gguf, dtype, kind, group)
    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer = load_tokenizer(checkpoint.tokenizer_source) if checkpoint.tokenizer_source is not None else None
    notes = _packed_notes(checkpoint)
    config = checkpoint.config
    decoder = Decoder(config, checkpoint.tensors, max_positions=min(config.max_position_embeddings, 4 * _LONGEST))
    name, handle = _loaded(decoder, adapters, weights, combine, options)
    notes += _untie(decoder, handle.matched(name), handle)
    source = _tokenizer_source(tokenizer, adapters, handle)
    if source.folder is not None:
        notes.append(f"the adapter in {source.folder} brings tokens of its own: its tokenizer goes into the model")
    batch = _batch(source.tokenizer, texts or TEXTS, decoder.config.vocab_size)
    before = _logits(decoder, batch, handle.slots(len(batch[1])))
    handle.merge(name, safe_merge=True)
    merged = _logits(decoder, batch, handle.slots(len(batch[1])))
    report = MergeReport(target, len(batch[1]), _largest(before, merged), float(np.ptp(before)), _loss(merged, batch),
                         notes=notes)
    if report.share > MOST:
        raise AdapterError(f"the merge is not written to {target}: its logits differ from the unmerged model's by "
                           f"{report.difference:.3g}, {report.share:.2g} of their range, where float32 allows "
                           f"{MOST:g}; the adapter's values are too large for the base's weights, use it unmerged")
    handle.unload()
    report.notes += _write(decoder, checkpoint, source, target, dtype, kind, group, to_gguf)
    if (kind if to_gguf else dtype) not in ("F32", "float32"):
        del decoder, handle
        _measure_rounding(report, target, merged, batch)
    return report


def _checked(target: str, to_gguf: bool, dtype: Optional[str], kind: Optional[str],
             group: Optional[int]) -> tuple[Optional[str], Optional[str]]:
    """(dtype, kind) with their defaults; ConfigError and CheckpointError before anything is read."""
    if to_gguf:
        from colora_ms.models.gguf_writer import check_type

        kind = kind or "F32"
        if dtype is not None or group is not None:
            raise ConfigError(f"dtype={dtype!r} and group={group!r} are for folders; the type of a GGUF file is "
                              "given by its own option (--type)")
        check_type(kind)
    elif kind is not None:
        raise ConfigError(f"type {kind!r} is for GGUF files, whose names end in .gguf; a folder takes a dtype "
                          "(--dtype)")
    else:
        dtype = dtype or "float32"
        if dtype not in FOLDER_TYPES:
            raise ConfigError(f"dtype is {dtype!r}, expected one of "
                              f"{', '.join(FOLDER_TYPES)}.{near(dtype, FOLDER_TYPES)}")
        if group is not None and _is_float(dtype):
            raise ConfigError(f"group={group} is for int8 and int4, not for {dtype}")
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already; choose another name")
    return dtype, kind


def _is_float(dtype: str) -> bool:
    """Whether a folder's dtype keeps floats; float16 is written, but no format that a decoder computes in."""
    return dtype not in FORMATS or FORMATS[dtype].is_float


def _packed_notes(checkpoint: Any) -> list[str]:
    if checkpoint.quantized is not None:
        return ["the base's linears are integers: the merge is into a float32 copy of their values"]
    if checkpoint.low_rank:
        return [f"{len(checkpoint.low_rank)} linears of the base are low-rank factors: the merge is into their "
                "products"]
    if checkpoint.packed:
        return [f"the base's matrices are stored as {', '.join(checkpoint.packed)}: the merge is into a float32 copy "
                "of their values"]
    return []


def _untie(decoder: Any, matched: Any, handle: Any) -> list[str]:
    """Give a tied head a matrix of its own where the adapter changes it or the embedding apart; returns notes."""
    from mindspore import Parameter, Tensor

    from colora_ms.models.replacing import forget_graphs

    embedding, head = "model.embed_tokens", "lm_head"
    changed = {embedding, head} & {*matched.targets, *matched.saved, *matched.tokens}
    if not decoder.config.tie_word_embeddings or not changed or head in matched.ties:
        return []
    own = Tensor(handle.cells[embedding].weight.asnumpy().copy())
    handle.cells[head].weight = Parameter(own, name=f"{head}.weight", requires_grad=False)
    decoder.config = dataclasses.replace(decoder.config, tie_word_embeddings=False)
    forget_graphs()
    return [f"the head is written as a matrix of its own, because the adapter changes {' and '.join(sorted(changed))}"
            f"{' apart' if len(changed) > 1 else ' alone'} of the two that were tied"]


def _tokenizer_source(tokenizer: Any, adapters: Sequence[Any], handle: Any) -> _Source:
    """The _Source: the base's tokenizer, or that of an adapter with more tokens."""
    from colora_ms.adapters.vocabulary import tokenizer_for

    for index, folder in enumerate(adapters):
        own = tokenizer_for(tokenizer, {f"adapter{index}": folder}, handle)
        if own is not tokenizer:
            return _Source(own, folder)
    return _Source(tokenizer, None)


def _loaded(decoder: Any, adapters: Sequence[Any], weights: Optional[Sequence[float]], combine: Optional[str],
            options: dict[str, Any]) -> tuple[str, Any]:
    """(name of the adapter to merge, handle) with the adapters loaded, and combined if there are several."""
    from colora_ms.adapters.inject import load_adapters
    from colora_ms.adapters.peft_format import StoredAdapter

    if not adapters:
        raise AdapterError("no adapter is given to be merged")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise AdapterError(f"{len(adapters)} adapters but {len(weights)} weights; give one weight for each")
    folders = {f"adapter{index}": folder for index, folder in enumerate(adapters)}
    plain = len(adapters) == 1 and weights[0] == 1 and combine is None
    options = {name: value for name, value in options.items() if value is not None}
    if plain:
        if options:
            raise AdapterError(f"{', '.join(sorted(options))} is for several adapters, and one is given")
        handle = load_adapters(decoder, folders)
        handle.set_adapter("adapter0")
        return "adapter0", handle
    combine = combine or "cat"
    ranks = []
    for folder in adapters:
        stored = StoredAdapter(folder)
        if stored.config is None:
            stored.refuse(stored.problems)
        own = [stored.config.r, *getattr(stored.config, "rank_pattern", {}).values()]
        # PiSSA and OLoRA become plain LoRA of twice the rank
        ranks.append(max(own) * (2 if getattr(stored.config, "changes_base", False) else 1))
    room = max(sum(ranks) if combine == "cat" else max(ranks), options.get("svd_rank") or 0)
    handle = load_adapters(decoder, folders, slots=len(folders) + 1, max_rank=room)
    handle.add_weighted_adapter(list(folders), weights, "combined", combination_type=combine, **options)
    handle.set_adapter("combined")
    return "combined", handle


def _batch(tokenizer: Any, texts: Sequence[str], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids (rows, tokens) int32, lengths): the texts, or without a tokenizer some ids."""
    if tokenizer is None:
        random = np.random.default_rng(0)
        rows = [random.integers(0, vocabulary, 24).tolist() for _ in range(6)]
    else:
        rows = [ids[:_LONGEST] for ids in map(tokenizer.encode, texts) if len(ids) > 1]
        if not rows:
            raise ConfigError("the texts to compare the logits on have no tokens; give longer ones")
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, own in zip(ids, rows):
        row[:len(own)] = own
    return ids, np.array([len(own) for own in rows], np.int32)


def _logits(decoder: Any, batch: tuple[np.ndarray, np.ndarray], slots: Any) -> np.ndarray:
    """Logits of all real tokens, (tokens, vocabulary) float32."""
    from mindspore import Tensor

    from colora_ms import runtime

    ids, lengths = batch
    found = runtime.run(decoder, Tensor(ids), Tensor(lengths), slots).asnumpy()
    return np.concatenate([found[row, :length] for row, length in enumerate(lengths)])


def _largest(one: np.ndarray, other: np.ndarray) -> float:
    return float(max(np.abs(a - b).max() for a, b in zip(one, other)))


def _loss(logits: np.ndarray, batch: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean negative log-likelihood of the texts' tokens but the first of each, in nats."""
    ids, lengths = batch
    total = count = at = 0
    for row, length in enumerate(lengths):
        own = logits[at:at + length - 1].astype(np.float64)
        most = own.max(-1, keepdims=True)
        scores = own - most - np.log(np.exp(own - most).sum(-1, keepdims=True))
        total -= scores[np.arange(length - 1), ids[row, 1:length]].sum()
        count += length - 1
        at += length
    return float(total / count)


def _write(decoder: Any, checkpoint: Any, source: _Source, target: str, dtype: Any, kind: Any, group: Optional[int],
           to_gguf: bool) -> list[str]:
    """Write the merged model; returns notes."""
    from colora_ms.models.hf_folder import travelling_files, write_hf_folder
    from colora_ms.models.tensors import LazyTensors

    config = decoder.config
    parameters = {parameter.name: parameter for parameter in decoder.get_parameters()}
    tensors = LazyTensors(config.parameter_shapes(), lambda name: parameters[name].asnumpy())
    if to_gguf:
        from colora_ms.models.gguf_writer import write_gguf

        tokenizer = checkpoint.tokenizer_source if source.folder is None else source.tokenizer
        return write_gguf(target, config, tensors, tokenizer, kind)
    folder = os.path.dirname(checkpoint.path) if os.path.isfile(checkpoint.path) else checkpoint.path
    files = {} if checkpoint.format == "gguf" else travelling_files(folder)
    if source.folder is not None:
        own = travelling_files(source.folder)
        own.pop("generation_config.json", None)
        kept = ("generation_config.json", "chat_template.jinja")
        files = {**{name: files[name] for name in kept if name in files}, **own}
    written = None if any(name.startswith("tokenizer.") for name in files) else source.tokenizer
    if not _is_float(dtype):
        from colora_ms.quantization import LrQatConfig, quantize

        made = quantize(decoder, LrQatConfig(method="rtn", bits=FORMATS[dtype].bits, group=group, downcast="int"))
        made.export(target, written, files=files)
        return []
    write_hf_folder(target, config, tensors, written, dtype, files=files)
    return []


def _measure_rounding(report: MergeReport, target: str, merged: np.ndarray,
                      batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Read the files back and compare."""
    from mindspore import Tensor

    from colora_ms.models import build_decoder
    from colora_ms.models.checkpoint import open_checkpoint

    decoder = build_decoder(open_checkpoint(target), max_positions=4 * _LONGEST)
    rounded = _logits(decoder, batch, Tensor(np.full(len(batch[1]), -1, np.int32)))
    report.rounded_difference = _largest(merged, rounded)
    report.rounded_mean = float(np.mean([np.abs(a - b).mean() for a, b in zip(merged, rounded)]))
    report.rounded_loss = _loss(rounded, batch)
