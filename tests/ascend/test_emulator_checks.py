"""The emulator's checks, tested by planted bugs (ops/emulator/planted.py): each must be caught, small kernels with
their kinds and lines; the clean twins of the kernels must not be."""
import re
import subprocess

import numpy as np
import pytest

from emulated import INPUT, ROOT, STRICT, WORKSPACE, build, load_module

planted = load_module(ROOT / "ops" / "emulator" / "planted.py", "emulator_planted")
table = planted.table
NAMES = [*table.SMALL, *table.EDITS, *(name for names in table.REFUSED.values() for name in names), *table.LINTS,
         *table.CALLS]


@pytest.fixture(scope="module")
def bugs(emulator, tmp_path_factory):
    return planted.library(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def outcomes(bugs, emulator):
    found = [*planted.launched(bugs), *planted.compiled(), *planted.linted(), *planted.called(build.build())]
    return {outcome.name: outcome for outcome in found}


@pytest.mark.parametrize("name", NAMES)
def test_planted_bug_is_caught(outcomes, name):
    outcome = outcomes[name]
    assert outcome.caught, f"{outcome.what}: reported was {outcome.told or 'nothing'}"


def test_the_table_is_whole(outcomes):
    """Every planted bug is in the table, names are used once, and there are many kinds; a share below 1 is seen."""
    assert len(NAMES) == len(set(NAMES)) == len(outcomes)
    small = [name for path in planted.SMALL_SOURCES for name in re.findall(r"^KERNEL\((\w+)\)", path.read_text(), re.M)]
    assert sorted(small) == sorted([*table.SMALL, *table.CLEAN])
    assert sorted(re.findall(r"// REFUSED (\w+)", planted.REFUSED_SOURCE.read_text())) == sorted(
        name for names in table.REFUSED.values() for name in names)
    kinds = {outcome.what for outcome in outcomes.values()}
    assert len(kinds) >= 100
    assert planted.share(outcomes.values()) == 1
    some = list(outcomes.values())[:4]
    assert planted.share([*some[:3], some[3]._replace(caught=False)]) == 0.75


@pytest.mark.parametrize("name", sorted(table.SMALL))
def test_small_bug_is_reported_with_its_kind_and_line(bugs, name):
    findings, _ = planted.run_small(bugs, name)
    kinds = {f["kind"] for f in findings}
    either = name in ("race_write_read", "spread_in_place")
    assert kinds == table.SMALL[name][1] or (either and kinds <= table.SMALL[name][1] and kinds), findings
    path = next(p for p in planted.SMALL_SOURCES if f"KERNEL({name})" in p.read_text())
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f"KERNEL({name})" in line)
    marked = {i + 1 for i in range(start, len(lines)) if "// BUG" in lines[i]
              and i < next((j for j in range(start + 1, len(lines)) if "KERNEL(" in lines[j]), len(lines))}
    assert marked, f"{path.name} marks no line of {name}"
    assert {f["line"] for f in findings} & marked, f"{name}: reported {findings}, marked {sorted(marked)}"
    assert all(f["file"].endswith(path.name) for f in findings)


def test_nibbles_are_signed_and_the_low_one_is_first(bugs):
    """clean_nibbles makes every byte 0x0f: -1, then 0."""
    _, out = planted.run_small(bugs, "clean_nibbles", blocks=1)
    assert np.array_equal(out[:1024], np.tile(np.array([-1, 0], np.float32), 512) + 1)


@pytest.mark.parametrize("name", table.CLEAN)
def test_clean_kernel_has_no_findings(bugs, name):
    one = name in ("clean_copy", "clean_vector", "clean_scalar", "clean_nibbles")
    findings, out = planted.run_small(bugs, name, blocks=1 if one else 4)
    assert findings == []
    assert out[0] != 0 or out[1] != 0


def test_hazards_are_not_reported_where_the_compiler_synchronises(bugs):
    for name in ("raw_v_v", "raw_s_v", "raw_v_s", "gm_raw"):
        assert planted.run_small(bugs, name, flags=0)[0] == []


