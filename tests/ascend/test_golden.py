"""scripts/verify_on_npu.sh and ops/ascend/golden.py, with the emulator in the place of the NPU."""
import os
import subprocess
import sys

import numpy as np
import pytest

from emulated import ROOT, load_module

pytest.importorskip("mindspore")
golden = load_module(ROOT / "ops" / "ascend" / "golden.py", "ascend_golden")


def test_the_command_ends_with_zero(emulator):
    done = subprocess.run(["bash", str(ROOT / "scripts" / "verify_on_npu.sh"), "--emulated"], capture_output=True,
                          text=True,
                          env={**os.environ, "PYTHON": sys.executable}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(golden.LORA) + len(golden.MIX) + len(golden.SELECT)
    assert f"{count} of {count} cases right on CPU" in done.stdout


def test_a_wrong_result_is_told(emulator, tmp_path):
    good, bad = golden.lora_case(3, 64, 4, 32, "float32"), golden.lora_case(3, 64, 4, 48, "float32")
    bad["want"][0, 5] += 1e-2
    np.savez(tmp_path / "good.npz", **good)
    np.savez(tmp_path / "wrong.npz", **bad)
    done = subprocess.run([sys.executable, str(ROOT / "ops" / "ascend" / "golden.py"), "run", str(tmp_path), "--target",
                           "CPU"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "WRONG" in done.stdout and "1 of 2 cases right" in done.stdout


def test_without_toolkit_it_says_so():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND")}
    environment["ASCEND_HOME_PATH"] = "/nowhere"
    done = subprocess.run(["bash", str(ROOT / "scripts" / "verify_on_npu.sh")], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 1 and "ASCEND_HOME_PATH=/nowhere is no folder" in done.stderr
