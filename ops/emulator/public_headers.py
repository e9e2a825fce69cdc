"""Type-check the device sources against the public headers themselves (mirror-cann/asc-devkit), without CANN.

    pip install libclang
    python ops/emulator/public_headers.py CHECKOUT [ANOTHER CHECKOUT ...]     # of mirror-cann/asc-devkit, at a version

Needs a host's C++ headers (g++). What only the device's compiler knows, its builtin functions and types, is made up
here: the headers are parsed, what they miss is declared as a function that takes anything, and they are parsed again.
So this sees what the headers declare (const-ness, overloads, structs, static assertions), not whether a builtin takes a
type.
Every operator is parsed in every dtype; an error counts if it lies in ops/ascend or in a template that was asked for
there. planted/accepted.cpp must be taken, and of planted/refused.cpp nothing but what headers leave to the compiler
(ELSEWHERE). Exit code: the number of units with errors.
"""
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ASCEND = HERE.parent / "ascend"
# Refused by the device's compiler, or by the argument checks of a debug build: not by a declaration.
ELSEWHERE = ("names of the device's compiler", "element types that an instruction lacks")

# Types of the device's compiler that have values by name; everything else is found by parsing.
PRELUDE = """
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __cbuf__
#define __ca__
#define __cb__
#define __cc__
#define __fbuf__
#define __ssbuf__
#define __in_pipe__(x)
#define __out_pipe__(x)
#define __inout_pipe__(x)
#define __sync_alias__
#define __sync_noalias__
#define __simd_callee__
#define __simd_vf__
#define __host__
#define GM_ADDR __gm__ uint8_t*
typedef _Float16 half;
typedef __bf16 bfloat16_t;
enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_ALL, PIPE_MTE4, PIPE_MTE5, PIPE_V2,
              PIPE_FIX };
enum event_t { EVENT_ID0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };
enum class dcci_dst_t { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };
enum class cache_line_t { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class Order_t { INDEX_VALUE, ONLY_INDEX, ONLY_VALUE, VALUE_INDEX };
enum class pad_t { PAD_NONE };
namespace bisheng {}
"""
GIVEN = {"half", "bfloat16_t", *re.findall(r"^enum (?:class )?(\w+)", PRELUDE, re.M)}


