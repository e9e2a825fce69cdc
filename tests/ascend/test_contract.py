"""Packaging: names, order, dtypes and attributes agree between OpDef, op-info JSON, aclnn header, the kernels'
arguments, the tiling structs and colora_ms/kernels/ascend.py, with MindSpore's own CustomInfoGenerator as the
reader."""
import ctypes
import re
import subprocess
import sys

import numpy as np
import pytest

from emulated import FIELDS, ROOT, build, load_module, plan_lily_mix, plan_lora, plan_multi_lora

ASCEND = ROOT / "ops" / "ascend"
contract = load_module(ASCEND / "contract.py", "ascend_contract")
stage = load_module(ASCEND / "stage.py", "ascend_stage")
DEFINITIONS = {d["name"]: d for d in contract.definitions()}


def test_every_operator_is_complete():
    assert sorted(contract.snake(name) for name in DEFINITIONS) == sorted(stage.OPERATORS) == sorted(build.KERNELS)
    for name in stage.OPERATORS:
        for part in ("def.cpp", "tiling.h", "tiling.cpp", "proto.cpp"):
            assert (ASCEND / name / "op_host" / f"{name}_{part}").is_file()
        assert build.kernel_source(name).is_file()


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_kernel_takes_the_arguments_of_its_definition(name):
    d, snake = DEFINITIONS[name], contract.snake(name)
    text = build.kernel_source(snake).read_text()
    arguments = re.search(r"__aicore__ void %s\((.*?)\)" % snake, text, re.S).group(1)
    found = [contract.snake(a.split()[-1]) for a in arguments.split(",")]
    assert found == [n for n, *_ in d["inputs"] + d["outputs"]] + ["workspace", "tiling"]
    used = set(re.findall(r"DTYPE_(\w+)", text))
    assert used and used <= {n.upper() for n, *_ in d["inputs"]}, "CANN defines DTYPE_<INPUT> for the inputs alone"
    assert d["units"] == ["ascend910b", "ascend910_93"]


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_kernels_that_meet_are_launched_together(name):
    """SyncAll needs the kernel type with hardware synchronisation (and schedule mode 1: test_host.py runs the
    tiling)."""
    text = build.kernel_source(contract.snake(name)).read_text()
    assert ("KERNEL_TYPE_MIX_AIV_1_0" in text) == ("SyncAll()" in text)


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_tiling_struct_is_the_shared_one(name):
    """The struct that CANN copies to the device has the fields of the CANN-free one, in its order (that all are set:
    test_host.py)."""
    snake = contract.snake(name)
    header, struct = build.KERNELS[snake]
    core = re.search(r"struct %s \{(.*?)\};" % struct.split("::")[1], (ASCEND / header).read_text(), re.S).group(1)
    fields = re.findall(r"(uint32_t) (\w+);", core)
    host = (ASCEND / snake / "op_host" / f"{snake}_tiling.h").read_text()
    assert re.findall(r"TILING_DATA_FIELD_DEF\((\w+), (\w+)\);", host) == fields
    assert f"REGISTER_TILING_DATA_CLASS({name}, {name}TilingData)" in host
    if name not in ("ContrastiveSelect", "MultiLora"):  # the others share the LoRA phases, which read these
        assert tuple(f for _, f in fields)[:len(FIELDS)] == FIELDS


def test_staged_project(tmp_path):
    """Flat op_host and op_kernel folders in which every quoted include is found (CANN's own headers apart)."""
    files = stage.stage(tmp_path)
    for side, names in files.items():
        for file in names:
            for include in re.findall(r'#include "(.+?)"', (tmp_path / side / file).read_text()):
                known = include in names or include == "kernel_operator.h"
                assert known or include.startswith(("register/", "tiling/")), include


