"""How an aclnn operator must be called on Ascend, held to the graphs' own nodes with the device target faked, and what
import and construction do there. The script is faked_ascend.py, run once in a fresh process."""
import collections
import json
import os
import subprocess
import sys

import pytest

from emulated import ROOT, load_module

pytest.importorskip("mindspore")
from colora_ms.kernels import ascend  # noqa: E402
from colora_ms.kernels.ascend_shapes import SHAPES  # noqa: E402

HERE = ROOT / "tests" / "ascend"


@pytest.fixture(scope="module")
def faked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    load_module(ROOT / "ops" / "ascend" / "contract.py", "ascend_contract").write(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                   "GLOG_v": "3"}
    done = subprocess.run([sys.executable, str(HERE / "faked_ascend.py"), str(folder)], env=environment, cwd=folder,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", sorted(ascend.OPERATORS))
def test_inputs_and_outputs_of_a_call_are_the_types_of_the_header(faked, name):
    """MindSpore's kernel for aclnn operators throws otherwise: "inputs type size ... is exceeds I/O size"."""
    entry = faked["operators"][name]
    inputs, attributes = (len(ascend.OPERATORS[name][part]) for part in ("inputs", "attributes"))
    assert len(entry["types"]) == inputs + attributes + entry["outputs"]
    for form in ("face", "dynamic"):
        assert entry[form] == [len(entry["types"]) - entry["outputs"]] * 3, form
    # Without its attributes the call is seen to be short: the graph's front end alone does not refuse it.
    assert entry["forgotten"] == [len(entry["types"]) - entry["outputs"] - attributes]
    kinds = {"bool": "bool", "int": "int64_t", "float": "double"}
    assert entry["types"][inputs:inputs + attributes] == [kinds[kind] for _, kind in
                                                          ascend.OPERATORS[name]["attributes"]]


def test_import_constructs_nothing_and_binding_only_the_device_s(faked):
    """Every module was imported; an ops.Custom for the CPU library cannot even be constructed on Ascend."""
    assert faked["at_import"] == []
    assert faked["backend"] == faked["bound"] == "ascend" and faked["faces"] == []
    assert sorted(faked["at_binding"]) == sorted(f"aclnn{name}" for name in ascend.OPERATORS)
    assert faked["made"] == faked["at_binding"]  # also after a Decoder was constructed and its graph compiled


def test_the_graph_of_a_decoder(faked):
    """Whole rows are computed by built-in products, which have gradients; what a step calls of ours stands below."""
    assert faked["plain"] == [] and faked["adapted"] == []


def test_at_most_one_attribute_of_a_type():
    """MindSpore keeps their values in one vector for each C type, and pointers into it: growth between two would leave
    one dangling (custom_v2_aclnn_kernel.cc)."""
    for name, spec in ascend.OPERATORS.items():
        kinds = collections.Counter(kind for _, kind in spec["attributes"])
        assert set(kinds) <= {"int", "bool", "float"} and all(n == 1 for n in kinds.values()), name


def test_attributes_have_no_value_at_registration():
    """With a value there, MindSpore would not take them as inputs of the call."""
    for name, spec in ascend.OPERATORS.items():
        registered = ascend.registration(name)["attr"]
        assert [(a["name"], a["type"]) for a in registered] == spec["attributes"]
        assert all(a.get("value") is None for a in registered), name


SIZES = {"MultiLora": ([7, 64], [3, 16, 64], [3, 8, 48], [3, 2], [7], [7, 48], [2]),
         "LoraShrink": ([7, 64], [3, 8, 64], [3], [7]), "LoraExpand": ([7, 8], [3, 8, 48], [7], [7, 48]),
         "ContrastiveSelect": ([9, 100], [7, 3], [7, 3], [7]),
         "LilyMix": ([7, 8], [7, 4], [3, 4, 8, 48], [3], [7], [7, 48])}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_inference_takes_unknown_dimensions(name):
    """Graphs with dynamic shapes run on Ascend: there an axis is -1 while they are compiled."""
    def flat(*shapes):
        out = SHAPES[name](*shapes)
        return [axis for one in (out if isinstance(out, tuple) else (out,)) for axis in one]

    known, want = SIZES[name], flat(*SIZES[name])
    for i, shape in enumerate(known):
        for axis in range(len(shape)):
            given = [list(one) for one in known]
            given[i][axis] = -1
            assert all(a in (b, -1) for a, b in zip(flat(*given), want)), (i, axis)
    assert len(flat(*[[-1] * len(shape) for shape in known])) == len(want)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_the_graphs_of_a_device_step(faked, dtype):
    """Four at most, with unknown dimensions: the real operators' own inference takes every call of them."""
    found = faked["step"][dtype]
    assert found["graphs"] == 4 and found["cache"] == [[2, 128, 2, 32], {"bfloat16": "BFloat16",
                                                                        "float16": "Float16"}[dtype], "True"]
    for phase, attention in (("prefill", "FlashAttentionScore"), ("increment", "PagedAttention")):
        adapted, plain = found[phase]
        for one in (adapted, plain):
            counts = {name: one.get(name) for name in (attention, "ReshapeAndCache", "ApplyRotaryPosEmb", "AddRmsNorm",
                                                       "RmsNorm", "Swiglu", "SplitWithSize")}
            assert counts == {attention: 2, "ReshapeAndCache": 2, "ApplyRotaryPosEmb": 2, "AddRmsNorm": 4, "RmsNorm": 1,
                              "Swiglu": 2, "SplitWithSize": 2}
            assert not {"Transpose", "StridedSlice", "Concat"} & set(one) and one["Cast"] == 1
        lora, choice = (len(faked["operators"][name]["types"]) - faked["operators"][name]["outputs"]
                        for name in ("MultiLora", "ContrastiveSelect"))
        assert plain["custom inputs"] == [choice]
        assert adapted["custom inputs"] == sorted([choice] + ([lora] * 8 if phase == "increment" else []))
        counts = [[one.get(name, 0) for name in ("MatMul", "GroupedMatmulV4", "Select", "Equal", "Add")]
                  for one in (adapted, plain)]
        # q, k and v are grouped; the three other linears of a layer masked, with masks of two widths.
        assert counts == [[9 + 12, 4, 6, 2, 8] if phase == "prefill" else [9, 0, 0, 0, 0], [9, 0, 0, 0, 0]]


def test_the_graphs_of_a_device_step_with_experts(faked):
    """The token dimension is unknown to MindSpore's inference of the operators around the experts, too."""
    for found in faked["step"]["experts"].values():
        counts = {name: found.get(name) for name in ("NanToNum", "MoeGatingTopKSoftmax", "SumExt", "Div",
                                                     "MoeInitRoutingV2", "InnerMoeTokenUnpermute", "Sigmoid", "Mul")}
        assert set(counts.values()) == {1}, counts
        assert found["GroupedMatmulV4"] == 2 and found["Swiglu"] == 2 and found["Cast"] == 5
        assert not {"Transpose", "StridedSlice", "Concat"} & set(found)