def load(name):
    spec = importlib.util.spec_from_file_location(f"emulator_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, table = load("build"), load("planted_table")


class Headers:
    """One checkout of the headers, with what it misses made up."""

    def __init__(self, root, folder):
        from clang import cindex

        if not (root / "include" / "kernel_operator.h").is_file():
            raise SystemExit(f"{root} is no checkout of asc-devkit: include/kernel_operator.h is not there")
        self.index, self.folder, self.invented = cindex.Index.create(), folder, {"types": set(), "values": set(),
                                                                                 "functions": set()}
        (folder / "kernel_tiling").mkdir(exist_ok=True)
        (folder / "kernel_tiling" / "kernel_tiling.h").write_text("#pragma once\n")
        system = ["", "include", "include/basic_api", "include/utils", "include/interface", "impl", "impl/basic_api",
                  "impl/utils"]
        host = [*Path("/usr/include/c++").glob("*"), *Path("/usr/include").glob("*-linux-gnu/c++/*"),
                *Path("/usr/lib/gcc").glob("*/*/include"), *Path("/usr/include").glob("*-linux-gnu"),
                Path("/usr/include")]
        self.options = ["-x", "c++", "-std=c++17", "-D__NPU_ARCH__=2201", "-ferror-limit=0", "-nostdinc", "-w"]
        self.options += [part for path in [*(root / one for one in system), *host] for part in ("-isystem", str(path))]
        ours = [folder, ASCEND, ASCEND / "common" / "op_kernel", ASCEND / "common" / "op_host",
                *ASCEND.glob("*/op_kernel")]
        self.options += [f"-I{path}" for path in ours]

    def prelude(self):
        return (PRELUDE + "".join(f"enum {one} {{ {one}_none }};\n" for one in sorted(self.invented["types"]))
                + "".join(f"enum {{ {one} }};\n" for one in sorted(self.invented["values"]))
                + "".join(f"template <class... A> inline int64_t {one}(A&&...) {{ return 0; }}\n"
                          for one in sorted(self.invented["functions"])))

    def errors(self, text, name="unit.cpp"):
        """The errors of a source, when nothing new is missing: [(message, [(file, line) of it and of its notes])]."""
        for _ in range(8):
            found, before = self.parse(text, name), sum(map(len, self.invented.values()))
            self.invent(found)
            if sum(map(len, self.invented.values())) == before:
                break
        return found

    def parse(self, text, name):
        path = str(self.folder / name)
        source = f'{self.prelude()}#include "kernel_operator.h"\n#line 1 "{path}"\n{text}'
        errors = []
        parsed = self.index.parse(path, args=self.options, unsaved_files=[(path, source)])
        for one in parsed.diagnostics:
            if one.severity >= 3:
                places, todo = [], [one]
                while todo:
                    it = todo.pop()
                    todo += list(it.children)
                    if it.location.file:
                        places.append((it.location.file.name, it.location.line))
                errors.append((one.spelling, places))
        self.lines = source.count("\n", 0, source.index("#line 1")) + 1
        return errors

    def invent(self, errors):
        for message, _ in errors:
            found = re.match(r"(use of undeclared identifier|unknown type name) '(\w+)'", message)
            if found and found.group(2) not in GIVEN:
                name = found.group(2)
                kind = ("types" if "type" in found.group(1) or name.endswith("_t") else
                        "values" if name[0].isupper() else "functions")
                self.invented[kind].add(name)
        self.invented["functions"] -= self.invented["types"]

    def problems(self, text):
        """What is wrong in, or because of, a source of ours: ["file:line: message"]."""
        found = []
        for message, places in self.errors(text):
            for file, line in places:
                if str(ASCEND) in file:
                    found.append(f"{Path(file).relative_to(ASCEND)}:{line}: {message}")
                    break
        return found

    def refused(self, path):
        """The lines of a file that do not compile."""
        lines = set()
        for _, places in self.errors(path.read_text(), "snippets.cpp"):
            lines |= {line - self.lines for file, line in places if file.endswith("snippets.cpp")}
        return lines


def unit(name, dtype):
    """One operator in one dtype, as a build makes it."""
    header, struct = build.KERNELS[name]
    macros = "".join(f"#define {macro} {dtype}\n" for macro in build.DTYPE_MACROS)
    return (f'#include "{ASCEND / header}"\n#define GET_TILING_DATA(data, address) {struct} data; (void)address\n'
            f'#undef KERNEL_TASK_TYPE_DEFAULT\n#define KERNEL_TASK_TYPE_DEFAULT(type)\n{macros}'
            f'#include "{build.kernel_source(name)}"\n')


def check(root):
    """Prints a line for each unit and returns the number of those with errors."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        headers = Headers(root, Path(folder))
        for name in build.KERNELS:
            for dtype, spelled in build.DTYPES.items():
                problems = headers.problems(unit(name, spelled))
                bad += bool(problems)
                print(f"{root.name:<28} {name:<22} {dtype:<9} {len(problems)} errors")
                print("".join(f"    {problem}\n" for problem in problems[:8]), end="")
        for file, sign in (("accepted", "API"), ("refused", "REFUSED")):
            path = HERE / "planted" / f"{file}.cpp"
            wrong = headers.refused(path)
            marked = {i: line for i, line in enumerate(path.read_text().splitlines(), 1) if f"// {sign} " in line}
            if file == "accepted":
                problems = [marked[i].strip() for i in sorted(wrong & set(marked))]
            else:
                expected = {name for what, names in table.REFUSED.items() if what not in ELSEWHERE for name in names}
                problems = [line for i, line in marked.items()
                            if i not in wrong and line.split("// REFUSED ")[1] in expected]
            bad += bool(problems)
            print(f"{root.name:<28} {path.name:<32} {len(problems)} of {len(marked)} marked lines are otherwise")
            print("".join(f"    {problem}\n" for problem in problems), end="")
    return bad


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    wrong = sum(check(Path(one).resolve()) for one in sys.argv[1:])
    print(f"{wrong} units with errors")
    sys.exit(wrong)
