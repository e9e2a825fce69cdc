// What the cost model (scripts/ascend_costs.py) needs of a launch: each core's instructions in program order, with what
// each of them has to wait for. Recorded only when a launch asks for it.
#pragma once
#include <cstdint>

namespace emulator {

struct TraceEntry {
    uint32_t pipe;       // of Pipe; PIPES: all blocks meet here
    uint32_t what;       // vector: number of the instruction's name; scalar: argument and 64-byte line of global memory, 0: the unified buffer
    uint32_t size;       // vector: repeats; transfers: bytes moved
    uint32_t parts;      // vector: 1 if the last repeat is not a full one; transfers: bursts
    uint32_t known[4];   // the latest instruction of each pipe that this one has to wait for
    uint32_t scalar[4];  // the same of the scalar unit, which dispatches it
};

}  // namespace emulator
