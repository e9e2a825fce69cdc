"""The op_host sources, compiled as CANN's project compiles them (C++11) against a stand-in for its headers
(cann_host.h) and run: what they register, tile and infer."""
import ctypes
import json
import subprocess

import numpy as np
import pytest

from emulated import ROOT, build, load_module, plan_contrastive_select, plan_lily_mix, plan_lora, plan_multi_lora

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


def lora_operands(name, tokens, hidden, rank, width, row, slots, dtype, slices=1):
    x, y = ((tokens, hidden), dtype), ((tokens, row), dtype)
    down, up = ((slots, rank, hidden), dtype), ((slots, rank, width), dtype)
    scale, each = ((slots,), "float32"), ((tokens,), "int32")
    return {
        "MultiLora": [x, ((slots, slices * rank, hidden), dtype), up, ((slots, slices), "float32"), each, y,
                      ((slices,), "int32")],
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


@pytest.mark.parametrize("name", ["LoraShrink", "LoraExpand"])
def test_lora_tiling(host, name):
    """Every size reaches its own field: all sizes differ, against the plan that the emulator tests run with."""
    rng = np.random.default_rng(1)
    meets = "SyncAll()" in build.kernel_source(contract.snake(name)).read_text()
    for dtype in ("float16", "bfloat16", "float32"):
        for tokens, hidden, rank, width, exact in ((0, 64, 1, 8, False), (1, 4096, 16, 11008, True),
                                                   (7, 1000, 24, 576, False)):
            row, slots, cores = width + 30, 5, int(rng.integers(1, 65))
            tensors = lora_operands(name, tokens, hidden, rank, width, row, slots, dtype)
            got, facts = tile(host, name, tensors, exact, cores)
            sizes = (tokens, hidden, rank, 1) if name == "LoraShrink" else (tokens, 1, rank, width)
            rest = {"row_width": 1, "exact": False} if name == "LoraShrink" else {"row_width": row, "exact": exact}
            want, scratch = plan_lora(*sizes, dtype, cores, slots=slots, **rest)
            assert np.array_equal(got, want), (dtype, tokens)
            assert facts == {"blocks": cores, "schedule": int(meets), "workspace": scratch.nbytes}


def test_multi_lora_tiling(host):
    rng = np.random.default_rng(2)
    for dtype in ("float16", "bfloat16", "float32"):
        for tokens, hidden, rank, width, slices in ((0, 64, 1, 8, 1), (1, 4096, 16, 11008, 3), (70, 1000, 24, 576, 2)):
            cores, slots = int(rng.integers(1, 65)), 5
            tensors = lora_operands("MultiLora", tokens, hidden, rank, width, width, slots, dtype, slices)
            got, facts = tile(host, "MultiLora", tensors, cores=cores)
            want, scratch = plan_multi_lora(tokens, hidden, rank, width, dtype, cores, slots, slices)
            assert np.array_equal(got, want), (dtype, tokens)
            assert facts == {"blocks": cores, "schedule": 1, "workspace": scratch.nbytes}


def mix_operands(tokens, experts, rank, width, row, slots, dtype):
    return [((tokens, rank), "float32"), ((tokens, experts), "float32"), ((slots, experts, rank, width), dtype),
            ((slots,), "float32"), ((tokens,), "int32"), ((tokens, row), dtype)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tiling_of_lily_mix(host, dtype):
    for tokens, rank, width, slots, exact in ((0, 1, 8, 2, False), (33, 16, 1100, 3, True)):
        got, facts = tile(host, "LilyMix", mix_operands(tokens, 5, rank, width, width + 9, slots, dtype), exact, 40)
        want, scratch = plan_lily_mix(tokens, 5, rank, width, dtype, 40, width + 9, 0, slots, exact)
        assert np.array_equal(got, want) and facts == {"blocks": 40, "schedule": 0, "workspace": scratch.nbytes}


def select_operands(rows, vocab, requests, voices, dtype):
    return [((rows, vocab), dtype), ((requests, voices), "int32"), ((requests, voices), "float32"),
            ((requests,), "float32")]


def test_select_tiling(host):
    for dtype in ("float16", "bfloat16", "float32"):
        for rows, vocab, requests, voices, cores in ((6, 49152, 3, 2, 48), (8, 151936, 4, 8, 40), (0, 7, 0, 1, 48),
                                                     (99, 5000, 50, 2, 20), (32, 151936, 16, 2, 48)):
            data, facts = tile(host, "ContrastiveSelect", select_operands(rows, vocab, requests, voices, dtype),
                               cores=cores)
            want, scratch = plan_contrastive_select(rows, vocab, requests, voices, dtype, cores)
            assert np.array_equal(data, want)
            parts, width = int(data[5]), int(data[6])
            assert width % 64 == 0 and (parts - 1) * width < vocab <= parts * width
            assert facts == {"blocks": cores, "schedule": 1, "workspace": scratch.nbytes}


def test_refusals_reach_cann(host, capfd):
    for name, change, message in (("MultiLora", {"rank": 257}, "rank 257 is outside 1..256"),
                                  ("LoraExpand", {"row": 63}, "do not fit rows of 63"),
                                  ("LoraShrink", {"slots": 0}, "slots must be at least 1")):
        sizes = {"tokens": 2, "hidden": 64, "rank": 8, "width": 64, "row": 64, "slots": 2, "dtype": "float16"}
        assert tile(host, name, lora_operands(name, **sizes)) is not None
        assert tile(host, name, lora_operands(name, **{**sizes, **change})) is None
        error = capfd.readouterr().err
        assert error.startswith(f"{name}: ") and message in error
    assert tile(host, "LilyMix", mix_operands(2, 65, 128, 8, 8, 1, "bfloat16")) is None
    error = capfd.readouterr().err
    assert error.startswith("LilyMix: ") and "65 experts of rank 128" in error
    for slices, rank, message in ((9, 8, "9 slices"), (3, 200, "600 rows")):
        assert tile(host, "MultiLora", lora_operands("MultiLora", 2, 64, rank, 64, 64, 2, "float16", slices)) is None
        assert message in capfd.readouterr().err
    for rows, vocab, requests, voices, message in ((1, 262145, 1, 2, "262145"), (1, 64, 1, 9, "9 rows a request")):
        assert tile(host, "ContrastiveSelect", select_operands(rows, vocab, requests, voices, "float16")) is None
        assert message in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_inference(host, dtype):
    def infer(name, tensors, which=0):
        arguments, alive = operands(tensors)
        out = np.full(8, -1, np.int64)
        assert host.host_infer(name.encode(), which, *arguments, out.ctypes.data_as(ctypes.c_void_p)) == 0
        del alive
        rank = int(out[0])
        return tuple(int(d) for d in out[1:1 + rank]), int(out[1 + rank])

    for name in ("MultiLora", "LoraExpand"):
        assert infer(name, lora_operands(name, 7, 64, 3, 40, 50, 2, dtype)) == ((7, 50), CODES[dtype])
    assert infer("LoraShrink", lora_operands("LoraShrink", 7, 64, 3, 40, 50, 2, dtype)) == ((7, 3), CODES["float32"])
    assert infer("LilyMix", mix_operands(7, 4, 3, 40, 50, 2, dtype)) == ((7, 50), CODES[dtype])
    given = select_operands(10, 100, 5, 3, dtype)
    want = [((5, 3), CODES["int32"]), ((5, 5), CODES["float32"])]
    assert [infer("ContrastiveSelect", given, i) for i in range(2)] == want
