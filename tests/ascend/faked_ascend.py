"""Run by test_call_protocol.py in a fresh process: MindSpore's device target faked as Ascend, the package's files as a
build registers them. Nothing is compiled or launched for a device; graphs go as far as the front end's export.

    python faked_ascend.py FOLDER        # with op_api and op_impl of contract.write; prints one JSON object
"""
import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path

FOLDER = Path(sys.argv[1])
os.environ["ASCEND_CUSTOM_OPP_PATH"] = str(FOLDER)
os.environ["MS_COMPILER_CACHE_PATH"] = str(FOLDER / "cache")
os.environ.pop("COLORA_KERNELS", None)

import mindspore as ms  # noqa: E402
from mindspore import context, ops  # noqa: E402
from mindspore.common.api import _cell_graph_executor  # noqa: E402
from mindspore.ops.operations import _custom_ops_utils, custom_ops  # noqa: E402
from mindspore.train.mind_ir_pb2 import ModelProto  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_chip import Chip  # noqa: E402

real_context, made = context.get_context, []


def faked_context(key):
    return "Ascend" if key == "device_target" else real_context(key)


def recorded(self, func, *arguments, init=ops.Custom.__init__, **options):
    made.append(str(func))
    init(self, func, *arguments, **options)


context.get_context = ms.get_context = faked_context
_custom_ops_utils.MSContext = Chip
custom_ops._compile_aot = lambda path: path  # the callback needs CANN's headers
ops.Custom.__init__ = recorded

import colora_ms  # noqa: E402, F401
from colora_ms.kernels import ascend, backend, bound, registry  # noqa: E402

for module in pkgutil.walk_packages(colora_ms.__path__, "colora_ms."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
at_import = list(made)
ms.set_context(mode=ms.GRAPH_MODE)
bound_to = backend()
at_binding = list(made)


def inputs_of(name, dtype, dynamic):
    """Tensors for a call of an operator; with dynamic, every axis is unknown while the graph is compiled."""
    size = {"tokens": 6, "in": 64, "rank": 8, "out": 48, "slots": 3, "experts": 4, "vocab": 100}
    shapes = {
        "MultiLora": ("tokens in", (3, 16, 64), "slots rank out", (3, 2), "tokens", "tokens out", 2),
        "LoraShrink": ("tokens in", "slots rank in", "slots", "tokens"),
        "LoraExpand": ("tokens rank", "slots rank out", "tokens", "tokens out"),
        "ContrastiveSelect": ("tokens vocab", (3, 2), (3, 2), (3,)),
        "LilyMix": ("tokens rank", "tokens experts", "slots experts rank out", "slots", "tokens", "tokens out"),
    }[name]
    k = ("float16", "bfloat16", "float32").index(dtype)
    for shape, (_, types, _) in zip(shapes, ascend.OPERATORS[name]["inputs"]):
        if isinstance(shape, str):
            shape = tuple(size[axis] for axis in shape.split())
        shape = shape if isinstance(shape, tuple) else (shape,)
        yield ms.Tensor(shape=[None] * len(shape) if dynamic else shape, dtype=getattr(ms, types[k]),
                        init=None if dynamic else ms.common.initializer.Zero())


#: operator -> its face, and the order in which that takes the operator's inputs.
FACES = {
    "MultiLora": (ascend.multi_lora, (0, 4, 1, 2, 3, 5, 6)),
    "LoraShrink": (ascend.lora_shrink, (0, 3, 1, 2)),
    "LoraExpand": (ascend.lora_expand, (0, 2, 1, 3)),
    "ContrastiveSelect": (ascend.contrastive_token, (0, 1, 2, 3)),
    "LilyMix": (ascend.lily_mix, (0, 1, 4, 2, 3, 5)),
}


class Face(ms.nn.Cell):
    """A call as a layer makes it."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def construct(self, *given):
        return self.run(*given)


class Call(ms.nn.Cell):
    """A call of the primitive itself, with every attribute."""

    def __init__(self, name, attributes):
        super().__init__()
        self.run, self.attributes = ascend.primitive(name), attributes

    def construct(self, *given):
        return self.run(*given, *self.attributes)


def nodes(cell, inputs):
    """The Custom nodes of a compiled graph: [number of inputs]."""
    phase = _cell_graph_executor.compile(cell, *inputs, phase=f"export.mindir.{id(cell)}", do_convert=False)[0]
    model = ModelProto()
    model.ParseFromString(_cell_graph_executor._get_func_graph_proto(cell, phase, "mind_ir"))
    return [len(node.input) for node in model.graph.node if node.op_type.startswith("REF::Custom")]


operators = {}
for name, spec in ascend.OPERATORS.items():
    values = {"bool": True, "int": 3, "float": 0.5}
    attributes = tuple(values[kind] for _, kind in spec["attributes"])
    found = {"face": [], "dynamic": []}
    for dtype in ("float16", "bfloat16", "float32"):
        face, order = FACES[name]
        given = [one.init_data() for one in inputs_of(name, dtype, False)]
        found["face"] += nodes(Face(face), [given[i] for i in order])
        given = list(inputs_of(name, dtype, True))
        cell = Call(name, attributes)
        cell.set_inputs(*given)
        found["dynamic"] += nodes(cell, given)
    # A caller that forgets the attributes: what test_call_protocol.py must be able to see.
    cell = Call(name, ())
    cell.set_inputs(*given)
    found["forgotten"] = nodes(cell, given)
    operators[name] = {**found, "types": list(ascend.primitive(name).get_attr_dict()["custom_inputs_type"]),
                       "outputs": len(spec["outputs"])}

from colora_ms.adapters import LoraConfig, inject  # noqa: E402
from colora_ms.models.config import DecoderConfig  # noqa: E402
from colora_ms.models.decoder import Decoder  # noqa: E402

decoder = Decoder(DecoderConfig("llama", 100, 64, 96, 2, 4, 2, 16, 128))
ids = [ms.Tensor([[1, 2, 3, 4]], ms.int32), ms.Tensor([4], ms.int32), ms.Tensor([-1], ms.int32)]
plain = nodes(decoder, ids)
inject(decoder, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
adapted = nodes(decoder, ids)

from faked_step import step_graphs  # noqa: E402

print(json.dumps({"step": step_graphs(), "at_import": at_import, "at_binding": at_binding, "made": made,
                  "backend": bound_to,
                  "faces": sorted(set(ascend._FACES) - set(vars(bound))), "operators": operators,
                  "plain": plain, "adapted": adapted, "bound": registry.bind().backend}))
