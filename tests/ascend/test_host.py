"""The op_host sources, compiled as CANN's project compiles them (C++11) against a stand-in for its headers
(cann_host.h) and run: what they register, tile and infer."""
import ctypes
import json
import subprocess

import numpy as np
import pytest

from emulated import ROOT, build, load_module, plan_lily_mix, plan_lora, plan_w4_lora

HERE = ROOT / "tests" / "ascend"
ASCEND = ROOT / "ops" / "ascend"
contract = load_module(ASCEND / "contract.py", "ascend_contract")
stage = load_module(ASCEND / "stage.py", "ascend_stage")
HEADERS = ("register/op_def_registry.h", "register/tilingdata_base.h", "tiling/platform/platform_ascendc.h")
CODES = {"float32": 0, "float16": 1, "int32": 3, "uint8": 4, "bfloat16": 27}
SYSTEM_WORKSPACE = 16 * 1024 * 1024  # of the stand-in


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("op_host")
    sources = [folder / "op_host" / name for name in stage.stage(folder)["op_host"] if name.endswith(".cpp")]
    for header in HEADERS:
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).write_text(f'#include "{HERE / "cann_host.h"}"\n')
    library = folder / "host.so"
    everything = folder / "everything.cpp"  # one unit: the stand-in's headers are read once
    everything.write_text("".join(f'#include "{source}"\n' for source in [*sources, HERE / "cann_host.cpp"]))
    done = subprocess.run([build.compiler(), "-std=c++11", "-O0", "-Wall", "-Wextra", "-Werror",
                           "-Wno-missing-field-initializers",
                           "-fPIC", "-shared", f"-I{folder}", f"-I{folder / 'op_host'}", f"-I{HERE}", str(everything),
                           "-o",
                           str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    loaded.host_registered.restype = ctypes.c_char_p
    return loaded


def operands(tensors):
    """[(shape, dtype)] -> the leading arguments of host_tiling and host_infer."""
    ranks = np.array([len(shape) for shape, _ in tensors], np.int64)
    dims = np.array([d for shape, _ in tensors for d in shape], np.int64)
    types = np.array([CODES[dtype] for _, dtype in tensors], np.int32)
    return [ctypes.c_int(len(tensors))] + [a.ctypes.data_as(ctypes.c_void_p)
                                           for a in (ranks, dims, types)], (ranks, dims, types)


def tile(host, name, tensors, exact=False, cores=48):
    """None where the tiling function refuses, else (tiling data, {blocks, schedule, workspace})."""
    arguments, alive = operands(tensors)
    data, facts = np.zeros(64, np.uint32), np.zeros(5, np.uint64)
    failed = host.host_tiling(name.encode(), *arguments, ctypes.c_int(exact),
                              ctypes.c_uint32(cores),
                              data.ctypes.data_as(ctypes.c_void_p), facts.ctypes.data_as(ctypes.c_void_p))
    del alive
    if failed:
        return None
    size, blocks, schedule, workspace, number = (int(f) for f in facts)
    assert size % 4 == 0 and number == 1
    return data[:size // 4], {"blocks": blocks, "schedule": schedule, "workspace": workspace - SYSTEM_WORKSPACE}


def lora_operands(name, tokens, hidden, rank, width, row, slots, segments, dtype):
    x, y = ((tokens, hidden), dtype), ((tokens, row), dtype)
    down, up = ((slots, rank, hidden), dtype), ((slots, rank, width), dtype)
    scale, each = ((slots,), "float32"), ((tokens,), "int32")
    return {
        "MultiLora": [x, down, up, scale, each, y],
        "MultiLoraSegments": [x, down, up, scale, ((segments + 1,), "int32"), ((segments,), "int32"), y],
        "LoraShrink": [x, down, scale, each],
        "LoraExpand": [((tokens, rank), "float32"), up, each, y],
    }[name]


def test_registers_what_the_contract_reads(host):
    """The compiled definitions say what contract.py finds in their text."""
    registered = json.loads(host.host_registered())
    read = {d["name"]: d for d in contract.definitions()}
    assert set(registered) == set(read)
    for name, entry in registered.items():
        assert entry["complete"] and entry["tiling_classes"] == 1, name
        for side in ("inputs", "outputs"):
            assert [(n, p, t) for n, p, t, _, _ in entry[side]] == [(n, p, t) for n, p, t in read[name][side]]
            assert all(len(t) == formats == unknown for _, _, t, formats, unknown in entry[side])
        assert [tuple(a) for a in entry["attributes"]] == [
            (n, p, k, {"true": 1, "false": 0}[v] if k == "bool" else int(v)) for n, p, k, v in read[name]["attributes"]]
        assert entry["units"] == read[name]["units"]


@pytest.mark.parametrize("name", ["MultiLora", "MultiLoraSegments", "LoraShrink", "LoraExpand"])
def test_lora_tiling(host, name):
    """Every size reaches its own field: all sizes differ, against the plan that the emulator tests run with."""
    rng = np.random.default_rng(1)
    meets = "SyncAll()" in build.kernel_source(contract.snake(name)).read_text()
    for dtype in ("float16", "bfloat16", "float32"):
        for tokens, hidden, rank, width, exact in ((0, 64, 1, 8, False), (1, 4096, 16, 11008, True),
                                                   (7, 1000, 24, 576, False)):
            row, slots, segments, cores = width + 30, 5, 3, int(rng.integers(1, 65))
            tensors = lora_operands(name, tokens, hidden, rank, width, row, slots, segments, dtype)
            got, facts = tile(host, name, tensors, exact, cores)
            sizes = {"LoraShrink": (tokens, hidden, rank, 1), "LoraExpand": (tokens, 1, rank, width)}.get(
                name, (tokens, hidden, rank, width))
            rest = {"row_width": 1, "exact": False} if name == "LoraShrink" else {"row_width": row, "exact": exact}
            want, scratch = plan_lora(*sizes, dtype, cores, slots=slots, **rest,
                                      segments=segments if name == "MultiLoraSegments" else 0)
            assert np.array_equal(got, want), (dtype, tokens)
            assert facts == {"blocks": cores, "schedule": int(meets), "workspace": scratch.nbytes}


def w4_operands(tokens, hidden, rank, width, slots, groups, dtype):
    scales = (width,) if groups == 0 else (width, groups)
    return [((tokens, hidden), dtype), ((width, hidden // 2), "uint8"), (scales, "float32"),
            ((slots, rank, hidden), dtype),
            ((slots, rank, width), dtype), ((slots,), "float32"), ((tokens,), "int32")]


def mix_operands(tokens, experts, rank, width, row, slots, dtype):
    return [((tokens, rank), "float32"), ((tokens, experts), "float32"), ((slots, experts, rank, width), dtype),
            ((slots,), "float32"), ((tokens,), "int32"), ((tokens, row), dtype)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tiling_of_w4_lora_and_lily_mix(host, dtype):
    for tokens, hidden, rank, width, slots, groups, exact in ((0, 64, 1, 8, 2, 0, False),
                                                              (33, 4096, 16, 1100, 3, 32, True)):
        got, facts = tile(host, "W4Lora", w4_operands(tokens, hidden, rank, width, slots, groups, dtype), exact=exact,
                          cores=40)
        want, scratch = plan_w4_lora(tokens, hidden, rank, width, dtype, groups or 1, 40, slots, exact)
        assert np.array_equal(got, want) and facts == {"blocks": 40, "schedule": 1, "workspace": scratch.nbytes}
        got, facts = tile(host, "LilyMix", mix_operands(tokens, 5, rank, width, width + 9, slots, dtype), exact, 40)
        want, scratch = plan_lily_mix(tokens, 5, rank, width, dtype, 40, width + 9, 0, slots, exact)
        assert np.array_equal(got, want) and facts == {"blocks": 40, "schedule": 0, "workspace": scratch.nbytes}


def test_select_tiling(host):
    logits, one = ((3, 49152), "float16"), ((3,), "float32")
    for mask, rows in (((1,), 0), ((1, 49152), 1), ((3, 49152), 3)):
        data, facts = tile(host, "ContrastiveSelect", [logits, logits, one, one, (mask, "float32")])
        parts, width = int(data[3]), int(data[4])
        assert data.tolist() == [3, 49152, 48, parts, width, rows]
        assert width % 64 == 0 and (parts - 1) * width < 49152 <= parts * width and 3 * parts == 48
        assert facts == {"blocks": 48, "schedule": 1, "workspace": 3 * parts * 64}


def test_refusals_reach_cann(host, capfd):
    for name, change, message in (("MultiLora", {"rank": 257}, "rank 257 is outside 1..256"),
                                  ("LoraExpand", {"row": 63}, "do not fit rows of 63"),
                                  ("LoraShrink", {"slots": 0}, "slots must be at least 1")):
        sizes = {"tokens": 2, "hidden": 64, "rank": 8, "width": 64, "row": 64, "slots": 2, "segments": 1,
                 "dtype": "float16"}
        assert tile(host, name, lora_operands(name, **sizes)) is not None
        assert tile(host, name, lora_operands(name, **{**sizes, **change})) is None
        error = capfd.readouterr().err
        assert error.startswith(f"{name}: ") and message in error
    for operands_of_it, name, message in ((w4_operands(2, 96, 8, 64, 2, 8, "float16"), "W4Lora",
                                           "8 scales a row of 96"),
                                          (mix_operands(2, 65, 128, 8, 8, 1, "bfloat16"), "LilyMix",
                                           "65 experts of rank 128")):
        assert tile(host, name, operands_of_it) is None
        error = capfd.readouterr().err
        assert error.startswith(f"{name}: ") and message in error
    big = ((1, 262145), "float16")
    assert tile(host, "ContrastiveSelect", [big, big, ((1,), "float32"), ((1,), "float32"), ((1,), "float32")]) is None
    assert "262145" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_inference(host, dtype):
    def infer(name, tensors):
        arguments, alive = operands(tensors)
        out = np.full(8, -1, np.int64)
        assert host.host_infer(name.encode(), *arguments, out.ctypes.data_as(ctypes.c_void_p)) == 0
        del alive
        rank = int(out[0])
        return tuple(int(d) for d in out[1:1 + rank]), int(out[1 + rank])

    for name in ("MultiLora", "MultiLoraSegments", "LoraExpand"):
        assert infer(name, lora_operands(name, 7, 64, 3, 40, 50, 2, 2, dtype)) == ((7, 50), CODES[dtype])
    assert infer("LoraShrink", lora_operands("LoraShrink", 7, 64, 3, 40, 50, 2, 2, dtype)) == ((7, 3), CODES["float32"])
    assert infer("W4Lora", w4_operands(7, 64, 3, 40, 2, 2, dtype)) == ((7, 40), CODES[dtype])
    assert infer("LilyMix", mix_operands(7, 4, 3, 40, 50, 2, dtype)) == ((7, 50), CODES[dtype])
    logits, one = ((5, 100), dtype), ((5,), "float32")
    assert infer("ContrastiveSelect", [logits, logits, one, one, ((1,), "float32")]) == ((5,), CODES["int32"])
