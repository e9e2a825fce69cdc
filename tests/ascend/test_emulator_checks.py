"""The emulator's checks, tested by planted bugs: each must be reported, with its kind and its line; the clean twin of
each kernel must not be. Some are small kernels (mutants.cpp), some the real ones with one edit."""
import re

import numpy as np
import pytest

import test_lily_kernel
from emulated import INOUT, INPUT, OUTPUT, STRICT, WORKSPACE, Emulator, build, plan_lora, plan_multi_lora
from lora_cases import LoraCase

HERE = __import__("pathlib").Path(__file__).parent
MUTANTS = HERE / "mutants.cpp"
LORA = build.ASCEND / "multi_lora" / "op_kernel" / "multi_lora.cpp"
MULTI = build.ASCEND / "multi_lora" / "op_kernel" / "multi_lora_phase.h"
TILES = build.ASCEND / "multi_lora" / "op_kernel" / "multi_lora_tiles.h"
SHRINK = build.ASCEND / "lora_shrink" / "op_kernel" / "lora_shrink.cpp"
HALF = build.ASCEND / "lora_expand" / "op_kernel" / "lora_expand.cpp"
PHASES = build.ASCEND / "common" / "op_kernel" / "lora_phases.h"
EXPAND = build.ASCEND / "common" / "op_kernel" / "lora_expand_phase.h"
GROUPS = build.ASCEND / "common" / "op_kernel" / "lora_groups.h"
MIX = build.ASCEND / "lily_mix" / "op_kernel" / "lily_mix.cpp"
LILY = build.ASCEND / "lily_mix" / "op_kernel" / "lily_phase.h"
FILES = {"multi_lora": (GROUPS, PHASES, EXPAND, MULTI, TILES, LORA), "lora_shrink": (GROUPS, PHASES, EXPAND, SHRINK),
         "lora_expand": (GROUPS, PHASES, EXPAND, HALF), "lily_mix": (GROUPS, PHASES, EXPAND, LILY, MIX)}

# name: (kinds that must be reported). The kernel of this name is in mutants.cpp; it marks the line with BUG.
PLANTED = {
    "capacity": {"ub_capacity"}, "misaligned": {"alignment"}, "cut_copy": {"alignment"}, "repeat_256": {"range"},
    "mask_65": {"range"}, "negative_count": {"range"}, "block_count": {"range"}, "compare_tail": {"range"},
    "odd_nibbles": {"range"}, "nibble_rounding": {"range"}, "nibbles_past_buffer": {"ub_bounds"},
    "nibbles_in_place": {"overlap"},
    "one_block_written": {"range"}, "rounding_mode": {"range"}, "past_buffer": {"ub_bounds"},
    "past_tensor": {"gm_bounds"}, "past_argument": {"gm_bounds"},
    "write_input": {"gm_write"}, "never_written": {"uninitialised"}, "workspace_unwritten": {"gm_uninitialised"},
    "no_enqueue": {"queue", "RAW"}, "no_free": {"queue"}, "free_twice": {"queue"}, "use_after_free": {"queue"},
    "alloc_twice": {"queue"}, "raw_v_mte2": {"RAW"}, "raw_mte3_v": {"RAW"}, "war_mte2_v": {"WAR"},
    "waw_v_mte2": {"WAW"},
    "raw_v_v": {"RAW"}, "raw_s_v": {"RAW"}, "raw_v_s": {"RAW"}, "war_v_s": {"WAR"}, "gm_raw": {"RAW"},
    "set_without_wait": {"flag"}, "wait_without_set": {"flag"}, "set_twice": {"flag"}, "event_id": {"flag"},
    "system_event": {"flag"}, "barrier_s": {"barrier"}, "partial_overlap": {"overlap"}, "repeat_overlap": {"overlap"},
    "race_write_read": {"race", "gm_uninitialised"}, "race_write_write": {"race"}, "race_read_write": {"race"},
    "stale_scalar": {"stale"},
    "sync_missing_block": {"sync"},
}
CLEAN = ("clean_copy", "clean_vector", "clean_sync", "clean_atomic", "clean_double_buffer", "clean_scalar",
         "clean_nibbles")

