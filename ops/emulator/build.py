"""Compile the device sources of ops/ascend against the emulator into one shared library.

    python ops/emulator/build.py [OUTPUT.so]

The library exports `emulator_launch` (used by the tests) and one ahead-of-time entry per operator for
`ops.Custom(func_type="aot")` on a CPU (see src/aot.cpp). Every `op_kernel/*.cpp` is compiled once per dtype, from the
file that a CANN build would take.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ASCEND = HERE.parent / "ascend"
LIBRARY = "libcolora_emulator.so"

DTYPES = {"float16": "half", "bfloat16": "bfloat16_t", "float32": "float"}
DTYPE_MACROS = ("DTYPE_X", "DTYPE_UP", "DTYPE_LOGITS")  # CANN defines DTYPE_<INPUT>
# operator: (tiling header, tiling struct, namespace included)
KERNELS = {
    "multi_lora": ("multi_lora/op_host/multi_lora_tiling_core.h", "colora::MultiLoraTilingData"),
    "lora_shrink": ("common/op_host/lora_tiling_core.h", "colora::LoraTilingData"),
    "lora_expand": ("common/op_host/lora_tiling_core.h", "colora::LoraTilingData"),
    "contrastive_select": ("contrastive_select/op_host/contrastive_select_tiling_core.h",
                           "colora::ContrastiveSelectTilingData"),
    "lily_mix": ("lily_mix/op_host/lily_mix_tiling_core.h", "colora::LilyMixTilingData"),
}


def kernel_source(name):
    return ASCEND / name / "op_kernel" / f"{name}.cpp"


def kernel_arguments(text, name):
    """Number of GM_ADDR parameters of the kernel function `name` in a source text."""
    found = re.search(r"__global__ __aicore__ void %s\((.*?)\)" % re.escape(name), text, re.S)
    if not found:
        raise ValueError(f"no kernel function {name} in its source")
    return found.group(1).count("GM_ADDR")


def registration(symbol, count):
    """C++ lines that make a compiled kernel known to emulator_launch under its symbol's name."""
    pointers = ", ".join(f"static_cast<uint8_t*>(a[{i}])" for i in range(count))
    call = f"[](void** a) {{ {symbol}({pointers}); }}"
    return f'static emulator::Registered registered_{symbol}("{symbol}", {count}, {call});\n'


def wrapper(name):
    """A translation unit that compiles one kernel once for each dtype, under the symbols <name>_<dtype>."""
    source = kernel_source(name)
    header, struct = KERNELS[name]
    text = f'#include "{ASCEND / header}"\n#define EMULATOR_TILING {struct}\n'
    for dtype, spelled in DTYPES.items():
        symbol = f"{name}_{dtype}"
        text += ("".join(f"#define {macro} {spelled}\n" for macro in DTYPE_MACROS) + f"#define {name} {symbol}\n"
                 f'#include "{source}"\n#undef {name}\n' + "".join(f"#undef {macro}\n" for macro in DTYPE_MACROS) +
                 f"{registration(symbol, kernel_arguments(source.read_text(), name))}")
    return text


def flags(optimise="-O3"):
    """Compiler flags; without optimisation also without this machine's own instructions (compiles faster). A value that
    braces would cut is an error, as it is for the device's compiler."""
    native = [] if optimise == "-O0" else ["-march=native"]
    include = [f"-I{HERE / 'include'}", f"-I{ASCEND / 'common' / 'op_kernel'}",
               f"-I{ASCEND / 'common' / 'op_host'}", f"-I{ASCEND}"]
    include += [f"-I{ASCEND / name / 'op_kernel'}" for name in KERNELS]
    return ["-std=c++17", optimise, *native, "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall",
            "-Wno-unused-parameter", "-Werror=narrowing", *include]


def compiler():
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler found: install g++ (or set CXX) to build the emulated Ascend operators")


def compile_units(units, output, optimise="-O3", jobs=2):
    """Compile {file name: source text or Path} and link them into `output` (written whole or not at all)."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def one(item):
            name, text = item
            source = text
            if not isinstance(text, Path):
                source = folder / name
                source.write_text(text)
            target = folder / (name + ".o")
            done = subprocess.run([compiler(), *flags(optimise), "-c", str(source), "-o", str(target)],
                                  capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"compiling {name} failed:\n{done.stderr[-4000:]}")
            return str(target)

        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(one, units.items()))
        temporary = output.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run([compiler(), "-shared", "-pthread", *objects, "-o", str(temporary)],
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"linking {output.name} failed:\n{done.stderr[-4000:]}")
        os.replace(temporary, output)
    return output


def sources():
    """Every file that the library depends on."""
    files = [Path(__file__)]
    for folder in (HERE, ASCEND):
        files += [p for p in folder.rglob("*") if p.suffix in (".h", ".cpp") and "planted" not in p.parts
                  and ("op_host" not in p.parts or p.name.endswith("_tiling_core.h"))]
    return files


def build(output=None, jobs=2):
    """Build the library unless `output` is newer than all its sources; returns its path."""
    output = Path(output or HERE / "build" / LIBRARY)
    if output.exists() and output.stat().st_mtime > max(p.stat().st_mtime for p in sources()):
        return output
    units = {f"{name}.cpp": HERE / "src" / f"{name}.cpp" for name in ("machine", "aot")}
    for name in KERNELS:
        units[f"{name}.cpp"] = wrapper(name)
    return compile_units(units, output, jobs=jobs)


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else None))
