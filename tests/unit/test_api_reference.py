"""The API reference: all names documented, all links lead somewhere; written without importing MindSpore."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_api_reference.py"


@pytest.fixture(scope="module")
def page():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("make_api_reference").Page()
    finally:
        sys.path.pop(0)


def test_it_is_written_on_demand_and_needs_no_mindspore(tmp_path):
    out = tmp_path / "new" / "API.md"
    code = (f"import runpy, sys; sys.argv = ['make_api_reference.py', '--out', {str(out)!r}]; sys.path.insert(0, "
            "'scripts')\nrunpy.run_path('scripts/make_api_reference.py', run_name='__main__')\n"
            "assert not {'mindspore', 'mindformers'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert out.read_text(encoding="utf-8").startswith("# API reference of colora_ms")


def test_every_public_name_and_method_has_a_docstring(page):
    assert page.undocumented() == []


@pytest.mark.parametrize("name", ["colora_ms", "colora_ms.decoding", "colora_ms.adapters", "colora_ms.models",
                                  "colora_ms.kernels", "colora_ms.serving", "colora_ms.integrations.mindformers"])
def test_the_names_found_in_the_sources_are_those_of_the_imported_package(page, name):
    package = importlib.import_module(name)
    found = [entry.name.rsplit(".", 1)[-1] for part, entries in page.sections[name] for entry in entries
             if part == name]
    assert sorted(found) == sorted(package.__all__)


def test_modules_without_all_are_covered(page):
    described = set(page.home.values())
    for name in ("training.config.TrainingConfig", "training.trainer.Trainer", "training.callback.AdapterCheckpoint",
                 "evaluation.evaluate.evaluate", "evaluation.significance.mcnemar", "errors.AdapterError"):
        assert f"colora_ms.{name}" in described or f"colora_ms.{name}" in page.home, name


def test_links_lead_somewhere(page):
    text = page.render()
    headings = re.findall(r"^#{2,3} (.+)$", text, re.M)
    assert len(set(headings)) == len(headings)
    anchors = [re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings]
    # As Markdown readers do: the second heading of the same fragment gets "-1".
    anchors = [one + f"-{anchors[:i].count(one)}" * (one in anchors[:i]) for i, one in enumerate(anchors)]
    for target in set(re.findall(r"\]\(([^)\s]+)\)", text)):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert target.startswith("http"), target


@pytest.mark.parametrize("doc, wanted", [
    ("One line.\n\nArgs:\n    x: (rows,) int32,\n        -1 for none.\n    a, b: two\n\nReturns:\n    A pair.",
     "One line.\n\n**Args**\n\n- **x**: (rows,) int32, -1 for none.\n- **a, b**: two\n\n**Returns**\n\nA pair."),
    ("See::\n\n    a < b\n\nand <this>, ``x*y``, a*b.", "See:\n\n```python\na < b\n```\n\nand \\<this>, `x*y`, a\\*b."),
    (":class:`nowhere.Thing` and ``code\nover lines``", "`nowhere.Thing` and `code\nover lines`"),
])
def test_docstrings_become_markdown(page, doc, wanted):
    assert page.markdown(doc) == wanted
