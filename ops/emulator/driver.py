"""Run the emulated device kernels from Python: launch, findings, counters, and the plan of the LoRA operators."""
import ctypes
import json
import math

import numpy as np

INPUT, OUTPUT, WORKSPACE, INOUT = 0, 1, 2, 3
STRICT, INTERLEAVE, TRACE = 1, 2, 4


# ---- bfloat16 as uint16, since NumPy has none -----------------------------------------------------------------
def to_bfloat16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_dtype(values, dtype):
    """float array -> storage array of dtype (bfloat16 is stored as uint16)."""
    return to_bfloat16(values) if dtype == "bfloat16" else np.ascontiguousarray(values).astype(dtype)


def to_float64(stored, dtype):
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


# Half a unit in the last place, relative.
ROUNDING = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8, "float32": 2.0 ** -24}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class Emulator:
    """A library built by ops/emulator/build.py."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_report.restype = ctypes.c_char_p
        self.library.emulator_kernels.restype = ctypes.c_char_p
        self.library.emulator_instructions.restype = ctypes.c_char_p
        self.library.emulator_trace.restype = ctypes.POINTER(ctypes.c_uint32)

    def kernels(self):
        return self.library.emulator_kernels().decode().split()

    def launch(self, kernel, blocks, arguments, seed=0, flags=STRICT | INTERLEAVE, counters=True, cores=None):
        """Run `kernel` in `blocks` blocks on a chip of `cores` vector cores (None: as many as blocks; 40 or 48 on a
        910B). arguments: [(contiguous array, kind)]. Returns the report as a dict."""
        count = len(arguments)
        pointers = (ctypes.c_void_p * count)(*[a.ctypes.data if a.size else None for a, _ in arguments])
        sizes = (ctypes.c_uint64 * count)(*[a.nbytes for a, _ in arguments])
        kinds = (ctypes.c_int * count)(*[kind for _, kind in arguments])
        found = self.library.emulator_launch(kernel.encode(), blocks, cores or blocks, count, pointers, sizes, kinds,
                                             ctypes.c_uint64(seed), flags)
        if found < 0:
            raise ValueError(f"no kernel {kernel} with {count} arguments")
        if not counters and not found:
            return {"findings": []}
        return json.loads(self.library.emulator_report())


    def trace(self, cores):
        """Of the last launch with flag TRACE: a list with an array (instructions, 12) of uint32 for each core, the
        fields of ops/emulator/include/emulator/trace.h, and the names of the vector instructions by number."""
        found = []
        for core in range(cores):
            count = ctypes.c_uint64()
            pointer = self.library.emulator_trace(core, ctypes.byref(count))
            shape = (count.value, 12)
            found.append(np.ctypeslib.as_array(pointer, shape).copy() if count.value else np.zeros(shape, np.uint32))
        return found, self.library.emulator_instructions().decode().split()


# ---- the tiling of the LoRA operators, in Python for what the tests need; compared with the C++ one in test_contract
FIELDS = ("tokens", "hidden", "rank", "width", "rowWidth", "offset", "slots", "cores", "window", "unitIn", "unitOut",
          "exact")


def column_unit(columns, cores):
    for unit in (64, 32):
        if -(-columns // unit) * 2 > cores:
            return unit
    return 16


def plan_lora(tokens, hidden, rank, width, dtype, cores=48, row_width=None, offset=0, slots=1, exact=False):
    """(tiling array, workspace array) as plan_lora of lora_tiling_core.h makes them."""
    exact = exact or dtype != "float16"
    padded = -(-rank // 8) * 8
    window = min(64, max(tokens, 1))
    values = (tokens, hidden, rank, width, row_width or width, offset, slots, cores, window,
              column_unit(hidden, cores), column_unit(width, cores), int(exact))
    row = padded * 4 if exact else -(-rank // 16) * 32 + 32
    return np.array(values, np.uint32), np.empty(window * cores * padded * 4 + window * row, np.uint8)


def plan_multi_lora(tokens, hidden, rank, width, dtype, cores=48, slots=1, slices=1):
    """(tiling array, workspace array) as plan_multi_lora of multi_lora_tiling_core.h makes them."""
    rank8 = -(-rank // 8) * 8
    window = min(max(tokens, 1), 64)
    balance = (hidden * slices + width) * BYTES[dtype] // (8 * slices) + 1
    values = (tokens, hidden, rank, slices, width, slots, cores, window, column_unit(hidden, cores),
              column_unit(width, cores), 8, balance)
    return np.array(values, np.uint32), np.empty(2 * window * cores * slices * rank8 * 4, np.uint8)


def plan_contrastive_select(rows, vocab, requests, voices, dtype, cores=48):
    """(tiling array, workspace array) as plan_contrastive_select of contrastive_select_tiling_core.h makes them."""
    parts = cores // requests if 0 < requests <= cores else cores // math.gcd(max(requests, 1), cores)
    parts = max(1, min(parts, -(-vocab // 1024)))
    width = -(-(-(-vocab // parts)) // 64) * 64
    parts = -(-vocab // width)
    resident = requests * parts <= cores and width * BYTES[dtype] <= 114688
    values = (rows, vocab, requests, voices, cores, parts, width, int(resident))
    return np.array(values, np.uint32), np.empty(max(requests, 1) * parts * 64, np.uint8)


def plan_lily_mix(tokens, experts, rank, width, dtype, cores=48, row_width=None, offset=0, slots=1, exact=False):
    """(tiling array, workspace array) as plan_lily_mix of lily_mix_tiling_core.h makes them."""
    lora, workspace = plan_lora(tokens, 1, rank, width, dtype, cores, row_width, offset, slots, exact=exact)
    return np.append(lora, np.uint32(experts)), workspace
