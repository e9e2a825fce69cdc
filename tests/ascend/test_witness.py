"""An outside witness: the Ascend C source that the installed MindSpore ships in source and compiled form (so it runs on
the chip) must give right results under the emulator. It is read from site-packages at test time."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from emulated import INPUT, OUTPUT, STRICT, WORKSPACE, Emulator, build, to_dtype

INSIDE = ("lib/plugin/ascend/custom_ascendc_910b/op_impl/ai_core/tbe/custom_ascendc_910b_impl/dynamic/all_finite.cpp")


@pytest.fixture(scope="module")
def witness(emulator, tmp_path_factory):
    found = importlib.util.find_spec("mindspore")
    source = Path(found.origin).parent / INSIDE if found else None
    if source is None or not source.exists():
        pytest.skip("the installed mindspore ships no all_finite.cpp")
    text = f'#include "{source}"\n' + build.registration("all_finite", 4)
    return Emulator(build.compile_units({"machine.cpp": build.HERE / "src" / "machine.cpp", "all_finite.cpp": text},
                                        tmp_path_factory.mktemp("witness") / "witness.so", "-O0"))


def tiling_for(count, dtype, cores, tile=2048):
    """The 14 fields that the kernel reads: for all cores but the last, and for the last: elements of the core, elements
    of a tile, elements of the last tile (rounded up to a repeat), tiles, real elements of the last tile, padding."""
    size = 4 if dtype == "float32" else 2
    repeat = 256 // size

    def part(n):
        tiles = max(1, -(-n // tile))
        real = n - (tiles - 1) * tile
        return n, tile, -(-real // repeat) * repeat, tiles, real, -real % (32 // size)

    share = count // cores // (32 // size) * (32 // size)
    last = count - share * (cores - 1)
    code = {"float32": 0, "float16": 1, "bfloat16": 27}[dtype]
    return np.array([*part(share), *part(last), 1, code], np.uint32)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("count,cores",
                         [(4096, 1), (4096, 2), (5000, 1), (10007, 3), (100, 1), (40000, 8), (2048 * 5, 5), (77777, 4)])
def test_all_finite(witness, dtype, count, cores):
    rng = np.random.default_rng([count, cores])
    for bad in (None, np.inf, -np.inf, np.nan, "largest"):
        values = rng.standard_normal(count).astype(np.float32)
        place = int(rng.integers(count))
        if bad == "largest":
            values[place] = 65504.0 if dtype == "float16" else 3.0e38
        elif bad is not None:
            values[place] = bad
        stored = to_dtype(values, dtype)
        flag, workspace = np.zeros(16, np.float16), np.zeros(64, np.uint8)
        report = witness.launch("all_finite", cores, [(stored, INPUT), (flag, OUTPUT), (workspace, WORKSPACE),
                                                      (tiling_for(count, dtype, cores), INPUT)], place, flags=0)
        found_bad = flag.view(np.uint16)[0] != 0
        assert found_bad == (bad is not None and bad != "largest"), (bad, place)
        assert not {f["kind"] for f in report["findings"]} & {"ub_bounds", "gm_bounds", "alignment", "uninitialised",
                                                              "range"}, \
            report["findings"]


def test_strict_mode_names_what_the_source_leaves_to_the_compiler(witness):
    """The kernel relies on automatic synchronisation: it fills a tile with Duplicate and then loads into it."""
    stored, flag = np.ones(100, np.float32), np.zeros(16, np.float16)
    report = witness.launch("all_finite", 1, [(stored, INPUT), (flag, OUTPUT), (np.zeros(64, np.uint8), WORKSPACE),
                                              (tiling_for(100, "float32", 1), INPUT)], flags=STRICT)
    assert "WAW" in {f["kind"] for f in report["findings"]}