# The real kernel, with one edit: (operator, file, pattern, replacement, kinds of which at least one must be reported).
EDITS = {
    "no_meeting": ("multi_lora", LORA, r"AscendC::SyncAll\(\);", "", {"race", "gm_uninitialised"}),
    "one_turn": ("multi_lora", LORA, r"turn = 1 - turn;", "", {"race"}),
    "no_barrier_in_products": ("multi_lora", TILES, r"PipeBarrier<PIPE_V>\(\);\s*BlockReduceSum\(eighths",
                               "BlockReduceSum(eighths", {"RAW"}),
    "no_barrier_between_ranks": ("multi_lora", TILES, r"PipeBarrier<PIPE_V>\(\);\s*AddRank", "AddRank", {"RAW", "WAW"}),
    "no_barrier_before_spread": ("multi_lora", TILES, r"PipeBarrier<PIPE_V>\(\);\s*for \(uint32_t t = 0; t < \(slices_",
                                 "for (uint32_t t = 0; t < (slices_", {"RAW"}),
    "weights_past_end": ("multi_lora", TILES, r"downGm_, bank \+ c,", "downGm_, bank + c + rank_ * hidden_,",
                         {"gm_bounds"}),
    "rows_not_freed": ("multi_lora", TILES, r"rowQueue_\.FreeTensor\(rows\);", "", {"queue"}),
    "weights_too_large": ("multi_lora", MULTI, r"kWeights = 8192", "kWeights = 12288", {"ub_capacity"}),
    "rows_between_of_y": ("multi_lora", MULTI, r"end - c, width_, false", "end - c, width_, true", {"race"}),
    "no_shrink_meeting": ("lora_shrink", SHRINK, r"lora\.Shrink\(groups\);\s*AscendC::SyncAll\(\);",
                          "lora.Shrink(groups);", {"race", "gm_uninitialised"}),
    "no_barrier_in_expand": ("lora_expand", EXPAND, r"(halves\.GetValue.*?\n\s*\})\s*PipeBarrier<PIPE_V>\(\);", r"\1",
                             {"RAW", "WAW"}),
    "no_scalar_wait": ("lora_expand", EXPAND, r"Order<HardEvent::V_S>\(\);\s*return table;", "return table;", {"RAW"}),
    "no_padding_value": ("lora_shrink", PHASES, r"DataCopyPad\(tile, gm\[at\],", "DataCopyPad(tile[1], gm[at],",
                         {"alignment", "ub_bounds"}),
    "tile_too_large": ("lora_shrink", PHASES, r"12288;\n\s*pipe_->InitBuffer", "16384;\n pipe_->InitBuffer",
                       {"ub_capacity"}),
    "order_lost": ("lora_expand", GROUPS, r"return listed \? order\[position\]",
                   "return listed ? order[position] + 1", {"gm_bounds", "race"}),
}
EDITS_OF_THE_OTHERS = {
    "no_wait_for_router": (LILY, r"Base::template Order<HardEvent::MTE2_S>\(\);", "", {"RAW"}),
    "no_wait_for_table": (LILY, r"Base::template Order<HardEvent::V_S>\(\);\s*return table;", "return table;", {"RAW"}),
    "experts_past_end": (LILY, r"static_cast<uint64_t>\(e\) \* rank_", "static_cast<uint64_t>(e + 1) * rank_",
                         {"gm_bounds"}),
    "table_too_small": (LILY, r"most = kAccBytes", "most = 2 * kAccBytes", {"ub_bounds"}),
}


