"""The graphs of a device step as Ascend's front end makes them, every token and row dimension unknown; for
faked_ascend.py."""
import os
from collections import Counter

import mindspore as ms
from mindspore.common.api import _cell_graph_executor
from mindspore.train.mind_ir_pb2 import ModelProto

from colora_ms.adapters import LoraConfig, inject
from colora_ms.decoding.device_step import DeviceGraphs
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder
from colora_ms.models.device_decoder import DeviceDecoder
from colora_ms.models.device_form import cache_form


def operators_of(cell):
    """{operator: times} of a Cell that is compiled for the inputs that it was set to, and how many inputs the nodes of
    custom operators have."""
    phase = _cell_graph_executor.compile(cell, *cell.get_inputs(), phase=f"export.mindir.{id(cell)}", do_convert=False)
    model = ModelProto()
    model.ParseFromString(_cell_graph_executor._get_func_graph_proto(cell, phase[0], "mind_ir"))
    found = Counter(node.op_type.split("::")[-1].split(":")[0] for graph in (model.graph, *model.functions)
                    for node in graph.node)
    inputs = [len(node.input) for graph in (model.graph, *model.functions) for node in graph.node
              if node.op_type.startswith("REF::Custom")]
    return {**{name: count for name, count in found.items() if name[:1].isupper()}, "custom inputs": sorted(inputs)}


def step_graphs():
    """{dtype: {phase: (operators with adapters, without)}}, and the form of the cache."""
    found = {}
    decoder = Decoder(DecoderConfig("llama", 100, 64, 96, 2, 4, 2, 32, 128))
    inject(decoder, LoraConfig(r=40, target_modules="all-linear"), slots=2)  # q, k, v: grouped
    for dtype in ("bfloat16", "float16"):
        os.environ["COLORA_ASCEND_DTYPE"] = dtype
        form = cache_form(decoder)
        cache = form.make(decoder.config, 2)
        graphs = DeviceGraphs(DeviceDecoder(decoder, form.dtype(None)), cache)
        found[dtype] = {phase: [operators_of(graphs.step(phase, adapters)) for adapters in (True, False)]
                        for phase in ("prefill", "increment")}
        found[dtype]["cache"] = [list(cache.keys[0].shape), str(cache.dtype), str(form.dtypes[0] == getattr(ms, dtype))]
        found[dtype]["graphs"] = len(graphs.steps)
    decoder = Decoder(DecoderConfig("qwen2_moe", 100, 64, 96, 1, 4, 2, 32, 128, attention_bias=True, experts=5,
                                    experts_per_token=2, expert_size=48, shared_size=40, normalised_experts=True))
    form = cache_form(decoder)
    graphs = DeviceGraphs(DeviceDecoder(decoder, form.dtype(None)), form.make(decoder.config, 2))
    found["experts"] = {phase: operators_of(graphs.step(phase, False)) for phase in ("prefill", "increment")}
    return found
