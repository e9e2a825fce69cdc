// One emulated vector core: unified buffer with shadow state, four pipes with vector clocks, flags, counters.
//
// Every instruction runs at once and in program order, so results are those of a correctly synchronised kernel; what
// the pipes could have done instead is tracked by vector clocks. known[p][q] is the number of the latest instruction
// of pipe q that pipe p may rely on. An access that needs a younger instruction than that is a hazard: on the device
// nothing orders the two, unless the compiler inserts the synchronisation (which strict mode does not assume).
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "trace.h"
#include "types.h"

namespace emulator {

// The place in the kernel that called an API function: `Where at = EMULATOR_HERE` as its last parameter. The builtins
// must be defaults of a constructor: only there they give the line of the outermost call, in g++ and clang alike.
struct Where {
    const char* file;
    int line;
    constexpr Where(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
};
#define EMULATOR_HERE ::emulator::Where()

enum Pipe : uint8_t { S = 0, V = 1, MTE2 = 2, MTE3 = 3, PIPES = 4 };
extern const char* const pipe_names[PIPES];

constexpr uint32_t ub_bytes = 192 * 1024;
// What a kernel may allocate: 256 bytes at the end are the system's and 8 KiB are reserved for Select and the like.
constexpr uint32_t ub_usable = ub_bytes - 256 - 8 * 1024;
constexpr uint32_t block_bytes = 32;
constexpr uint32_t ub_blocks = ub_bytes / block_bytes;
constexpr uint32_t repeat_bytes = 256;
constexpr int events = 12;  // kinds of HardEvent that are emulated

enum GmKind { GM_INPUT = 0, GM_OUTPUT = 1, GM_WORKSPACE = 2, GM_INOUT = 3 };

struct GmBuffer {
    char* data = nullptr;
    uint64_t bytes = 0;
    int kind = GM_INPUT;
    uint64_t bytes_in = 0, bytes_out = 0;
    // For what may be written, one word per 2 bytes: who wrote (or read) last. 0 is "nobody in this launch".
    std::vector<uint32_t> writer, reader;
};

struct UbBlock {
    uint32_t write_time = 0;
    uint32_t read_time[PIPES] = {0, 0, 0, 0};
    uint8_t write_pipe = S;
};

struct QueueBuffer {
    enum State { FREE, ALLOCATED, QUEUED, TAKEN } state = FREE;
    uint32_t address = 0, bytes = 0, generation = 0;
    std::array<uint32_t, PIPES> ready{}, released{};
    int8_t event = -1;  // the id that the queue holds: of the filled buffer while queued, of the freed one while free
    Where at = Where("", 0);
};

struct VectorCount {
    uint64_t instructions = 0, repeats = 0, elements = 0;
};

struct Counters {
    std::vector<VectorCount> vector;  // by the number that intern() gave the instruction's name
    uint64_t bytes_in = 0, bytes_out = 0, transfers_in = 0, transfers_out = 0, bursts = 0;
    uint64_t scalar_gm_bytes = 0, scalar_ub_reads = 0, barriers = 0, syncs = 0;
    uint64_t burst_sizes[32] = {0};  // [k]: bursts of 2^k up to 2^(k+1) - 1 bytes
};

struct Core {
    int index = 0;
    uint32_t epoch = 1;
    std::vector<char> ub;
    std::vector<uint8_t> written;
    std::vector<UbBlock> blocks;
    uint32_t issued[PIPES];
    uint32_t known[PIPES][PIPES];
    uint32_t allocated = 0;
    std::vector<QueueBuffer> buffers;
    std::map<uint32_t, std::array<uint32_t, PIPES>> flags;
    std::map<uint32_t, Where> flag_places;
    uint8_t event_ids[events] = {0};  // by kind: the ids in use, one bit each
    uint32_t buffer_count = 0;
    bool atomic_add = false;
    Counters count;
    std::vector<TraceEntry> trace;  // empty unless the launch asks for it

