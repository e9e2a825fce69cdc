"""What travels: the source archive holds all that an installation needs, and a wheel builds from it alone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "README_CN.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("colora_ms", "ops", "scripts", "model_zoo")


def python_files():
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "colora_ms").rglob("*.py")}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(source archive, wheel made from it), built in a copy of the tree and without a compiler, which takes minutes."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in TOP:
        shutil.copy2(ROOT / name, source / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name,
                        ignore=shutil.ignore_patterns("__pycache__", "_lib", "build", "*.egg-info", "output"))
    environment = {**os.environ, "PATH": str(folder), "CXX": ""}

    def run(*command):
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})")
    sdist = next(folder.glob("*.tar.gz"))
    shutil.rmtree(source / "ops")  # the wheel is to come from the archive alone
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation",
        "--disable-pip-version-check", "-w", str(folder), str(sdist))
    return sdist, next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        name = next(one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def test_the_source_archive_holds_packages_operators_recipes_and_pages(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    patterns = ("ops/cpu/*.cpp", "ops/cpu/*.h", "ops/cpu/*.py", "ops/ascend/**/*.cpp", "model_zoo/**/*.yaml",
                "model_zoo/**/*.md")
    wanted = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    missing = (python_files() | wanted | set(TOP)) - names
    assert not missing and len(wanted) > 50
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or "/_lib/" in name]


def test_the_wheel_holds_the_package_its_recipe_and_its_licence(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        recipe = wheel.read("colora_ms/recipes/data/quickstart.yaml").decode()
        scripts = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert python_files() <= names and any(name.endswith("LICENSE") for name in names)
    assert recipe == (ROOT / "model_zoo" / "smollm2-135m" / "quickstart.yaml").read_text(encoding="utf-8")
    assert "colora-ms = colora_ms.cli:main" in scripts
    tops = {name.partition("/")[0] for name in names}
    assert len(tops) == 2 and "colora_ms" in tops  # no tests, scripts or operators beside the package


def test_the_metadata_names_licence_pythons_and_extras(metadata):
    from colora_ms.extras import EXTRAS

    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.9", "<3.13"}
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 13)}
    assert pythons <= set(metadata.get_all("Classifier"))
    assert {*EXTRAS, "quickstart", "test", "dev"} == set(metadata.get_all("Provides-Extra"))
    assert metadata["Description-Content-Type"] == "text/markdown" and "# colora_ms" in metadata.get_payload()


def test_the_plain_installation_needs_nothing_of_an_extra(metadata):
    from colora_ms.extras import EXTRAS

    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {line.split()[0].split("=")[0].split("<")[0].split(">")[0].split("(")[0].lower() for line in required}
    assert names == {"mindspore", "numpy", "tokenizers", "safetensors", "gguf", "jinja2", "pyyaml", "tqdm"}
    assert not names & {name.split("=")[0] for packages in EXTRAS.values() for name in packages.values()}
