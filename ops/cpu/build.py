"""Compiles ops/cpu/*.cpp into one shared library.

Every source is compiled once per instruction set (AVX-512, AVX2, baseline; only the baseline on machines that are not
x86-64); ``dispatch.cpp`` is compiled once and picks the variant when the library is loaded. Needs g++ or clang++
and nothing else::

    python ops/cpu/build.py colora_ms/_lib/libcolora_cpu.so
"""

import argparse
import concurrent.futures
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden",
         "-D_GLIBCXX_USE_CXX11_ABI=0", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes",
         "-Wno-unknown-pragmas", "-Wno-uninitialized"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g",
                  "-O1"]
X86_VARIANTS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma",
               "-mprefer-vector-width=512"],
}


class BuildError(RuntimeError):
    """No usable compiler, or a source does not compile; the message carries the compiler's output."""


def find_compiler(compiler=None):
    """The C++ compiler to use: the argument, else $CXX, else g++, else clang++."""
    candidates = [compiler] if compiler else [os.environ.get("CXX"), "g++", "clang++", "c++"]
    for candidate in candidates:
        if candidate and shutil.which(candidate.split()[0]):
            return candidate
    raise BuildError(f"no C++ compiler found (tried {', '.join(c for c in candidates if c)}); install g++ or clang++")


def variants():
    """Instruction sets compiled on this machine: name -> compiler flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return X86_VARIANTS
    return {"baseline": []}


def _objects(sanitize):
    """(source, variant name, flags) of every object file, in link order.

    Baseline objects come first: inline functions that several variants emit as weak symbols are then taken from the
    baseline, so no AVX-512 instruction can reach a machine without it through a shared template.
    """
    extra = SANITIZE_FLAGS if sanitize else []
    names = variants()
    have = ["-DCOLORA_HAVE_X86_VARIANTS"] if len(names) > 1 else []
    for variant, isa_flags in names.items():
        define = [f"-DCOLORA_ISA_NAMESPACE=colora_{variant}", f"-DCOLORA_ISA_{variant.upper()}"]
        for source in sorted(SOURCE_DIR.glob("*.cpp")):
            if source.stem == "dispatch" and variant != "baseline":
                continue
            yield source, variant, FLAGS + extra + have + define + isa_flags


def _digest(compiler, sanitize):
    digest = hashlib.sha256(f"{compiler} {FLAGS} {SANITIZE_FLAGS if sanitize else ''} {variants()}".encode())
    for path in sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h"), Path(__file__).resolve()]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stderr


def build(out_path, compiler=None, sanitize=False, jobs=None, say=None):
    """Compile the library.

    Args:
        out_path: file to write; replaced in one step, so a process that has the old one loaded keeps it.
        compiler: C++ compiler command, see `find_compiler`.
        sanitize: build with AddressSanitizer and UndefinedBehaviorSanitizer.
        jobs: parallel compilations (default: number of cores).
        say: called with a line of text before the first compilation and after each; None: silent.

    Raises:
        BuildError: no compiler, or a compilation failed.
    """
    out_path = Path(out_path)
    compiler = find_compiler(compiler)
    stamp = out_path.with_name(out_path.name + ".digest")
    wanted = _digest(compiler, sanitize)
    if out_path.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return
    out_path.parent.mkdir(parents=True, exist_ok=True)
    # Object files are kept next to the library, keyed by content, so that one changed source is one compilation.
    cache = out_path.parent / (out_path.name + ".objects")
    cache.mkdir(exist_ok=True)
    headers = hashlib.sha256()
    for path in sorted(SOURCE_DIR.glob("*.h")):
        headers.update(path.name.encode() + b"\0" + path.read_bytes())
    say = say or (lambda line: None)
    items = list(_objects(sanitize))
    done = itertools.count(1)
    say(f"compiling the CPU operators, {len(items)} objects, with {compiler}")
    with tempfile.TemporaryDirectory(dir=out_path.parent) as work:
        def compile_one(item):
            source, variant, flags = item
            key = hashlib.sha256(headers.digest() + f"{compiler} {flags}".encode() + source.read_bytes()).hexdigest()
            kept = cache / f"{source.stem}.{variant}.{key[:20]}.o"
            if not kept.is_file():
                target = Path(work) / kept.name
                warnings = _run([*compiler.split(), *flags, "-c", str(source), "-o", str(target)])
                if warnings:
                    print(warnings, file=sys.stderr)
                os.replace(target, kept)
            os.utime(kept)
            say(f"  {next(done)}/{len(items)} {source.name} ({variant})")
            return kept

        with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, items))
        linked = Path(work) / out_path.name
        sanitizers = SANITIZE_FLAGS[:1] if sanitize else []
        _run([*compiler.split(), "-shared", "-pthread", *sanitizers, "-o", str(linked), *map(str, objects)])
        os.replace(linked, out_path)
        stamp.write_text(wanted)
    _forget_old(cache)


def _forget_old(cache, keep=200):
    """Bound the object cache; the newest files stay."""
    files = sorted(cache.glob("*.o"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[keep:]:
        path.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="library to write, e.g. colora_ms/_lib/libcolora_cpu.so")
    parser.add_argument("--compiler", help="C++ compiler (default: $CXX, g++, clang++)")
    parser.add_argument("--sanitize", action="store_true", help="AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--jobs", type=int, help="parallel compilations")
    parser.add_argument("--progress", action="store_true", help="a line for each object that is compiled")
    arguments = parser.parse_args()
    try:
        build(arguments.out, arguments.compiler, arguments.sanitize, arguments.jobs,
              functools.partial(print, flush=True) if arguments.progress else None)
    except BuildError as error:
        sys.exit(f"build of {arguments.out} failed: {error}")


if __name__ == "__main__":
    main()
