"""A decoder whose linears are split over the workers of a job; every worker computes the same logits.

    column: q, k, v, gate, up     weight (out, in): each worker has its rows; y is the worker's part
    row:    o, down               each worker has its columns, for the part that it has of x; y = sum over workers

LoRA goes the way of its linear: a column-split one has ``up`` (out, r) split, a row-split one ``down`` (r, in), so
that base and adapter share the one sum. Embedding, norms and head are whole on every worker.

Gradients: every worker has the whole gradient of its activations, since the one of a column-split block's input is
summed; of the factors that every worker has whole each has a part (see ``colora_ms.distributed.training``).
"""

import dataclasses
import re
import tempfile
from pathlib import Path

import numpy as np

from mindspore import nn, ops

from colora_ms.adapters.inject import load_adapters
from colora_ms.adapters.key_names import plain_names
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE, read_config, regular_file, write_folder
from colora_ms.errors import AdapterError, ConfigError
from colora_ms.files import flush_to_disk
from colora_ms.models.checkpoint import open_checkpoint, resolve_model
from colora_ms.models.decoder import Decoder
from colora_ms.models.replacing import replace_cells
from colora_ms.models.tokenizer import load_tokenizer

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")

_TENSOR = re.compile(r"(?:^|\.)(?P<linear>" + "|".join(COLUMN + ROW) + r")\.(?P<field>weight|bias|lora_A\.weight|lora_B\.weight)$")
_FORMATS = ("float32", "bfloat16")


def shard_decoder(config, weights, team, weight_format="float32", max_positions=None, adapters=None, trainable=False):
    """This worker's share of a decoder, with its share of the adapters.

    Args:
        config: ``DecoderConfig`` of the whole model.
        weights: mapping of Hugging Face names to whole arrays, read one at a time.
        team: ``Workers``; all of them make this call.
        weight_format: "float32" or "bfloat16".
        max_positions: see ``Decoder``.
        adapters: mapping of names to PEFT folders of plain LoRA, or None.
        trainable: whether the adapters' Parameters require gradients.

    Returns:
        ``(Decoder, Adapters or None)``. Its cache has this worker's heads alone; its inputs and logits are those of
        the whole model.

    Raises:
        ConfigError: heads or inner size cannot be divided by the number of workers; another weight format.
        AdapterError: an adapter has something beside LoRA's two factors, or (trainable) dropout.
    """
    if weight_format not in _FORMATS:
        raise ConfigError(f"weight_format {weight_format!r} cannot be split, expected one of {', '.join(_FORMATS)}: the "
                          "scales of integer weights would be other ones than those of the whole model")
    decoder = Decoder(local_config(config, team.world), _Shares(weights, team), weight_format,
                      max_positions or min(config.max_position_embeddings, 8192))
    handle = None
    if adapters:
        with tempfile.TemporaryDirectory(prefix="colora-shares-") as folder:
            handle = load_adapters(decoder, {name: shard_adapter(source, Path(folder) / str(number), team)
                                             for number, (name, source) in enumerate(adapters.items())}, trainable=trainable)
        if trainable and handle.dropout:
            raise AdapterError(f"lora_dropout is {handle.dropout}, but a split model is trained without dropout: its workers "
                               "would drop different inputs of one linear")
    if team.world > 1:
        _join(decoder)
    return decoder, handle


def load_sharded(name_or_path, team, weight_format="float32", max_positions=None, adapters=None):
    """This worker's share of a model from its files, with its tokenizer and its share of the adapters.

    Args:
        name_or_path: as for :func:`colora_ms.models.load_model`.
        team, weight_format, max_positions, adapters: as for :func:`shard_decoder`.

    Returns:
        ``(Decoder, Tokenizer, Adapters or None)``.

    Raises:
        ConfigError: the model's linears are integers or factors, or its sizes cannot be divided.
        AdapterError, CheckpointError, TokenizerError: with what is wrong and what to do.
    """
    checkpoint = open_checkpoint(resolve_model(name_or_path))
    if checkpoint.quantized is not None or checkpoint.low_rank:
        kind = "integer linears (colora-ms quantize, LR-QAT)" if checkpoint.quantized is not None else "decomposed linears"
        raise ConfigError(f"{checkpoint.path} has {kind}, which cannot be split over workers; run it in one process, or split "
                          "the float model that it was made from")
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    decoder, handle = shard_decoder(checkpoint.config, checkpoint.tensors, team, weight_format, max_positions, adapters)
    return decoder, tokenizer, handle


