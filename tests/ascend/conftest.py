"""Fixtures of the emulator tests: the library is built once, into ops/emulator/build."""
import shutil

import pytest

import emulated


@pytest.fixture(scope="session")
def emulator():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler: install g++ to run the emulated Ascend kernels")
    return emulated.Emulator(emulated.build.build())


@pytest.fixture(scope="session")
def build():
    return emulated.build