def test_missing_synchronisation_shows_in_results(bugs):
    """Blocks run in random order, interleaved: without SyncAll some order gives a wrong sum, not just a finding."""
    results = set()
    for seed in range(12):
        data, out = np.ones(4096, np.float32), np.zeros(4096, np.float32)
        workspace, tiling = np.zeros(4096, np.float32), np.zeros(16, np.uint32)
        bugs.launch("race_write_read", 4, [(data, INPUT), (out, planted.OUTPUT), (workspace, WORKSPACE),
                                           (tiling, INPUT)], seed, 3)
        results.add(float(out[:32].sum()))
    assert len(results) > 1


def test_cores_are_a_parameter_of_the_launch(bugs):
    """A chip has 40 or 48 vector cores: the same kernel is right with as many blocks as cores, and with no other number
    once it meets."""
    def launch(blocks, cores):
        given = [np.zeros(4096, np.float32) for _ in range(3)]
        kinds = (INPUT, planted.OUTPUT, WORKSPACE)
        return bugs.launch("sync_of_some_cores", blocks, [*zip(given, kinds), (np.zeros(16, np.uint32), INPUT)], 0,
                           STRICT, cores=cores)["findings"]

    for cores in (40, 48):
        assert launch(cores, cores) == []
        for blocks in (1, cores - 1, cores + 1):
            (finding,) = launch(blocks, cores)
            assert finding["kind"] == "sync" and f"{cores} vector cores" in finding["text"]
    assert planted.run_small(bugs, "clean_copy", blocks=1)[0] == []  # without a meeting any number may run


# ---- the signatures -------------------------------------------------------------------------------------------------
ACCEPTED = ROOT / "ops" / "emulator" / "planted" / "accepted.cpp"


def compile_only(path):
    return subprocess.run([build.compiler(), *build.flags("-O0"), "-fsyntax-only", str(path)], capture_output=True,
                          text=True)


def table_of_apis():
    """The names in the first column of the README's table."""
    text = (ROOT / "ops" / "emulator" / "README.md").read_text()
    rows = text[text.index("| API |"):].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([\w:\[\]]+)`", row.split("|")[1])]


def test_what_the_headers_declare_compiles():
    done = compile_only(ACCEPTED)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_api_of_the_kernels_is_in_the_table():
    """README's table, accepted.cpp and the calls in ops/ascend name the same functions and types."""
    named = table_of_apis()
    assert len(named) == len(set(named))
    accepted = {name.strip() for line in re.findall(r"// API (.*)", ACCEPTED.read_text()) for name in line.split(",")}
    assert accepted == set(named)
    headers = "".join(path.read_text() for path in (ROOT / "ops" / "emulator" / "include").rglob("*.h"))
    headers += "EMULATOR_SCALAR(" + headers
    public = set(re.findall(r"\b(?:void|bool|TEventID|int64_t|uint32_t|T|LocalTensor(?:<\w+>)?|GlobalTensor) "
                            r"([A-Z]\w+)\(", headers))
    public |= set(re.findall(r"EMULATOR_(?:BINARY|BITWISE|SCALAR|UNARY)\((\w+),", headers)) - {"NAME"}
    public |= set(re.findall(r"\b(?:struct|class) ((?:Data|Binary|Brcb|TQue|TBuf|TPipe)\w*)", headers))
    code = "".join(planted.lint.without_comments(path.read_text())
                   for path in (ROOT / "ops" / "ascend").rglob("op_kernel/*") if path.suffix in (".h", ".cpp"))
    used = {name for name in public if re.search(rf"\b{name}\b", code)}
    last = {name.split("::")[-1] for name in named}
    assert used <= last, f"called by the kernels, missing in the table: {sorted(used - last)}"


def test_sources_of_the_device_and_of_the_host(emulator):
    assert planted.lint.all_problems() == []


def test_a_wrong_number_of_arguments_is_refused(emulator):
    with pytest.raises(ValueError, match="no kernel"):
        emulator.launch("no_such_kernel", 1, [])
    with pytest.raises(ValueError, match="no kernel"):
        emulator.launch("multi_lora_float16", 48, [(np.zeros(4, np.float16), INPUT)])