def local_config(config, world):
    """The config of one worker's share.

    Raises:
        ConfigError: lists the sizes that ``world`` does not divide.
    """
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    wrong = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) % world]
    if wrong:
        raise ConfigError(f"{world} workers cannot share {', '.join(wrong)}; choose a number of workers that divides them")
    return dataclasses.replace(config, **{name: getattr(config, name) // world for name in names})


def share_of(name, value, team):
    """This worker's part of a tensor.

    Args:
        name: a name of a model's or of a PEFT adapter's file.
        value: the whole array.
        team: ``Workers``.

    Returns:
        A part of the rows or columns; the array itself where every worker needs it. The bias of a row-split linear is
        zero on all workers but the first, since the workers' outputs are summed.
    """
    if team.world == 1:
        return value
    axis = split_axis(name)
    if axis is None:
        summed = name.endswith(tuple(f"{linear}.bias" for linear in ROW))
        return np.zeros_like(value) if summed and not team.first else value
    size = value.shape[axis] // team.world
    part = [slice(None)] * value.ndim
    part[axis] = slice(team.rank * size, (team.rank + 1) * size)
    return np.ascontiguousarray(value[tuple(part)])


class _Shares:
    """Weights by name, cut when they are read."""

    def __init__(self, weights, team):
        self.weights, self.team = weights, team

    def __contains__(self, name):
        return name in self.weights

    def __getitem__(self, name):
        return share_of(name, self.weights[name], self.team)


def shard_adapter(source, folder, team):
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
        raise AdapterError(f"the adapter in {source} cannot be split over workers: only plain LoRA (lora_A and lora_B) can, "
                           f"this one has {what}" + (f" and tensors such as {', '.join(other[:3])}" if other else ""))
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(("pissa", "olora")):
        raise AdapterError(f"the adapter in {source} cannot be split over workers: init_lora_weights={start!r} changes the "
                           "base weights; save it with as_lora=True first")
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_bytes((source / CONFIG_FILE).read_bytes())
    save_file({name: share_of(name, value, team) for name, value in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def save_whole(handle, folder, team, name=None):
    """Write a split adapter (by default the active one) as one PEFT folder: the inverse of :func:`shard_adapter`.

    Args:
        handle: this worker's ``Adapters``.
        folder: as for ``Adapters.save``; worker 0 writes it.
        team: ``Workers``; all of them make this call.

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
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            flush_to_disk(place / file)
    if team.first:
        write_folder(folder, write)
    team.wait()


def joined(name, parts):
    """The whole of a tensor of an adapter's file from all workers' parts; the inverse of :func:`share_of`."""
    axis = split_axis(name)
    return parts[0] if axis is None else np.ascontiguousarray(np.concatenate(parts, axis))


def split_axis(name):
    """The axis along which a tensor is split, or None where every worker has it whole; ``name`` as for :func:`share_of`."""
    found = _TENSOR.search(name)
    if found is None:
        return None
    row, field = found["linear"] in ROW, found["field"]
    if field == "bias":
        return None if row else 0
    if field == ("lora_B.weight" if row else "lora_A.weight"):
        return None
    return 1 if row else 0


class SumOfParts(nn.Cell):
    """The sum of the workers' x; the gradient of the sum is that of each x."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.sum = ops.AllReduce(ops.ReduceOp.SUM)

    def construct(self, x):
        """x: any shape, float32 -> the same shape, equal on all workers."""
        return self.sum(x)

    def bprop(self, x, out, dout):
        """The operator's own gradient would sum dout, which all workers have in full."""
        return (dout,)


class SumOfGradients(nn.Cell):
    """x itself; its gradient is the sum of the workers' gradients."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.sum = ops.AllReduce(ops.ReduceOp.SUM)

    def construct(self, x):
        """x: any shape, float32 -> x."""
        return x

    def bprop(self, x, out, dout):
        """dx: the sum of what the workers' column-split linears give."""
        return (self.sum(dout),)


class SplitInput(nn.Cell):
    """The norm before a block of column-split linears.

    Args:
        norm: the whole norm.
    """

    #: The layers' own operator is for whole layers.
    fusible = False

    def __init__(self, norm):
        super().__init__(auto_prefix=False)
        self.norm = norm
        self.split = SumOfGradients()

    def construct(self, x, rows):
        """As of the norm."""
        return self.split(self.norm(x, rows))

    def add(self, x, residual, rows):
        """As of the norm; the residual goes on whole."""
        y, residual = self.norm.add(x, residual, rows)
        return self.split(y), residual


class SummedLinear(nn.Cell):
    """The sum of a row-split linear's outputs over all workers.

    Args:
        linear: the worker's linear, with its adapter.
    """

    #: The layers' own operator knows nothing of the sum.
    fusible = False

    def __init__(self, linear):
        super().__init__(auto_prefix=False)
        self.linear = linear
        self.sum = SumOfParts()

    def construct(self, x, rows):
        """x: (..., in / workers) -> (..., out) float32, equal on all workers."""
        return self.sum(self.linear(x, rows))


def _join(decoder):
    cells = {}
    for number, layer in enumerate(decoder.model.layers):
        place = f"model.layers.{number}"
        cells[f"{place}.input_layernorm"] = SplitInput(layer.input_layernorm)
        cells[f"{place}.post_attention_layernorm"] = SplitInput(layer.post_attention_layernorm)
        cells[f"{place}.self_attn.o_proj"] = SummedLinear(layer.self_attn.o_proj)
        cells[f"{place}.mlp.down_proj"] = SummedLinear(layer.mlp.down_proj)
    replace_cells(decoder, cells)
