"""The settings of a process on Ascend, the chips and versions, and the package of operators on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from colora_ms import ascend_facts, ascend_package, ascend_settings
from colora_ms.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FAKED = """
import sys
import mindspore as ms
real = ms.get_context
ms.get_context = lambda name: "Ascend" if name == "device_target" else real(name)
"""


def run(program, expect=0, **environment):
    """(stdout, stderr) of a process that takes its settings for Ascend; the faked target has no device behind it."""
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("ASCEND", "HCCL", "MS_", "RANK", "COLORA_NPU"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180,
                          env={**clean, "PYTHONPATH": str(ROOT), "GLOG_v": "3", **environment})
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("name, unit", [("Ascend910B3", "ascend910b"), (" 910b4-1 ", "ascend910b"),
                                        ("Ascend910_9391", "ascend910_93"), ("ascend910_93", "ascend910_93")])
def test_chips(name, unit):
    assert ascend_facts.unit_of(name) == unit


@pytest.mark.parametrize("name, words", [
    ("Ascend310P3", "no bfloat16"), ("310B4", "not supported"), ("Ascend910A", "no vector cores of their own"),
    ("Ascend950PR_9599", "another instruction set"), ("910B33", "Did you mean '910B3'"), ("", "is not known")])
def test_other_chips_are_refused_by_name(name, words):
    with pytest.raises(ConfigError, match="expected one of|supported") as told:
        ascend_facts.unit_of(name)
    assert words in str(told.value) and repr(name) in str(told.value)


def test_a_name_that_says_too_little_is_told_by_the_setting():
    with pytest.raises(ConfigError, match="npu-smi gives it to an A3 .* set COLORA_SOC=ascend910_93"):
        ascend_facts.unit_in_use("Ascend910")
    assert ascend_facts.unit_in_use("Ascend910", "ascend910_93") == "ascend910_93"
    assert ascend_facts.unit_in_use("910_9999", "910_9391") == "ascend910_93"
    assert ascend_facts.unit_in_use("910B3", "ascend910_93") == "ascend910b"  # the chip's own name tells more
    for chip, given in (("Ascend910", "both"), ("310P3", "ascend910b"), ("910A", "ascend910b")):
        with pytest.raises(ConfigError, match=f"{chip}' is not supported"):
            ascend_facts.unit_in_use(chip, given)


@pytest.mark.parametrize("text, words", [
    (";", "names no chip"), ("  ", "names no chip"), ("ascend910b,", "has ',' between names: expected ;"),
    ("ascend910b ascend910_93", "has ' ' between names: expected ;"), ("910B3;nothing", "'nothing' is not known")])
def test_units_that_a_setting_does_not_name(text, words):
    with pytest.raises(ConfigError) as told:
        ascend_facts.units_of(text)
    assert words in str(told.value)


def test_every_chip_has_its_cores():
    assert set(ascend_facts.CHIPS) == set(ascend_facts.CORES)
    assert all(vector == 2 * cube for cube, vector in ascend_facts.CORES.values())


def test_versions_that_fit():
    for fit in ascend_facts.VERSIONS:
        assert ascend_facts.misfits(fit.mindspore, fit.cann, fit.driver, fit.mindformers) == []
    assert ascend_facts.misfits("2.9.0", "9.0.0.1", "26.0.rc1.b020") == []
    found = ascend_facts.misfits("2.9.0", "8.5.0", "25.5.0", "1.8.0")
    assert [word for word in ("CANN 8.5.0", "driver 25.5.0", "mindformers 1.8.0") if any(word in f for f in found)] \
        == ["CANN 8.5.0", "driver 25.5.0", "mindformers 1.8.0"]
    assert "is not in the table" in ascend_facts.misfits("2.4.0", "8.5.0")[0]
    assert "(unknown)" in ascend_facts.misfits("2.9.0", None)[0]


@pytest.mark.parametrize("file, text, version", [
    ("compiler/version.info", "Version=8.5.0\nversion_dir=8.5.0\n", "8.5.0"),
    ("x86_64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\n", "8.3.RC1"),
    ("version.cfg", "# version: 1.0\nruntime_running_version=[9.0.0:CANN-9.0.0]\n", "9.0.0")])
def test_version_of_a_toolkit(tmp_path, file, text, version):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert ascend_package.cann_version(tmp_path) == version
    assert ascend_package.cann_version(tmp_path / "none") is None


def test_the_page_shows_what_is_read():
    page = (ROOT / "ops" / "ascend" / "README.md").read_text(encoding="utf-8")
    for fit in ascend_facts.VERSIONS:
        assert f"| {' | '.join(fit)} |" in page
    for variable in ascend_facts.ENVIRONMENT:
        assert f"| `{variable.name}` | `{variable.value}` | {variable.why} |" in page
    assert all(chip in page for chip in ascend_facts.CHIPS) and "Not yet run on an NPU" in page


# ---- environment and context ---------------------------------------------------------------------------------------
ASK = FAKED + """
import os
import colora_ms
from colora_ms.kernels import registry
registry.bind()
from colora_ms import ascend_settings
from mindspore import context
from mindspore._c_expression import RuntimeConf, ms_ctx_param
get = lambda name: context._context().get_param(getattr(ms_ctx_param, name))
boosts = [get("infer_boost")]
for inference in (True, False, True):
    ascend_settings.boost(inference)
    boosts.append(get("infer_boost"))