@pytest.fixture(scope="module")
def mutants(emulator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    text = MUTANTS.read_text()
    names = re.findall(r"KERNEL\((\w+)\)", text)
    assert set(names) >= set(PLANTED) | set(CLEAN)
    units = {"machine.cpp": build.HERE / "src" / "machine.cpp",
             "mutants.cpp": f'#include "{MUTANTS}"\n' + "".join(build.registration(n, 4) for n in names if n != "name")}
    wanted = [(operator, *edit, name) for name, (operator, *edit, _) in EDITS.items()]
    wanted += [("lily_mix", *edit[:3], name) for name, edit in EDITS_OF_THE_OTHERS.items()]
    for operator in FILES:
        header, struct = build.KERNELS[operator]
        units[f"{operator}.cpp"] = (
            f'#include "{build.ASCEND / header}"\n#include "kernel_operator.h"\n#define EMULATOR_TILING {struct}\n'
            "#define DTYPE_X half\n#define DTYPE_UP half\n"
            + "".join(edited(*edit) for edit in wanted if edit[0] == operator))
    return Emulator(build.compile_units(units, folder / "mutants.so", "-O0"))


def edited(operator, file, pattern, replacement, name):
    """The real kernel in one piece with the edit made, registered as edit_<name>."""
    texts = {p: p.read_text() for p in FILES[operator]}
    texts[file], count = re.subn(pattern, replacement, texts[file], count=1, flags=re.S)
    assert count == 1, f"the edit {name} no longer applies to {file.name}"
    inside = texts.pop(TILES, "")  # members of a class, included inside it
    texts = {p: text.replace('#include "multi_lora_tiles.h"', inside) for p, text in texts.items()}
    body = "".join(re.sub(r"^#.*$", "", text, flags=re.M) for text in texts.values())
    body = re.sub(r"\bcolora\b", f"colora_{name}", body)  # one namespace an edit: the linker must not merge them
    symbol = f"edit_{name}"
    arguments = build.kernel_arguments(texts[FILES[operator][-1]], operator)
    return body.replace(f"void {operator}(", f"void {symbol}(") + build.registration(symbol, arguments)


def run_small(mutants, name, flags=STRICT, cores=4):
    data = np.arange(4096, dtype=np.float32)
    out, workspace, tiling = np.zeros(4096, np.float32), np.zeros(4096, np.float32), np.zeros(16, np.uint32)
    report = mutants.launch(name, cores, [(data, INPUT), (out, OUTPUT), (workspace, WORKSPACE), (tiling, INPUT)], 3,
                            flags)
    return report["findings"], out


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_planted_bug_is_found(mutants, name):
    findings, _ = run_small(mutants, name)
    kinds = {f["kind"] for f in findings}
    assert kinds == PLANTED[name] or (name == "race_write_read" and kinds <= PLANTED[name] and kinds), findings
    lines = MUTANTS.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f"KERNEL({name})" in line)
    marked = {i + 1 for i in range(start, len(lines)) if "// BUG" in lines[i]
              and i < next((j for j in range(start + 1, len(lines)) if "KERNEL(" in lines[j]), len(lines))}
    assert marked, f"mutants.cpp marks no line of {name}"
    assert {f["line"] for f in findings} & marked, f"{name}: reported {findings}, marked {sorted(marked)}"
    assert all(f["file"].endswith("mutants.cpp") for f in findings)


def test_nibbles_are_signed_and_the_low_one_is_first(mutants):
    """clean_nibbles makes every byte 0x0f: -1, then 0."""
    _, out = run_small(mutants, "clean_nibbles", cores=1)
    assert np.array_equal(out[:1024], np.tile(np.array([-1, 0], np.float32), 512) + 1)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernel_has_no_findings(mutants, name):
    findings, out = run_small(mutants, name,
                              cores=1 if name in ("clean_copy", "clean_vector", "clean_scalar", "clean_nibbles") else 4)
    assert findings == []
    assert out[0] != 0 or out[1] != 0


