"""Plants bugs and sees whether they are caught.

    python ops/emulator/planted.py         # prints the table and the share, exit code 1 if one was missed

`outcomes()` gives one Outcome for each bug of planted_table.py; `share(outcomes)` is the measure `planted_bugs_caught`.
Everything is compiled without optimisation, a few seconds in all.
"""
import ctypes
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent


def _load(name):
    spec = importlib.util.spec_from_file_location(f"emulator_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, driver, lint, table = (_load(name) for name in ("build", "driver", "lint", "planted_table"))
SMALL_SOURCES = (HERE / "planted" / "small_memory.cpp", HERE / "planted" / "small_order.cpp")
REFUSED_SOURCE = HERE / "planted" / "refused.cpp"
INPUT, OUTPUT, WORKSPACE, INOUT, STRICT = driver.INPUT, driver.OUTPUT, driver.WORKSPACE, driver.INOUT, driver.STRICT


class Outcome(NamedTuple):
    name: str
    what: str     # the kind of the bug
    how: str      # "kernel", "compiler", "edit", "lint", "call"
    caught: bool
    told: str     # what was reported


def share(found):
    """Bugs caught over bugs planted."""
    return sum(one.caught for one in found) / len(found)


# ---- kernels ------------------------------------------------------------------------------------------------------
def whole_source(operator):
    """A kernel's source with its own headers in place, without any other line of the preprocessor."""
    seen = set()

    def read(path):
        seen.add(path.name)
        text = ""
        for line in path.read_text().splitlines(keepends=True):
            include = re.match(r'#include "(.+?)"', line)
            if include and include.group(1) not in seen and include.group(1) != "kernel_operator.h":
                places = [path.parent, build.ASCEND / "common" / "op_kernel"]
                text += read(next(p / include.group(1) for p in places if (p / include.group(1)).exists()))
            text += "\n" if line.startswith("#") else line
        return text

    return read(build.kernel_source(operator))


def edited(operator, name, pattern, replacement):
    """C++ of the kernel with the edit made, registered as edit_<name>; "" if there is no such place any more."""
    text, count = re.subn(pattern, replacement, whole_source(operator), count=1, flags=re.S)
    if count == 0:
        return ""
    symbol, arguments = f"edit_{name}", build.kernel_arguments(text, operator)
    text = re.sub(r"\bcolora\b", f"colora_{name}", text)  # one namespace an edit: the linker must not merge them
    return text.replace(f"void {operator}(", f"void {symbol}(") + build.registration(symbol, arguments)


def unchanged():
    """Controls, one for each kernel and dtype that is edited: nothing must be seen in them."""
    pairs = sorted({(operator, dtype) for _, operator, dtype, *_ in table.EDITS.values()})
    return {f"unchanged_{operator}_{dtype}": (operator, dtype) for operator, dtype in pairs}


def library(folder):
    """Compiles the small and the edited kernels into one library and returns it as an Emulator."""
    units = {"machine.cpp": build.HERE / "src" / "machine.cpp"}
    for path in SMALL_SOURCES:
        names = re.findall(r"^KERNEL\((\w+)\)", path.read_text(), re.M)
        units[path.name] = f'#include "{path}"\n' + "".join(build.registration(name, 4) for name in names)
    planted = [(operator, dtype, edited(operator, name, pattern, replacement))
               for name, (_, operator, dtype, pattern, replacement, _) in table.EDITS.items()]
    planted += [(operator, dtype, edited(operator, name, r"\Z", "")) for name, (operator, dtype) in unchanged().items()]
    for operator, dtype in sorted({one[:2] for one in planted}):
        header, struct = build.KERNELS[operator]
        units[f"{operator}_{dtype}.cpp"] = (
            f'#include "{build.ASCEND / header}"\n#include "kernel_operator.h"\n#define EMULATOR_TILING {struct}\n'
            + "".join(f"#define {macro} {build.DTYPES[dtype]}\n" for macro in build.DTYPE_MACROS)
            + "".join(text for *its, text in planted if tuple(its) == (operator, dtype)))
    return driver.Emulator(build.compile_units(units, Path(folder) / "planted.so", "-O0"))


def run_small(emulator, name, flags=STRICT, blocks=4, seed=3):
    """(findings, output) of a small kernel."""
    data, out = np.arange(4096, dtype=np.float32), np.zeros(4096, np.float32)
    workspace, tiling = np.zeros(4096, np.float32), np.zeros(16, np.uint32)
    given = [(data, INPUT), (out, OUTPUT), (workspace, WORKSPACE), (tiling, INPUT)]
    report = emulator.launch(name, blocks, given, seed, flags, cores=table.CORES.get(name))
    return report["findings"], out


class Case:
    """Operands of the LoRA operators, their results in float64, and whether a result is one of the kernel's."""

    def __init__(self, dtype, tokens=7, hidden=200, rank=12, width=120, bank=3, experts=3, ends=()):
        rng = np.random.default_rng(5)
        self.dtype, self.sizes = dtype, (tokens, hidden, rank, width, bank, experts)

        def normal(*shape):
            stored = driver.to_dtype(rng.standard_normal(shape), dtype)
            return stored, driver.to_float64(stored, dtype)

        self.x, x = normal(tokens, hidden)
        self.down, down = normal(bank, rank, hidden)
        self.up, up = normal(bank, rank, width)
        self.experts, mixed = normal(bank, experts, rank, width)
        self.y, y = normal(tokens, width)
        self.h = rng.standard_normal((tokens, rank)).astype(np.float32)
        self.router = rng.uniform(0.1, 1, (tokens, experts)).astype(np.float32)
        self.scale = np.array([0.5, 3.0, 1.75], np.float32)[:bank]
        self.slots = np.resize(np.array([2, -1, 0, 1, 2, 2, 1], np.int32), tokens)
        # Packed: slices of the outputs, adapters of several ranks, filled up with zeros.
        self.ends = np.array(ends or [width], np.int32)
        slices = len(self.ends)
        self.rows, rows = normal(bank, slices, rank, hidden)
        self.columns, columns = self.up.copy(), up.copy()
        for s in range(bank):
            own = (rank, 8, 4)[s]
            self.rows[s, :, own:], rows[s, :, own:], self.columns[s, own:], columns[s, own:] = 0, 0, 0, 0
        self.scales = rng.uniform(0.5, 2, (bank, slices)).astype(np.float32)
        self.shrunk, self.expanded, self.mixed, self.both = np.zeros((tokens, rank)), y.copy(), y.copy(), y.copy()
        for t, s in enumerate(self.slots):
            for i, end in enumerate(self.ends if s >= 0 else ()):
                part = slice(self.ends[i - 1] if i else 0, end)
                self.both[t, part] += self.scales[s, i] * ((rows[s, i] @ x[t]) @ columns[s][:, part])
            if s >= 0:
                self.shrunk[t] = self.scale[s] * (down[s] @ x[t])
                self.expanded[t] += self.h[t] @ up[s]
                self.mixed[t] += self.scale[s] * (self.h[t] @ np.tensordot(self.router[t].astype(float), mixed[s], 1))

    def launch(self, emulator, operator, symbol):
        """(findings, whether the result is right)."""
        tokens, hidden, rank, width, bank, experts = self.sizes
        slots, scale = (self.slots, INPUT), (self.scale, INPUT)
        if operator == "lora_shrink":
            tiling, workspace = driver.plan_lora(tokens, hidden, rank, 1, self.dtype, slots=bank)
            out, want = np.full((tokens, rank), np.nan, np.float32), self.shrunk
            given = [(self.x, INPUT), (self.down, INPUT), scale, slots, (out, OUTPUT)]
        elif operator == "multi_lora":
            tiling, workspace = driver.plan_multi_lora(tokens, hidden, rank, width, self.dtype, slots=bank,
                                                       slices=len(self.ends))
            out, want = self.y.copy(), self.both
            given = [(self.x, INPUT), (self.rows, INPUT), (self.columns, INPUT), (self.scales, INPUT), slots,
                     (out, INOUT), (self.ends, INPUT), (out, INOUT)]
        else:
            out = self.y.copy()
            if operator == "lora_expand":
                tiling, workspace = driver.plan_lora(tokens, 1, rank, width, self.dtype, slots=bank)
                given, want = [(self.h, INPUT), (self.up, INPUT), slots], self.expanded
            else:
                tiling, workspace = driver.plan_lily_mix(tokens, experts, rank, width, self.dtype, slots=bank)
                given = [(self.h, INPUT), (self.router, INPUT), (self.experts, INPUT), scale, slots]
                want = self.mixed
            given += [(out, INOUT), (out, INOUT)]
        report = emulator.launch(symbol, 48, [*given, (workspace, WORKSPACE), (tiling, INPUT)], 1)
        got = out if out.dtype == np.float32 else driver.to_float64(out, self.dtype)
        allowed = 4 * driver.ROUNDING[self.dtype] * (np.abs(want) + np.abs(want).max(axis=1, keepdims=True)) + 1e-4
        return report["findings"], bool(np.isfinite(got).all() and (np.abs(got - want) <= allowed).all())


class Choice:
    """Operands of contrastive_select: ties far apart, cuts of several depths, a request of one row."""

    def __init__(self, dtype, rows=5, vocab=3000):
        rng, self.dtype = np.random.default_rng(6), dtype
        self.logits = driver.to_dtype(rng.standard_normal((rows, vocab)), dtype)
        self.logits[:, 2900] = self.logits[:, 10] = driver.to_dtype(np.array([6, 1, 5, 1, 1]), dtype)
        self.logits[2:4, 700] = driver.to_dtype(np.array([2, -8]), dtype)  # the best of request 1, by its own cut alone
        self.mix = np.array([[0, 1, -1], [2, 3, 4], [3, -1, -1]], np.int32)
        self.weights = np.array([[1.5, -0.5, 0], [1.25, -0.5, 0.25], [1, 0, 0]], np.float32)
        self.alpha = np.log(np.array([0.1, 0.02, 0.5])).astype(np.float32)
        logits, self.ints, self.floats, self.valid = driver.to_float64(self.logits, dtype), [], [], []
        for rows_of, weights, alpha in zip(self.mix, self.weights, self.alpha):
            score = sum(w * logits[r] for r, w in zip(rows_of, weights.astype(float)) if r >= 0)
            lead = logits[rows_of[0]]
            token = int(np.where(lead >= lead.max() + alpha, score, -np.inf).argmax())
            self.ints.append([token, int(lead.argmax())])
            self.floats.append([score[token], lead.max(), *(logits[r, token] if r >= 0 else 0 for r in rows_of)])
            # A logit within rounding of the cut may count or not; a single row has no cut.
            self.valid.append([vocab] * 2 if (rows_of >= 0).sum() == 1 else
                              [int((lead >= lead.max() + alpha + off).sum()) for off in (1e-4, -1e-4)])

    def launch(self, emulator, _, symbol):
        """(findings, whether all results are right)."""
        tiling, workspace = driver.plan_contrastive_select(*self.logits.shape, *self.mix.shape, self.dtype)
        ints, floats = np.full((3, 3), -1, np.int32), np.full((3, 5), np.nan, np.float32)
        report = emulator.launch(symbol, 48, [
            (self.logits, INPUT), (self.mix, INPUT), (self.weights, INPUT), (self.alpha, INPUT), (ints, OUTPUT),
            (floats, OUTPUT), (workspace, WORKSPACE), (tiling, INPUT)], 1)
        least, most = np.array(self.valid).T
        right = (ints[:, :2].tolist() == self.ints and ((least <= ints[:, 2]) & (ints[:, 2] <= most)).all()
                 and np.allclose(floats, self.floats, rtol=1e-5, atol=1e-5))
        return report["findings"], bool(right)


def case_of(operator, dtype, **sizes):
    return Choice(dtype) if operator == "contrastive_select" else Case(dtype, **sizes)


def launched(emulator):
    """Outcomes of the small and the edited kernels."""
    for name, (what, kinds) in table.SMALL.items():
        told = {finding["kind"] for finding in run_small(emulator, name)[0]}
        yield Outcome(name, what, "kernel", bool(told) and told <= kinds, ", ".join(sorted(told)))
    for name, (operator, dtype) in unchanged().items():
        findings, right = case_of(operator, dtype).launch(emulator, operator, f"edit_{name}")
        assert right and not findings, f"{operator} without an edit, in {dtype}: {findings or 'a wrong result'}"
    there = emulator.kernels()
    for name, (what, operator, dtype, _, _, expected) in table.EDITS.items():
        if f"edit_{name}" not in there:
            yield Outcome(name, what, "edit", False, f"the edit no longer applies to {operator}")
            continue
        findings, right = case_of(operator, dtype, **table.SIZES.get(name, {})).launch(emulator, operator,
                                                                                   f"edit_{name}")
        told = {finding["kind"] for finding in findings} | (set() if right else {"wrong"})
        yield Outcome(name, what, "edit", bool(told & expected), ", ".join(sorted(told)))


# ---- the compiler, the lints, the calls ----------------------------------------------------------------------------
def refused_lines():
    """{name: what the compiler says of its line} of planted/refused.cpp; "" where it takes the line. All are compiled
    at once; what then is not named, alone (some compilers stop after a number of errors)."""
    lines = REFUSED_SOURCE.read_text().splitlines(keepends=True)
    places = {found.group(1): i for i, line in enumerate(lines, 1) if (found := re.search(r"// REFUSED (\w+)", line))}
    told = _errors("".join(lines))
    for name, place in places.items():
        if place not in told:
            alone = "".join(line for i, line in enumerate(lines, 1) if i == place or i not in places.values())
            told[place] = "; ".join(_errors(alone).values())
    return {name: told[place] for name, place in places.items()}


def _errors(source):
    """{line of `source`: the first error that the compiler has for it}; a compiler that fails without naming a line of
    it is an error here, with what it printed."""
    done = subprocess.run([build.compiler(), *build.flags("-O0"), "-fsyntax-only", "-xc++", "-"], input=source,
                          capture_output=True, text=True)
    found = {}
    for line, what in re.findall(r"^<stdin>:(\d+):\d+:\s+(error: .*|required from.*)$", done.stderr, re.M):
        found.setdefault(int(line), what)
    if done.returncode and not found:
        raise RuntimeError(f"{build.compiler()} failed without an error in a line of {REFUSED_SOURCE.name}:\n"
                           f"{done.stderr[-4000:]}")
    return found


def compiled():
    lines = refused_lines()
    for what, names in table.REFUSED.items():
        for name in names:
            yield Outcome(name, what, "compiler", bool(lines[name]), lines[name])


def linted():
    for name, (what, file, pattern, replacement) in table.LINTS.items():
        path = build.ASCEND / file
        text, count = re.subn(pattern, replacement, path.read_text(), count=1)
        if count == 0:
            yield Outcome(name, what, "lint", False, f"the edit no longer applies to {file}")
            continue
        if name in ("task_type", "schedule_mode"):
            operator = file.split("/")[0]
            tiling = build.ASCEND / operator / "op_host" / f"{operator}_tiling.cpp"
            kernel = build.kernel_source(operator)
            found = lint.launch_problems(text if path == kernel else kernel.read_text(),
                                         text if path == tiling else tiling.read_text())
        else:
            found = (lint.host_problems if path.parent.name == "op_host" else lint.kernel_problems)(text)
        yield Outcome(name, what, "lint", bool(found), "; ".join(text for _, text in found))


ARGUMENTS = {  # of the emulated operators as MindSpore calls them: (name, shape, dtype), the output last
    "LoraShrink": (("x", (7, 200), "float16"), ("down", (3, 12, 200), "float16"), ("scale", (3,), "float32"),
                   ("slots", (7,), "int32"), ("h", (7, 12), "float32")),
    "LoraExpand": (("h", (7, 12), "float32"), ("up", (3, 12, 120), "float16"), ("slots", (7,), "int32"),
                   ("y", (7, 120), "float16"), ("out", (7, 120), "float16")),
}


def called(path):
    """Wrong calls of the operators in the library `path`."""
    emulated = ctypes.CDLL(str(path))
    emulated.colora_emulator_error.restype = ctypes.c_char_p
    for name, (what, operator, argument, change) in table.CALLS.items():
        tensors = [list(one) for one in ARGUMENTS[operator]]
        value = change if isinstance(change, int) else 0
        for one in tensors:
            if one[0] == argument and not isinstance(change, int):
                one[1 if isinstance(change, tuple) else 2] = change
        arrays = [np.full(shape, value if one == argument else 0, "uint16" if dtype == "bfloat16" else dtype)
                  for one, shape, dtype in tensors]
        count = len(tensors)
        shapes = [np.array(shape, np.int64) for _, shape, _ in tensors]
        status = getattr(emulated, operator)(
            count, (ctypes.c_void_p * count)(*[a.ctypes.data for a in arrays]),
            (ctypes.c_int * count)(*[len(shape) for shape in shapes]),
            (ctypes.c_void_p * count)(*[shape.ctypes.data for shape in shapes]),
            (ctypes.c_char_p * count)(*[dtype.encode() for *_, dtype in tensors]), None, None)
        told = emulated.colora_emulator_error().decode() if status else ""
        yield Outcome(name, what, "call", status == 1 and operator in told and argument in told, told)


def outcomes(emulated=None):
    """All of them. emulated: the emulator's library, if it is there already."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(launched(library(folder)))
    return found + list(compiled()) + list(linted()) + list(called(emulated or build.build()))


if __name__ == "__main__":
    everything = outcomes()
    for outcome in everything:
        print(f"{'caught' if outcome.caught else 'MISSED':<6} {outcome.how:<8} {outcome.name:<28} {outcome.what}: "
              f"{outcome.told[:90]}")
    print(f"{sum(one.caught for one in everything)} of {len(everything)} bugs caught, "
          f"{len({one.what for one in everything})} kinds; share {share(everything):.4f}")
    sys.exit(share(everything) < 1)
