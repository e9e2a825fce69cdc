"""What no compiler of a host sees in the sources of ops/ascend: rules of the device's compiler, of its address spaces,
and of what host and device say about one launch.

    python ops/emulator/lint.py            # prints the problems of ops/ascend, exit code 1 if there are any
"""
import re
import sys
from pathlib import Path

ASCEND = Path(__file__).resolve().parent.parent / "ascend"

#: Names that the device's compiler defines; as identifiers of a kernel they are macros or builtin variables there.
RESERVED = re.compile(r"\b(?:__cce_\w+|__CCE_\w+|block_idx|block_num|sub_block_idx)\b")
#: Macros that only the device's compiler defines: a branch of the host under one of them is never taken.
DEVICE_MACROS = re.compile(r"\b(?:__CCE\w*|__DAV_\w+|__NPU_ARCH__|__NPU_DEVICE__|ASCENDC_\w+|__aicore__)\b")
NOT_ON_A_DEVICE = {
    r"\bdouble\b": "double does not exist on the device",
    r"(?<![\w.])\d+\.\d*(?:[eE][-+]?\d+)?(?![\dfF.eE])": "a literal of type double",
    r"\bstd::": "the C++ library does not exist on the device",
    r"\b(?:new|delete|throw|try|catch|virtual|dynamic_cast|thread_local|goto)\b": "not in device code",
    r"\bstatic\s+(?!constexpr|inline|__aicore__|_)": "a static variable that is no constexpr",
    r"\bprintf\s*\(": "output from a kernel",
    # Members of the emulator's own classes that the device's do not have.
    r"\.(?:usable|low|high|generation|check)\b(?!_)": "a member of the emulator alone",
}


def without_comments(text):
    """The source with comments and string literals blanked; lines keep their numbers."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"',
                  lambda found: re.sub(r"[^\n]", " ", found.group()), text, flags=re.S)


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def kernel_problems(text):
    """[(line, sentence)] for one source of op_kernel."""
    found, code = [], without_comments(text)
    for include in re.finditer(r'^#include\s+([<"].+?[>"])', text, re.M):
        if include.group(1).startswith("<"):
            found.append((line_of(text, include.start()), f"includes {include.group(1)}, a header of the host"))
    code = re.sub(r"^#.*$", lambda line: " " * len(line.group()), code, flags=re.M)
    for name in RESERVED.finditer(code):
        found.append((line_of(code, name.start()), f"{name.group()} is a name of the device's compiler"))
    for pattern, sentence in NOT_ON_A_DEVICE.items():
        for match in re.finditer(pattern, code):
            found.append((line_of(code, match.start()), f"{sentence}: {match.group().strip()}"))
    for cast in re.finditer(r"reinterpret_cast<([^<>]*)\*\s*>", code):
        if not re.search(r"\b__(?:gm|ubuf)__\b", cast.group(1)):
            found.append((line_of(code, cast.start()), f"a pointer to {cast.group(1).strip()} without __gm__"))
    function = r"^[ \t]*((?:[\w:<>,&* \t]|\btemplate\b)*?)\b(\w+(?:<T>::\w+)?)\(([^;{}]*)\)\s*(?:const\s*)?\{"
    for head in re.finditer(function, code, re.M):
        before, name = head.group(1), head.group(2)
        statement = name in ("if", "for", "while", "switch", "return") or re.search(r"\breturn\b|=", before)
        if not statement and before.strip() not in ("", "else") and "__aicore__" not in before:
            found.append((line_of(code, head.start(2)), f"the function {name} has no __aicore__"))
    return sorted(found)


def host_problems(text):
    """[(line, sentence)] for one source of op_host: it runs where no device macro is defined."""
    code = without_comments(text)
    return [(line_of(code, m.start()), f"{m.group()} is a macro of the device's compiler: the host never has it")
            for m in DEVICE_MACROS.finditer(code)]


def launch_problems(kernel, tiling):
    """What the kernel's source (its .cpp) and its tiling function say about one launch. SyncAll waits for every core:
    the kernel needs the type with the hardware's meeting, and all cores must start together (schedule mode 1)."""
    meets = "SyncAll(" in without_comments(kernel)
    kind = re.search(r"KERNEL_TASK_TYPE_DEFAULT\((\w+)\)", kernel)
    found = []
    if kind is None or kind.group(1) != ("KERNEL_TYPE_MIX_AIV_1_0" if meets else "KERNEL_TYPE_AIV_ONLY"):
        found.append((1, f"task type {kind.group(1) if kind else '(none)'} of a kernel "
                         f"{'with' if meets else 'without'} SyncAll"))
    launch = re.search(r"\bLaunch\w*(?:<\w+>)?\(.*?\b(true|false)\);", without_comments(tiling), re.S)
    if launch is None or (launch.group(1) == "true") != meets:
        found.append((1, f"the tiling function launches with meet = {launch.group(1) if launch else '(nothing)'}, the "
                         f"kernel {'calls' if meets else 'does not call'} SyncAll"))
    return found


def all_problems(folder=ASCEND):
    """["file:line: sentence"] over the sources of ops/ascend."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cpp") and path.parent.name in ("op_kernel", "op_host"):
            check = kernel_problems if path.parent.name == "op_kernel" else host_problems
            found += [f"{path.relative_to(folder)}:{line}: {text}" for line, text in check(path.read_text())]
    for kernel in sorted(folder.glob("*/op_kernel/*.cpp")):
        tiling = kernel.parent.parent / "op_host" / f"{kernel.stem}_tiling.cpp"
        if tiling.exists():
            found += [f"{kernel.relative_to(folder)}: {text}"
                      for _, text in launch_problems(kernel.read_text(), tiling.read_text())]
    return found


if __name__ == "__main__":
    problems = all_problems()
    print("\n".join(problems) or "no problems")
    sys.exit(bool(problems))