def test_mindspore_reads_what_python_registers(tmp_path, monkeypatch):
    pytest.importorskip("mindspore")
    from mindspore.ops.operations import _custom_ops_utils as utils

    from colora_ms.kernels import ascend
    from tests.fake_chip import Chip

    contract.write(tmp_path)
    monkeypatch.setenv("ASCEND_CUSTOM_OPP_PATH", str(tmp_path))
    monkeypatch.setattr(utils, "MSContext", Chip)
    assert set(ascend.OPERATORS) == set(DEFINITIONS)
    for name, spec in ascend.OPERATORS.items():
        reader = utils.CustomInfoGenerator(f"aclnn{name}")
        theirs, ours = reader.generate_custom_reg_op(), ascend.registration(name)
        for side in ("inputs", "outputs"):
            assert [(t["index"], t["name"], t["paramType"]) for t in theirs[side]] == \
                [(t["index"], t["name"], t["paramType"]) for t in ours[side]], name
        assert theirs["dtype_format"] == ours["dtype_format"]
        assert [(a["name"], a["type"], a["paramType"]) for a in theirs["attr"]] == \
            [(a["name"], a["type"], a["paramType"]) for a in ours["attr"]]
        assert [(n, k) for n, _, k, _ in DEFINITIONS[name]["attributes"]] == spec["attributes"]
        types = utils.CustomInfoGenerator(f"aclnn{name}").get_aclnn_api_types()
        kinds = {"int": "int64_t", "bool": "bool"}
        assert types == ["aclTensor*"] * len(spec["inputs"]) + [kinds[k] for _, k in spec["attributes"]] \
            + ["aclTensor*"] * len(spec["outputs"]) + ["uint64_t*", "aclOpExecutor**"]
        code = utils.CustomCodeGenerator().generate_callback_by_types(f"aclnn{name}", ours, types)
        assert f"aclnn{name}" in code


def test_the_form_of_the_files_is_that_of_a_real_package():
    """Our generator's keys are those of the package that MindSpore ships compiled."""
    import importlib.util
    import json
    from pathlib import Path

    found = importlib.util.find_spec("mindspore")
    real = Path(found.origin).parent / "lib/plugin/ascend/custom_ascendc_910b" if found else Path("/nowhere")
    if not real.is_dir():
        pytest.skip("the installed mindspore ships no compiled custom operator")
    config = real / "op_impl/ai_core/tbe/config/ascend910b"
    info = json.loads((config / "aic-ascend910b-ops-info.json").read_text())["AllFinite"]
    ours = contract.op_info(DEFINITIONS["MultiLora"])
    assert set(ours["input0"]) <= set(info["input0"]) and set(ours) - set(info) <= {
        *(f"input{i}" for i in range(9)), "attr", "attr_exact"}