def test_hazards_are_not_reported_where_the_compiler_synchronises(mutants):
    for name in ("raw_v_v", "raw_s_v", "raw_v_s", "gm_raw"):
        assert run_small(mutants, name, flags=0)[0] == []


def test_missing_synchronisation_shows_in_results(mutants):
    """Blocks run in random order, interleaved: without SyncAll some order gives a wrong sum, not just a finding."""
    results = set()
    for seed in range(12):
        data, out = np.ones(4096, np.float32), np.zeros(4096, np.float32)
        workspace, tiling = np.zeros(4096, np.float32), np.zeros(16, np.uint32)
        mutants.launch("race_write_read", 4, [(data, INPUT), (out, OUTPUT), (workspace, WORKSPACE), (tiling, INPUT)],
                       seed, 3)
        results.add(float(out[:32].sum()))
    assert len(results) > 1


@pytest.mark.parametrize("name", sorted(EDITS))
def test_edit_of_the_real_kernel_is_found(mutants, name):
    operator, *_, kinds = EDITS[name]
    case = LoraCase(70, 1000, 72, 1000, "float16", "skewed", bank=3)
    tokens, hidden, rank, width = case.shape
    tiling, workspace = plan_lora(tokens, hidden, rank, width, case.dtype, 48, slots=case.bank)
    y, h = case.y.copy(), np.zeros((tokens, rank), np.float32)
    given = {"multi_lora": [case.x, case.down, case.up, case.scale, case.slots],
             "lora_shrink": [case.x, case.down, case.scale, case.slots], "lora_expand": [h, case.up, case.slots]}
    rest = {"multi_lora": [(y, INOUT), (case.ends, INPUT), (y, INOUT)], "lora_shrink": [(h, INOUT)],
            "lora_expand": [(y, INOUT), (y, INOUT)]}
    if operator == "multi_lora":
        tiling, workspace = plan_multi_lora(tokens, hidden, rank, width, case.dtype, 48, case.bank)
    report = mutants.launch(f"edit_{name}", 48, [(one, INPUT) for one in given[operator]] + rest[operator]
                            + [(workspace, WORKSPACE), (tiling, INPUT)])
    assert {f["kind"] for f in report["findings"]} & kinds, report["findings"]


class Renamed:
    """The library under which the launch functions of the kernels' own tests find an edited kernel."""

    def __init__(self, mutants, name):
        self.mutants, self.name = mutants, name

    def launch(self, kernel, *arguments, **options):
        self.findings = self.mutants.launch(f"edit_{self.name}", *arguments, **options)["findings"]
        return {"findings": []}


@pytest.mark.parametrize("name", sorted(EDITS_OF_THE_OTHERS))
def test_edit_of_another_kernel_is_found(mutants, name):
    kinds = EDITS_OF_THE_OTHERS[name][3]
    library = Renamed(mutants, name)
    test_lily_kernel.launch(library, test_lily_kernel.LilyCase(20, 4, 256, 400, "float16", "one"))
    assert {f["kind"] for f in library.findings} & kinds, library.findings


def test_bitwise_instructions_take_16_bit_integers_only(emulator, tmp_path):
    text = ('#include "kernel_operator.h"\n'
            "void f(AscendC::LocalTensor<float> t) { AscendC::And(t, t, t, 64, 1, {1, 1, 1, 8, 8, 8}); }\n")
    with pytest.raises(RuntimeError, match="And: int16_t or uint16_t"):
        build.compile_units({"f.cpp": text}, tmp_path / "f.so", "-O0")


def test_unknown_kernel_and_wrong_arguments(emulator):
    with pytest.raises(ValueError, match="no kernel"):
        emulator.launch("no_such_kernel", 1, [])
    with pytest.raises(ValueError, match="no kernel"):
        emulator.launch("multi_lora_float16", 48, [(np.zeros(4, np.float16), INPUT)])