    void reset(int block);
};

struct Machine {
    std::vector<GmBuffer> gm;
    bool strict = true;
    int blocks = 1, cores = 1;  // launched, on the chip
    uint64_t random_state = 1;
    bool interleave = true;
    bool trace = false;
    int running = 0;
};

// The running block and launch. Plain globals: one launch runs at a time (emulator_launch holds a lock).
extern Core* core;
extern Machine* machine;

// Records a finding once per kind and place, with the number of times it was seen. printf-style.
void report(const char* kind, Where at, const char* format, ...) __attribute__((format(printf, 3, 4)));
int intern(const std::string& instruction);
void yield_point();             // lets another block run now and then
void sync_all(Where at);        // all blocks meet
uint64_t random_number();

void* gm_check(int buffer, const void* address, uint64_t bytes, Where at, bool write, Pipe pipe);
int gm_find(const void* address);

void trace_issue(Pipe p);
// Fills in the entry of the instruction just issued; a second call for one instruction (a macro's next pass) adds an
// entry that waits for the first.
void trace_size(uint32_t what, uint64_t size, uint64_t parts);

inline uint32_t issue(Pipe p) {
    if (p == S) core->known[S][S] = core->issued[S] + 1;  // the scalar unit runs in program order
    for (int q = V; q < PIPES; ++q) {
        // An instruction is dispatched by the scalar unit, so it sees what the scalar unit had waited for.
        if (core->known[p][q] < core->known[S][q]) core->known[p][q] = core->known[S][q];
    }
    ++core->issued[p];
    if (machine->trace) trace_issue(p);
    return core->issued[p];
}

void hazard(const char* kind, Pipe now, Pipe before, uint32_t block, Where at);

// Both: [address, address + bytes) of the unified buffer, by the instruction just issued on pipe p.
inline void read_ub(Pipe p, uint32_t address, uint32_t bytes, Where at, bool overlap_allowed = true) {
    if (bytes == 0) return;
    if (std::memchr(core->written.data() + address, 0, bytes)) {
        report("uninitialised", at, "reads unified buffer bytes %u..%u, not all of which were ever written", address,
               address + bytes - 1);
    }
    const uint32_t first = address / block_bytes, last = (address + bytes - 1) / block_bytes, now = core->issued[p];
    const uint32_t* known = core->known[p];
    uint32_t suspects = 0;
    for (uint32_t b = first; b <= last; ++b) {
        UbBlock& block = core->blocks[b];
        suspects |= block.write_time > known[block.write_pipe];
        block.read_time[p] = now;
    }
    for (uint32_t b = first; suspects && b <= last; ++b) {
        const UbBlock& block = core->blocks[b];
        if (block.write_time <= known[block.write_pipe]) continue;
        if (block.write_pipe != p || block.write_time != now) {
            hazard("RAW", p, Pipe(block.write_pipe), b, at);
        } else if (!overlap_allowed) {
            report("overlap", at, "a repeat reads what an earlier repeat of the same instruction wrote");
        }
    }
}

inline void write_ub(Pipe p, uint32_t address, uint32_t bytes, Where at) {
    if (bytes == 0) return;
    std::memset(core->written.data() + address, 1, bytes);
    const uint32_t first = address / block_bytes, last = (address + bytes - 1) / block_bytes, now = core->issued[p];
    const uint32_t* known = core->known[p];
    uint32_t suspects = 0;
    for (uint32_t b = first; b <= last; ++b) {
        const UbBlock& block = core->blocks[b];
        suspects |= block.write_time > known[block.write_pipe];
        for (int q = 0; q < PIPES; ++q) suspects |= block.read_time[q] > known[q];
    }
    for (uint32_t b = first; suspects && b <= last; ++b) {
        const UbBlock& block = core->blocks[b];
        if (block.write_time > known[block.write_pipe] && !(block.write_pipe == p && block.write_time == now)) {
            hazard("WAW", p, Pipe(block.write_pipe), b, at);
        }
        for (int q = 0; q < PIPES; ++q) {
            if (block.read_time[q] > known[q] && !(q == p && block.read_time[q] == now)) hazard("WAR", p, Pipe(q), b, at);
        }
    }
    for (uint32_t b = first; b <= last; ++b) {
        core->blocks[b].write_time = now;
        core->blocks[b].write_pipe = p;
    }
}

using KernelCall = void (*)(void** arguments);
struct Registered {
    Registered(const char* name, int arguments, KernelCall call);
};

}  // namespace emulator
