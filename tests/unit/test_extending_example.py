"""colora_ms/EXTENDING.md: its code blocks are compiled and its tests run, each group in a process of its own.

Blocks that begin with a line "file: NAME" are parts of that file. Processes of their own, because the example registers
an adapter method and brings an operator library that holds its operators alone.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "colora_ms" / "EXTENDING.md"


def blocks():
    """{file name: text} of the page's files."""
    found = {}
    for name, text in re.findall(r"^```\w+\n(?:#|//) file: (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"),
                                 re.M | re.S):
        found[name] = found.get(name, "") + text
    return found


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(tmp_path):
    """Folder with the page's files."""
    for name, text in blocks().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run_tests(folder, name, **environment):
    """Run one of the page's test files; returns how many tests passed."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": path, "GLOG_v": "3", **environment})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def need_compiler():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler: install g++ to compile the page's kernel")


def test_the_page_has_the_files_that_it_talks_about():
    assert set(blocks()) == {
        "ia3.py", "test_ia3.py", "row_gain.cpp", "row_gain.py", "test_row_gain.py", "test_row_gain_device.py",
        "row_gain/op_host/row_gain_tiling_core.h", "row_gain/op_kernel/row_gain.cpp"}


def test_links_and_named_files_are_there():
    text = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]\S*)\)", text):
        assert target.startswith("http") or (PAGE.parent / target).is_file(), target
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for name in re.findall(r"`((?:ops|tests|scripts|colora_ms)/[\w/.]+\.(?:py|cpp|h|sh|md))`", plain):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:adapters|kernels)/\w+\.py)`", plain):
        assert (ROOT / "colora_ms" / name).is_file() or name == "adapters/ia3.py", name


def test_the_adapter_works(page):
    assert run_tests(page, "test_ia3.py") >= 8


def test_the_cpu_kernel_works(page):
    need_compiler()
    sources = page / "cpu"
    sources.mkdir()
    for source in [*(ROOT / "ops" / "cpu").glob("*.h"),
                   *(ROOT / "ops" / "cpu" / f"{name}.cpp" for name in ("dispatch", "parallel"))]:
        shutil.copy(source, sources)
    (page / "row_gain.cpp").rename(sources / "row_gain.cpp")
    builder = load(ROOT / "ops" / "cpu" / "build.py", "page_cpu_build")
    builder.SOURCE_DIR = sources
    library = page / "libexample.so"
    builder.build(library)
    for name in ("call.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / "kernels" / name, page)
    assert run_tests(page, "test_row_gain.py", COLORA_CPU_LIBRARY=str(library), COLORA_KERNELS="cpu") >= 8


def test_the_ascend_kernel_works_on_the_emulator(page):
    need_compiler()
    builder = load(ROOT / "ops" / "emulator" / "build.py", "page_emulator_build")
    builder.KERNELS["row_gain"] = ("row_gain/op_host/row_gain_tiling_core.h", "colora::RowGainTilingData")
    builder.ASCEND = page
    library = page / "libexample_emulator.so"
    builder.compile_units({"machine.cpp": builder.HERE / "src" / "machine.cpp",
                           "row_gain.cpp": builder.wrapper("row_gain")},
                          library, optimise="-O0")
    (page / "emulated.py").write_text((ROOT / "ops" / "emulator" / "driver.py").read_text(encoding="utf-8"))
    (page / "conftest.py").write_text(
        "import pytest\nfrom emulated import Emulator\n\n\n@pytest.fixture(scope='session')\ndef emulator():\n"
        f"    return Emulator({str(library)!r})\n")
    assert run_tests(page, "test_row_gain_device.py") == 15
