"""The plain installation imports, decodes and trains without the extras' packages; what needs one names the extra."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from colora_ms.errors import ConfigError, DataError
from colora_ms.extras import load, needed

#: Modules that are nothing without their extra.
HTTP = "colora_ms.serving.http"
BRIDGE = {f"colora_ms.integrations.mindformers.{name}" for name in ("cells", "contrast", "pet")}


@pytest.fixture(scope="module")
def probe():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("extras_probe.py"))], capture_output=True,
                          text=True, timeout=300, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_all_modules_but_those_of_an_extra_are_imported_without_the_extras(probe):
    found, _ = probe
    failed = {name for name in found["modules"] if name != HTTP and not name.startswith(f"{HTTP}.")}
    assert failed <= BRIDGE and found["imported"] > 150


def test_what_needs_an_extra_names_it(probe):
    found, errors = probe
    expected = {"draw": ("ConfigError", "plots"), "generate": ("DataError", "data"), "read": ("DataError", "data"),
                "register": ("ConfigError", "mindformers")}
    for name, (kind, extra) in expected.items():
        given, text = found["calls"][name]
        assert given == kind and text.endswith(f"which is not installed; run pip install 'colora-ms[{extra}]'"), text
    assert found["modules"][HTTP][0] == "ConfigError"
    assert found["calls"]["command"] == 1
    assert ("serving over HTTP needs the package fastapi, which is not installed; run pip install 'colora-ms[serve]'"
            in errors)


def test_another_failure_of_an_import_stays_what_it_is():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needed("plots", "drawing"):
        import no_such_module  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name"), needed("plots", "drawing"):
        from json import no_such_name  # noqa: F401
    with pytest.raises(DataError, match=r"a test needs the package prometheus-client, .* 'colora-ms\[serve\]'"), \
            needed("serve", "a test", DataError):
        raise ModuleNotFoundError("no", name="prometheus_client.core")


def test_a_module_that_is_there_is_handed_over():
    assert load("json", "plots", "a test") is json
    with pytest.raises(ConfigError, match="a test needs the package matplotlib"):
        raise_missing()


def raise_missing():
    with needed("plots", "a test"):
        raise ModuleNotFoundError("no", name="matplotlib")
