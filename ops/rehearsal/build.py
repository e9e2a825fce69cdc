"""Compile the stand-ins of Ascend's built-in operators into one shared library, kept by the content of its sources.

    python ops/rehearsal/build.py [OUTPUT.so]
"""
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("call", "dense", "attention", "grouped", "experts", "training")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-shared", "-Wall",
         "-Wno-unused-parameter"]


def compiler():
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler found: install g++ (or set CXX) to build the rehearsal's stand-ins")


def digest():
    """What the library is made of: sources, this file, compiler, and the instructions that this machine knows."""
    files = sorted(HERE.glob("*.cpp")) + sorted(HERE.glob("*.h")) + [Path(__file__)]
    information = Path("/proc/cpuinfo")
    flags = [line for line in information.read_text().splitlines() if line.startswith(("flags", "Features"))][:1] \
        if information.is_file() else []
    parts = [path.read_bytes() for path in files] + [compiler().encode(), "".join(flags).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def build(output=None):
    """Build the library unless one of the same content is there; returns its path.

    The default path has the digest in its name: a graph that was kept names its library by the path.
    """
    output = Path(output) if output else HERE / "build" / f"libcolora_rehearsal_{digest()}.so"
    if output.is_file() and digest() in output.name:
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(f".{os.getpid()}.tmp")
    done = subprocess.run([compiler(), *FLAGS, *[str(HERE / f"{name}.cpp") for name in SOURCES], "-o", str(temporary)],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling the rehearsal's stand-ins failed:\n{done.stderr[-4000:]}")
    os.replace(temporary, output)
    return output


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else None))
