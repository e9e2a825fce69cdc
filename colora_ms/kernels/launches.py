"""What a compiled graph launches: its kernels by name, what they copy and move, read from the graph.

The graph is MindSpore's own after all of its device-independent optimisation, the one that a back end gets. Each node
of it is one launch on Ascend at jit level O0, by these rules:

* no launch: parameters, constants, tuples and their items, what orders side effects (Load, UpdateState, Depend), and
  views: Reshape, ExpandDims, Squeeze, Flatten, and the operators whose name ends in View;
* a launch that copies: those of :data:`COPIES` (Cast, Transpose, StridedSlice, Concat, ...); a slice of the last
  axis could be a view, but the operators of the internal library refuse one, so that it is a copy here;
* a launch that computes: everything else;
* a stand-in of the rehearsal, or an emulated operator of ours, is one launch under the real operator's name.

What a CPU's back end adds (casts for types that its kernels lack) does not count; what Ascend's adds (format
conversions of the O2 level) is not there at O0. Not yet compared with a trace of an NPU.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple, Optional

from mindspore import nn
from mindspore.common.api import _cell_graph_executor
from mindspore.train import anf_ir_pb2

from colora_ms.kernels.aot import KernelError

_NO_LAUNCH = {"Load", "UpdateState", "Depend", "MakeTuple", "TupleGetItem", "MakeList", "ListGetItem", "Return",
              "Reshape", "ExpandDims", "Squeeze", "Flatten", "StopGradient", "stop_gradient", "Shape", "TupleToTensor",
              "ScalarToTensor", "RealMakeTuple", "RealTupleGetItem", "Identity"}
_CONTROL = {"", "Switch", "SwitchLayer", "Partial"}  # a call of another graph has no operator name
COPIES = {"Cast", "Transpose", "StridedSlice", "Slice", "Split", "SplitWithSize", "SplitV", "Concat", "BroadcastTo",
          "Tile", "TensorMove", "Contiguous", "Pack", "Stack", "PadV3", "ConcatD"}

#: Operators of the internal library, which refuse views: their inputs must be contiguous.
_CONTIGUOUS = {"PagedAttention", "ReshapeAndCache", "FlashAttentionScore", "ApplyRotaryPosEmb", "Swiglu"}

# Of an element; int4 comes two to a byte, and its shape counts the bytes.
_BYTES = {"INT4": 1, "INT8": 1, "UINT8": 1, "BOOL": 1, "INT16": 2, "UINT16": 2, "FLOAT16": 2, "BFLOAT16": 2,
          "INT32": 4, "UINT32": 4, "FLOAT32": 4, "INT64": 8, "UINT64": 8, "FLOAT64": 8}


class Launch(NamedTuple):
    """One kernel of a graph.

    Attributes:
        name: the operator's.
        scope: of the Cell that it comes from, as MindSpore writes it.
        reads: its tensor inputs as (name, bytes); the name is that of the Parameter, or of the graph's input of a list
            of tensors (caches), and "" for what the step computes or is given.
        writes: bytes of its outputs.
    """

    name: str
    scope: str
    reads: tuple[tuple[str, float], ...]
    writes: float

    @property
    def copies(self) -> bool:
        """Whether it only moves numbers."""
        return self.name in COPIES


class Launches(NamedTuple):
    """What a graph launches.

    Attributes:
        launches: in the order of the graph.
        views_refused: operators of the internal library that get a view, as sentences.
    """

    launches: tuple[Launch, ...]
    views_refused: tuple[str, ...]

    def by_name(self) -> Counter:
        """Operator -> times."""
        return Counter(launch.name for launch in self.launches)

    def copied_bytes(self) -> float:
        """Bytes of weights, banks and caches (what has a name) that launches transpose, cast or copy."""
        return sum(size for launch in self.launches if launch.copies for name, size in launch.reads if name)

    def moved_bytes(self, read: Optional[dict[str, float]] = None) -> float:
        """Bytes that all launches read and write.

        Args:
            read: operator -> bytes that one launch of it really reads of its parameters, for those that read a part of
                them: attention reads the positions that are there, a low-rank pair the adapters in use, a gather its
                rows. Without an entry a launch reads its inputs whole.
        """
        total = 0.0
        for launch in self.launches:
            held = sum(size for name, size in launch.reads if name)
            if read is not None and launch.name in read:
                held = read[launch.name]
            total += held + sum(size for name, size in launch.reads if not name) + launch.writes
        return total


def launches_of(cell: nn.Cell) -> Launches:
    """What the graph launches that a Cell compiled last in its present phase.

    Args:
        cell: a top Cell that ran in graph mode.

    Raises:
        KernelError: it has no compiled graph, or one with control flow, whose launches a count cannot tell.
    """
    phase = cell.phase_cache.get(cell.phase)
    held = phase and _cell_graph_executor._get_func_graph_proto(cell, phase, "anf_ir")
    if not held:
        raise KernelError(f"{type(cell).__name__} has no compiled graph in phase {cell.phase!r}; run it once before")
    model = anf_ir_pb2.ModelProto()
    model.ParseFromString(held)
    graph = model.graph
    sizes = {one.name: _size(one.type) for one in graph.parameters}
    weights = {one.name for one in cell.get_parameters()}
    weights |= {one.name for one in graph.parameters if _kind(one.type) in ("DT_LIST", "DT_TUPLE")}
    parameters = {one.name: one.name for one in graph.parameters if one.name in weights}  # node -> what it is
    views: dict[str, str] = {}
    made: dict[str, Any] = {}
    launches, refused = [], []
    for node in graph.node:
        made[node.name] = node
    items: dict[str, float] = {}
    for node in graph.node:
        sizes[node.name] = _size(node.output_type)
        if node.op_type == "TupleGetItem":
            items[node.input[0].name] = items.get(node.input[0].name, 0.0) + sizes[node.name]
    for node in graph.node:
        name = operator_name(node)
        if name in _CONTROL:
            raise KernelError(f"the graph of {type(cell).__name__} has control flow; count a graph that runs one step")
        inputs = [one.name for one in node.input]
        if name in _NO_LAUNCH or name.endswith("View"):
            if inputs and inputs[0] in parameters:
                parameters[node.name] = parameters[inputs[0]]
            if name.endswith("View") or inputs and inputs[0] in views:
                views[node.name] = name if name.endswith("View") else views[inputs[0]]
            continue
        tensors = [one for item in inputs for one in _leaves(item, made) if one in sizes and sizes[one]]
        if name in _CONTIGUOUS:
            refused += [f"{name} ({node.full_name}) gets the view {views[one]}" for one in inputs if one in views]
        launches.append(Launch(name, node.scope, tuple((parameters.get(one, ""), sizes[one]) for one in tensors),
                               items.get(node.name, sizes[node.name])))
    return Launches(tuple(launches), tuple(refused))


def operator_name(node: Any) -> str:
    """The operator of a node: of a custom one, the function behind the colon of its library."""
    if node.op_type != "Custom":
        return node.op_type
    name = next((one.value.str_val for one in node.attribute if one.name == "func_name"), "Custom")
    name = name.rsplit(":", 1)[-1]
    return {"GroupedMatmul": "GroupedMatmulV4", "Product": "MatMul",
            "FlashAttentionScoreBSH": "FlashAttentionScore"}.get(name, name)


def _leaves(name, made):
    """The tensors behind an input: a tuple's members, else itself; what only orders has none."""
    node = made.get(name)
    if node is None:
        return [name]
    if node.op_type == "MakeTuple":
        return [leaf for one in node.input for leaf in _leaves(one.name, made)]
    return [] if node.op_type == "UpdateState" else [name]


def _size(kind):
    """Bytes of a tensor type; 0 for everything else."""
    if _kind(kind) != "DT_TENSOR":
        return 0.0
    element = anf_ir_pb2.DataType.Name(kind.tensor_type.elem_type).removeprefix("DT_")
    if element not in _BYTES:
        raise KernelError(f"a tensor of the graph has element type {element}, expected one of {', '.join(_BYTES)}")
    return math.prod(dim.size for dim in kind.tensor_type.shape.dim) * float(_BYTES[element])


def _kind(kind):
    return anf_ir_pb2.DataType.Name(kind.data_type)
