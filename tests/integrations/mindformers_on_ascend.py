"""Run by test_mindformers_on_ascend in a fresh process: mindformers' linears with an adapter, the target faked as
Ascend, graphs as far as the front end goes. Prints a JSON object.

    mindformers_on_ascend.py FOLDER        # with op_api and op_impl as ops/ascend/contract.py writes them
"""
import json
import os
import sys
from pathlib import Path

FOLDER = Path(sys.argv[1])
os.environ["ASCEND_CUSTOM_OPP_PATH"] = str(FOLDER)
os.environ["MS_COMPILER_CACHE_PATH"] = str(FOLDER / "cache")
os.environ["LOCAL_DEFAULT_PATH"] = str(FOLDER / "logs")
os.environ.pop("COLORA_KERNELS", None)
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402

import mindformers  # noqa: E402, F401
import mindspore as ms  # noqa: E402
from mindspore import Tensor, context, nn, ops  # noqa: E402
from mindspore.common.api import _cell_graph_executor  # noqa: E402
from mindspore.ops.operations import _custom_ops_utils, custom_ops  # noqa: E402

import test_mindformers_cells as linears  # noqa: E402
from colora_ms.adapters import LoraConfig, inject  # noqa: E402
from fake_chip import Chip  # noqa: E402

real = context.get_context


context.get_context = ms.get_context = lambda key: "Ascend" if key == "device_target" else real(key)
_custom_ops_utils.MSContext = Chip
custom_ops._compile_aot = lambda path: path
ms.set_context(mode=ms.GRAPH_MODE)

from colora_ms.kernels import backend  # noqa: E402


class Gradient(nn.Cell):
    def __init__(self, net):
        super().__init__()
        self.net, self.weights = net, ms.ParameterTuple(net.trainable_params())
        self.gradient = ops.GradOperation(get_by_list=True)

    def construct(self, x):
        return self.gradient(self.net, self.weights)(x)


def graph(cell, x):
    """Compile without choosing kernels, which are those of the CPU here."""
    _cell_graph_executor.compile(cell, x, phase=f"export.mindir.{id(cell)}", do_convert=False)


def main():
    failed, count = [], 0
    for name, build, options in {name: case for case in reversed(linears.CASES) for name in (case[0],)}.values():
        dtype = ms.bfloat16
        kinds = dict(compute_dtype=dtype, param_init_type=dtype) if build is linears.legacy else \
            dict(params_dtype="bfloat16", compute_dtype="bfloat16")
        net = linears.holder(build(**{**options, **kinds}))
        inject(net, LoraConfig(r=2, target_modules="all-linear"))
        # Whole rows as in training and (tokens, width) as in the paged generation.
        for train, shape in ((True, (2, 3, linears.IN)), (False, (6, linears.IN))):
            count += 1
            net.set_train(train)
            try:
                graph(Gradient(net) if train else net, Tensor(np.ones(shape, np.float32)).astype(dtype))
            except Exception as problem:
                failed.append(f"{name} {options} {shape} train={train}: {type(problem).__name__}: {problem}"[:300])
    from mindspore._c_expression import ms_ctx_param

    left = [context._context().get_param(getattr(ms_ctx_param, one)) for one in ("infer_boost", "jit_syntax_level")]
    print(json.dumps({"backend": backend(), "failed": failed, "graphs": count, "left": left}))


if __name__ == "__main__":
    main()
