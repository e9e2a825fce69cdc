"""ops/ascend/build.sh on toolkits that compile nothing: every check before and after the compilation, MindSpore's own
compiler between them."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fake_cann
from colora_ms import ascend_package
from colora_ms.errors import ConfigError
from emulated import ROOT, load_module

ASCEND = ROOT / "ops" / "ascend"
build_operators = load_module(ASCEND / "build_operators.py", "ascend_build_operators")
COUNT = len(build_operators.contract.definitions())
machine, package_check = build_operators.machine, build_operators.package_check


def build(cann, *arguments, path=(), **environment):
    """build.sh on a toolkit; modules that CANN's front end would import stand beside it, empty."""
    stubs = Path(cann).resolve() / "python"
    stubs.mkdir(exist_ok=True)
    for module in build_operators.MODULES:
        if importlib.util.find_spec(module) is None:
            (stubs / f"{module}.py").write_text("")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ASCEND", "COLORA"))}
    paths = [*map(str, path), str(Path(sys.executable).parent), clean["PATH"]]
    values = {"ASCEND_HOME_PATH": str(cann), "PYTHON": sys.executable, "PYTHONPATH": str(stubs),
              "COLORA_BUILD": str(stubs.parent / "build"), "PATH": os.pathsep.join(paths)}
    return subprocess.run(["bash", str(ASCEND / "build.sh"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, env={**clean, **values, **environment})


@pytest.mark.parametrize("layout", ["customize", "custom_op"])
def test_the_whole_way(tmp_path, layout):
    """The toolkit is given by a link, the variable is set with a colon, the chip is asked: all as on a real machine."""
    pytest.importorskip("mindspore")
    if not all(map(shutil.which, ("gcc", "nm", "readelf", "cmake", "make", "g++"))):
        pytest.skip("gcc, binutils, cmake and make are needed")
    cann = fake_cann.toolkit(tmp_path / "cann-9", layout=layout)
    (tmp_path / "latest").symlink_to(cann)
    done = build(tmp_path / "latest", tmp_path / "out", path=[fake_cann.npu_smi(tmp_path / "bin")],
                 ASCEND_CUSTOM_OPP_PATH="/one:/two")
    assert done.returncode == 0, done.stdout + done.stderr
    package = tmp_path / "out" / "vendors" / "colora"
    assert "built for ascend910b with CANN 9.0.0" in done.stdout
    assert done.stdout.splitlines()[-1] == f"export ASCEND_CUSTOM_OPP_PATH={package}" and "warning" not in done.stderr
    stamp = json.loads((package / ascend_package.STAMP).read_text())
    assert stamp["units"] == ["ascend910b"] and stamp["cann"] == "9.0.0" and len(stamp["operators"]) == COUNT
    assert len(stamp["exports"]) == 2 * COUNT
    assert (package.parent / "config.ini").stat().st_mode & 0o044 == 0o044
    # What the check says when a file is gone, another operator's name is in it, or CANN has the name.
    definitions = build_operators.contract.definitions()
    (package / "op_api/include/aclnn_lily_mix.h").unlink()
    next((package / "op_impl/ai_core/tbe/kernel/ascend910b/multi_lora").glob("*.o")).unlink()
    info = package / "op_impl/ai_core/tbe/config/ascend910b/aic-ascend910b-ops-info.json"
    info.write_text(info.read_text().replace('"name": "slots"', '"name": "slot"'))
    (cann / "lib64").mkdir()
    shutil.copy(package / "op_api/lib/libcust_opapi.so", cann / "lib64/libopapi.so")
    found = "\n".join(package_check.problems(package, definitions, ["ascend910b", "ascend910_93"], cann)[0])
    for words in ("aclnn_lily_mix.h is not there", "has 2 binaries, expected one a dtype (3)",
                  "the source has ['x', 'down', 'up', 'scale', 'slots', 'y', 'ends']",
                  "aic-ascend910_93-ops-info.json is not there", "CANN's own"):
        assert words in found, found


@pytest.mark.parametrize("layout", sorted(fake_cann.LAYOUTS))
def test_every_place_of_the_template_is_known(tmp_path, layout):
    cann = fake_cann.toolkit(tmp_path / "cann", layout=layout)
    assert build_operators.template(cann) == cann / fake_cann.LAYOUTS[layout]


def test_a_template_that_is_not_whole_is_told_with_the_version(tmp_path):
    cann = fake_cann.toolkit(tmp_path / "cann", version="8.5.0")
    project = cann / fake_cann.LAYOUTS["custom_op"]
    (project / "op_kernel" / "CMakeLists.txt").unlink()
    presets = json.loads((project / "CMakePresets.json").read_text())
    del presets["configurePresets"][0]["cacheVariables"]["vendor_name"]
    (project / "CMakePresets.json").write_text(json.dumps(presets))
    with pytest.raises(ConfigError, match="CANN 8.5.0 .* lacks op_kernel/CMakeLists.txt, vendor_name in CMakePresets"):
        build_operators.template(cann)
    (project / "CMakePresets.json").write_text("[]")
    with pytest.raises(ConfigError, match="in the form that is known"):
        build_operators.template(cann)
    # tools/msopgen alone was once taken for a template.
    (tmp_path / "other" / "tools" / "msopgen").mkdir(parents=True)
    with pytest.raises(ConfigError, match="version unknown.*none of tools/op_project_templates"):
        build_operators.template(tmp_path / "other")


def test_what_is_checked_before_compiling(tmp_path):
    pytest.importorskip("mindspore")
    cann, smi = fake_cann.toolkit(tmp_path / "cann"), fake_cann.npu_smi(tmp_path / "bin", chip="310P3")
    blank, file = fake_cann.toolkit(tmp_path / "my cann"), tmp_path / "file"
    file.write_text("")
    tools = tmp_path / "tools"  # a PATH without cmake
    tools.mkdir()
    for name in ("bash", "g++", "make", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    for words, arguments, environment in (
            ("cmake is not in the PATH: install it", [], {"PATH": str(tools)}),
            ("'310P3' is not supported: it has no bfloat16", [], {"path": [smi]}),
            ("neither the runtime (libascendcl.so) nor npu-smi says it; set COLORA_SOC", [], {}),
            ("the chip 'ascend710' is not known", [], {"COLORA_SOC": "910B3;ascend710"}),
            ("COLORA_SOC=';' names no chip", [], {"COLORA_SOC": ";"}),
            ("the install folder '/proc/x' cannot be made: No such file", ["/proc/x"], {"COLORA_SOC": "both"}),
            (f"the install folder '{file}' cannot be made: a file has", [file], {"COLORA_SOC": "both"}),
            ("set COLORA_BUILD to another one", [tmp_path / "out"],
             {"COLORA_SOC": "both", "COLORA_BUILD": str(tmp_path / "a b")}),
            ("the CANN toolkit's folder", [], {"COLORA_SOC": "both", "ASCEND_HOME_PATH": str(blank)}),
            ("has ' ', '+': letters, digits", [tmp_path / "in c++ here"], {"COLORA_SOC": "both"})):
        done = build(cann, *arguments, **environment)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "in c++ here").exists()


def test_a_compilation_that_fails_shows_the_end_of_its_log(tmp_path):
    pytest.importorskip("mindspore")
    cann = fake_cann.toolkit(tmp_path / "cann")
    (cann / fake_cann.LAYOUTS["custom_op"] / "build.sh").write_text("echo error: no member named FreeTensor; exit 3\n")
    done = build(cann, tmp_path / "out", COLORA_SOC="910B4")
    assert done.returncode == 1 and "no member named FreeTensor" in done.stderr and "build.log" in done.stderr


def test_modules_of_the_compilers_python(tmp_path, monkeypatch):
    (tmp_path / "python3").write_text("#!/bin/bash\necho attr decorator\n")
    (tmp_path / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="python3, which .* has no attrs, decorator: python3 -m pip install attrs"):
        build_operators.check_tools()


def test_units(tmp_path, monkeypatch):
    assert machine.units("both") == ["ascend910b", "ascend910_93"]
    assert machine.units("910B3;Ascend910_9391;910B1") == ["ascend910b", "ascend910_93"]
    monkeypatch.setenv("PATH", f"{fake_cann.npu_smi(tmp_path, '910B4')}:{os.environ['PATH']}")
    assert machine.units() == ["ascend910b"]


def test_the_table_of_npu_smi(tmp_path):
    found = machine.parse_npu_smi(fake_cann.TABLE.format(chip="910B3"))
    assert found["version"] == "25.5.0"
    assert [(c["chip"], c["health"], c["used_mb"], c["total_mb"]) for c in found["cards"]] == [
        ("910B3", "OK", 3391, 65536), ("910B3", "Warning", 60001, 65536)]
    assert found["processes"] == [{"card": 1, "pid": 12345, "name": "python3 serve.py", "mb": 56610}]
    assert machine.parse_npu_smi("command not found") == {"version": None, "cards": [], "processes": []}
    cann = fake_cann.toolkit(tmp_path / "cann")
    assert machine.cores(cann, "910B3") == (20, 40) and machine.cores(cann, "910B1") is None


def test_the_check_accepts_a_real_package():
    """The one that MindSpore ships compiled: our idea of the files is CANN's."""
    mindspore = pytest.importorskip("mindspore")
    package = Path(mindspore.__file__).parent / "lib/plugin/ascend/custom_ascendc_910b"
    if not package.is_dir() or shutil.which("nm") is None:
        pytest.skip("the installed mindspore ships no compiled custom operator, or nm is not here")
    theirs = {"name": "AllFinite", "inputs": [("gradient", "required", ["float16", "bfloat16", "float32"])],
              "outputs": [("is_finite", "required", ["bool"] * 3)], "attributes": []}
    found, facts = package_check.problems(package, [theirs], ["ascend910b", "ascend910_93"])
    assert found == [] and facts["binaries"] == 6 and len(facts["exports"]) == 2