# ---- tiling arithmetic, on the host
# -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    text = '''#include "lily_mix/op_host/lily_mix_tiling_core.h"
#include "multi_lora/op_host/multi_lora_tiling_core.h"
extern "C" __attribute__((visibility("default"))) int plan(const unsigned* a, unsigned* out, unsigned long long* ws) {
    const colora::LoraPlan p =
        colora::plan_lora(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
    __builtin_memcpy(out, &p.data, sizeof(p.data));
    *ws = p.workspace;
    return p.error.empty() ? 0 : 1;
}
extern "C" __attribute__((visibility("default")))
int plan_multi(const unsigned* a, unsigned* out, unsigned long long* ws) {
    const colora::MultiLoraPlan p = colora::plan_multi_lora(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
    __builtin_memcpy(out, &p.data, sizeof(p.data));
    *ws = p.workspace;
    return p.error.empty() ? 0 : 1;
}
extern "C" __attribute__((visibility("default")))
int plan_mix(const unsigned* a, unsigned* out, unsigned long long* ws) {
    const colora::LilyMixPlan p =
        colora::plan_lily_mix(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
    __builtin_memcpy(out, &p.data, sizeof(p.data));
    *ws = p.workspace;
    return p.error.empty() ? 0 : 1;
}'''
    return ctypes.CDLL(str(build.compile_units({"plan.cpp": text}, tmp_path_factory.mktemp("plan") / "plan.so", "-O0")))


def plan(planner, *values, function="plan", fields=len(FIELDS)):
    out, workspace = np.zeros(fields, np.uint32), ctypes.c_ulonglong()
    failed = getattr(planner, function)(np.array(values, np.uint32).ctypes.data_as(ctypes.c_void_p),
                                        out.ctypes.data_as(ctypes.c_void_p), ctypes.byref(workspace))
    return failed, out, workspace.value


def test_plan_is_what_the_tests_assume(planner):
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens, hidden, rank, width, cores = (int(rng.integers(a, b))
                                              for a, b in ((0, 500), (1, 12000), (1, 257), (1, 12000), (1, 65)))
        exact = bool(rng.integers(2))
        dtype = ("float16", "bfloat16", "float32")[rng.integers(3)]
        failed, out, workspace = plan(planner, tokens, hidden, rank, width, width + 5, 2, 4, cores,
                                      4 if dtype == "float32" else 2, dtype == "float16", exact)
        want, scratch = plan_lora(tokens, hidden, rank, width, dtype, cores, width + 5, 2, 4, exact)
        assert not failed and np.array_equal(out, want) and workspace == scratch.nbytes


def test_plans_of_the_others_are_what_the_tests_assume(planner):
    rng = np.random.default_rng(1)
    for _ in range(300):
        tokens, rank, width, cores, slots = (int(rng.integers(a, b))
                                             for a, b in ((0, 90), (1, 257), (1, 12000), (1, 65), (1, 9)))
        exact, dtype = bool(rng.integers(2)), ("float16", "bfloat16", "float32")[rng.integers(3)]
        hidden, slices = int(rng.integers(1, 12000)), int(rng.integers(1, min(8, 512 // rank) + 1))
        form = (4 if dtype == "float32" else 2, dtype == "float16", exact)
        failed, out, workspace = plan(planner, tokens, hidden, slices * rank, rank, width, slots, slices, cores,
                                      form[0], function="plan_multi", fields=12)
        want, scratch = plan_multi_lora(tokens, hidden, rank, width, dtype, cores, slots, slices)
        assert not failed and np.array_equal(out, want) and workspace == scratch.nbytes
        experts = int(rng.integers(1, 16))
        failed, out, workspace = plan(planner, tokens, experts, rank, width, width + 3, 1, slots, cores, *form,
                                      function="plan_mix",
                                      fields=13)
        want, scratch = plan_lily_mix(tokens, experts, rank, width, dtype, cores, width + 3, 1, slots, exact)
        assert not failed and np.array_equal(out, want) and workspace == scratch.nbytes


def test_plans_of_the_others_refuse(planner):
    good = {"plan_multi": [4, 64, 16, 8, 64, 2, 2, 48, 2], "plan_mix": [4, 4, 8, 64, 64, 0, 2, 48, 2, 1, 0]}
    bad = {"plan_multi": ((1, 0), (2, 8), (3, 0), (3, 257), (4, 0), (5, 0), (6, 0), (6, 9), (7, 65)),
           "plan_mix": ((1, 0), (1, 400), (2, 0), (3, 65), (5, 1), (7, 0))}
    for function, values in good.items():
        assert plan(planner, *values, function=function, fields=16)[0] == 0
        for place, value in bad[function]:
            changed = list(values)
            changed[place] = value
            assert plan(planner, *changed, function=function, fields=16)[0] == 1, (function, place, value)


def test_plan_refuses(planner):
    good = [4, 64, 8, 64, 64, 0, 2, 48, 2, 1, 0]
    assert plan(planner, *good)[0] == 0
    for place, value in ((1, 0), (2, 0), (2, 257), (3, 0), (5, 1), (6, 0), (7, 0), (7, 65)):
        bad = list(good)
        bad[place] = value
        assert plan(planner, *bad)[0] == 1, (place, value)


def test_build_says_what_is_missing(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "ASCEND_HOME_PATH": str(tmp_path / "none")}
    for path, text in ((tmp_path / "none", "is no folder"), (tmp_path, "operator project template")):
        environment["ASCEND_HOME_PATH"] = str(path)
        done = subprocess.run(["bash", str(ASCEND / "build.sh"), str(tmp_path / "out")], env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 1 and text in done.stderr and done.stderr.count("\n") == 1
    assert sys.version_info >= (3, 9)