print(get("jit_level"), *boosts, get("jit_syntax_level"), RuntimeConf.get_instance().is_memory_configured())
print(os.environ.get("MS_ALLOC_CONF"), os.environ.get("HCCL_EXEC_TIMEOUT"), os.environ.get("HCCL_CONNECT_TIMEOUT"))
"""


def test_what_is_set_is_asked_back_and_printed(tmp_path):
    out, err = run(ASK, ASCEND_HOME_PATH=str(tmp_path), HCCL_EXEC_TIMEOUT="99", COLORA_NPU_MEMORY="5GB",
                   COLORA_KERNELS="reference")
    # 1800, although MindSpore, which was imported first, has written 600; 99 is the user's.
    assert {"O0 off on off on 0 True", "enable_vmm:true 99 1800"} <= set(out.splitlines())
    for line in ("HCCL_EXEC_TIMEOUT = 99 (yours)", "MS_ENABLE_LCCL = off (ours)", "jit_level = O0 (ours)",
                 "memory = 5GB (yours)"):
        assert line in err, err


def test_the_users_graph_settings_stay_and_decoding_refuses_them(tmp_path):
    program = FAKED + """
import colora_ms
ms.set_context(jit_config={"jit_level": "O1"}, jit_syntax_level=1)
from colora_ms import ascend_settings
print([one for one in ascend_settings.apply() if one.name == "jit_level"])
ascend_settings.boost(False)
print("syntax", ascend_settings._context("jit_syntax_level"))
try:
    ascend_settings.boost(True)
except ValueError as error:
    print(error)
"""
    out, err = run(program, ASCEND_HOME_PATH=str(tmp_path), COLORA_QUIET="1")
    assert "value='O1', origin='yours'" in out and "syntax 1" in out
    assert "jit_level is 'O1'" in out and err == ""


def test_elsewhere_nothing_is_touched():
    program = """
import os
before = dict(os.environ)
import colora_ms
assert dict(os.environ) == before, set(os.environ) - set(before)
from colora_ms import runtime, ascend_settings
runtime.configure()
assert ascend_settings.report() == ""
"""
    if ascend_settings.machine():
        pytest.skip("this is a machine with Ascend's software")
    assert run(program) == ("", "")


REFUSED = [
    ("COLORA_NPU_MEMORY", "lots", "", "expected a size such as 54GB"),
    ("MS_COMPILER_CACHE_PATH", "/tmp/a b", "", "has a blank"),
    ("COLORA_NPU_MEMORY", "5GB", "device_in_use = lambda: True", "comes too late"),
    ("COLORA_KERNELS", "ascend", "chip = lambda: 'ascend310p'", "'ascend310p' is not supported"),
    ("X", "", "_context = lambda name: ''", "jit_level = '' after 'O0' was set"),
    ("MS_ROLE", "MS_WORKER", "", "has not joined its job")]


def test_what_cannot_be_had_is_said(tmp_path):
    """Each in turn; the last one, which comes after the settings, binds nothing either. MindSpore's own operators,
    which the refusal of a chip advises, are bound on that chip."""
    program = FAKED + f"""
import os
from colora_ms import ascend_settings
from colora_ms.kernels import registry
kept = dict(vars(ascend_settings))
for name, value, fake, words in {REFUSED!r}:
    before = os.environ.get(name)
    os.environ[name] = value
    exec(fake, vars(ascend_settings))
    try:
        registry.bind()
        print("bound")
    except ValueError as error:
        print(words in str(error), error)
    del os.environ[name]
    if before is not None:
        os.environ[name] = before
    vars(ascend_settings).update({{key: kept[key] for key in ("device_in_use", "chip", "_context")}})
ascend_settings.chip = lambda: "ascend310p"
print(registry.bind().backend)
"""
    out, _ = run(program, ASCEND_HOME_PATH=str(tmp_path), COLORA_KERNELS="reference")
    lines = [line for line in out.splitlines() if line.startswith(("True", "False", "bound", "reference"))]
    assert len(lines) == len(REFUSED) + 1 and lines[-1] == "reference", out
    assert all(line.startswith("True") for line in lines[:-1]), out


# ---- the package on disk -------------------------------------------------------------------------------------------
def package(folder, **stamp):
    header = folder / ascend_package.HEADER
    header.parent.mkdir(parents=True)
    header.write_text("")
    if stamp:
        (folder / ascend_package.STAMP).write_text(json.dumps(stamp))
    return folder


def toolkit(folder, version):
    (folder / "compiler").mkdir(parents=True)
    (folder / "compiler" / "version.info").write_text(f"Version={version}\n")
    return folder


def test_the_first_folder_answers_and_the_others_are_named(tmp_path, monkeypatch):
    one, two = package(tmp_path / "one"), package(tmp_path / "two")
    monkeypatch.setenv(ascend_package.VARIABLE, f"/nowhere:{two}:{one}")
    assert ascend_package.find() == (two, False, (one,))


def test_a_package_for_another_cann_is_refused(tmp_path, monkeypatch, caplog):
    built = package(tmp_path / "p", cann="8.5.0", units=["ascend910b"], operators=["MultiLora"])
    monkeypatch.setenv("ASCEND_HOME_PATH", str(toolkit(tmp_path / "cann", "9.0.0")))
    with pytest.raises(ConfigError, match="CANN 8.5.0, this process has 9.0.0.*; LilyMix is lacking; .*this one is a3"):
        ascend_package.check(built, ["LilyMix", "MultiLora"], "a3")
    monkeypatch.setenv(ascend_package.ANY_CANN, "1")
    ascend_package.check(built, ["MultiLora"], "ascend910b")
    ascend_package.check(package(tmp_path / "q"), ["MultiLora"])
    assert "was not built by" in caplog.text or "were not built by" in caplog.text
    (built / ascend_package.STAMP).write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        ascend_package.check(built, [])


def test_a_cann_that_cannot_be_compared_is_said(tmp_path, monkeypatch, caplog):
    known, unknown = str(toolkit(tmp_path / "cann", "9.0.0")), str(tmp_path / "none")
    for built, home, words in (("9.0.0", unknown, "with CANN 9.0.0, this process has CANN (unknown)"),
                               (None, known, "with CANN (unknown), this process has CANN 9.0.0"), ("9.0.0", known, "")):
        caplog.clear()
        monkeypatch.setenv("ASCEND_HOME_PATH", home)
        ascend_package.check(package(tmp_path / f"p{len(list(tmp_path.iterdir()))}", cann=built, operators=[]), [])
        assert words in caplog.text and bool(caplog.text) == bool(words)


def test_operators_of_another_chip_are_refused_when_they_are_loaded(tmp_path, monkeypatch):
    from colora_ms.kernels import ascend

    built = package(tmp_path / "p", cann="9.0.0", units=["ascend910_93"], operators=list(ascend.OPERATORS))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(toolkit(tmp_path / "cann", "9.0.0")))
    monkeypatch.setenv(ascend_package.VARIABLE, str(built))
    monkeypatch.setattr(ascend_settings, "chip", lambda: "Ascend910B3")
    with pytest.raises(ConfigError, match="built for ascend910_93, this one is ascend910b"):
        ascend.find_package()
    monkeypatch.setattr(ascend_settings, "chip", lambda: "ascend910_93")
    assert ascend.find_package() == built


def test_the_own_package_is_in_the_path_before_mindspore(tmp_path):
    """A fresh process: the own folder is put first on import, too late it is refused, and the order of imports does not
    matter as long as nothing ran."""
    own = package(tmp_path / "own")
    program = f"""
import os
import colora_ms
from colora_ms import ascend_package, ascend_settings
from pathlib import Path
ascend_package.OWN = Path({str(own)!r})
os.environ["ASCEND_HOME_PATH"] = "/nowhere"
ascend_settings.prepare()
import mindspore
print(os.environ["ASCEND_CUSTOM_OPP_PATH"].split(":")[0])
from colora_ms.kernels import ascend
print(ascend.find_package())
os.environ["ASCEND_CUSTOM_OPP_PATH"] = "/elsewhere"
ascend_settings.device_in_use = lambda: True
try:
    ascend.find_package()
except RuntimeError as error:
    print(error)
"""
    out, _ = run(program)
    assert out.splitlines()[:2] == [str(own), str(own)] and "reads the variable once" in out.splitlines()[2]


def test_a_real_package_is_read():
    """The one that MindSpore ships compiled."""
    mindspore = pytest.importorskip("mindspore")
    library = Path(mindspore.__file__).parent / "lib/plugin/ascend/custom_ascendc_910b/op_api/lib/libcust_opapi.so"
    if not library.is_file() or ascend_package.exported(library) is None:
        pytest.skip("the installed mindspore ships no compiled custom operator, or nm is not here")
    assert ascend_package.exported(library) == {"aclnnAllFinite", "aclnnAllFiniteGetWorkspaceSize"}
    assert "libascendcl.so" in ascend_package.needed(library) and "libopapi.so" not in ascend_package.needed(library)
