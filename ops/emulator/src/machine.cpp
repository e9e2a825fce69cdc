// The machine behind the emulated API: blocks as fibers, findings, global memory, the launch interface.
#include "emulator/machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <sstream>
#include <tuple>

namespace emulator {

const char* const pipe_names[PIPES] = {"S", "V", "MTE2", "MTE3"};
Core* core = nullptr;
Machine* machine = nullptr;

namespace {

struct Finding {
    std::string kind, file, text;
    int line = 0, block = 0;
    uint64_t times = 0;
};

struct Kernel {
    int arguments;
    KernelCall call;
};

std::map<std::string, Kernel>& registry() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}

std::vector<std::string>& instruction_names() {
    static std::vector<std::string> names;
    return names;
}

enum class BlockState { READY, AT_SYNC, DONE };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Core core;
    BlockState state = BlockState::READY;
    Where sync_at = Where("", 0);
};

struct Launch {
    Machine machine;
    std::vector<std::unique_ptr<Fiber>> fibers;
    ucontext_t scheduler;
    int current = -1;
    KernelCall call = nullptr;
    std::vector<void*> arguments;
    std::map<std::tuple<std::string, std::string, int>, Finding> findings;
};

Launch* launch = nullptr;
std::mutex one_launch;
std::string last_report;
std::vector<std::vector<TraceEntry>> last_trace;

constexpr size_t stack_bytes = 256 * 1024;
constexpr uint32_t many_readers = 127;

uint32_t tag(int block, bool atomic, uint32_t epoch, uint32_t time) {
    return uint32_t(block + 1) | uint32_t(atomic) << 7 | (epoch & 63u) << 8 | (time & 0x3ffffu) << 14;
}
uint32_t tag_block(uint32_t t) { return t & 127u; }
bool tag_atomic(uint32_t t) { return t >> 7 & 1u; }
uint32_t tag_epoch(uint32_t t) { return t >> 8 & 63u; }
bool younger(uint32_t t, uint32_t known) { return (((t >> 14) - known) & 0x3ffffu) - 1u < 0x1ffffu; }

void to_scheduler() { swapcontext(&launch->fibers[launch->current]->context, &launch->scheduler); }

void fiber_main() {
    Fiber& fiber = *launch->fibers[launch->current];
    launch->call(launch->arguments.data());
    for (const auto& flag : fiber.core.flag_places) {
        report("flag", flag.second, "a flag was set and never waited for");
    }
    for (const auto& buffer : fiber.core.buffers) {
        if (buffer.state != QueueBuffer::FREE) report("queue", buffer.at, "a tensor was never freed");
    }
    fiber.state = BlockState::DONE;
    to_scheduler();
}

void resume(int index) {
    launch->current = index;
    core = &launch->fibers[index]->core;
    swapcontext(&launch->scheduler, &launch->fibers[index]->context);
    core = nullptr;
}

void run_blocks() {
    for (;;) {
        std::vector<int> ready, waiting;
        for (size_t i = 0; i < launch->fibers.size(); ++i) {
            if (launch->fibers[i]->state == BlockState::READY) ready.push_back(int(i));
            if (launch->fibers[i]->state == BlockState::AT_SYNC) waiting.push_back(int(i));
        }
        if (!ready.empty()) {
            resume(ready[random_number() % ready.size()]);
            continue;
        }
        if (waiting.empty()) return;
        if (waiting.size() != launch->fibers.size()) {
            core = &launch->fibers[waiting[0]]->core;
            report("sync", launch->fibers[waiting[0]]->sync_at,
                   "%zu of %zu blocks wait here for blocks that have ended: the kernel would hang", waiting.size(),
                   launch->fibers.size());
            core = nullptr;
        }
        for (int i : waiting) {
            launch->fibers[i]->state = BlockState::READY;
            ++launch->fibers[i]->core.epoch;
        }
    }
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += c;
    }
    return out + "\"";
}

void add(Counters& total, const Counters& one) {
    if (total.vector.size() < one.vector.size()) total.vector.resize(one.vector.size());
    for (size_t i = 0; i < one.vector.size(); ++i) {
        total.vector[i].instructions += one.vector[i].instructions;
        total.vector[i].repeats += one.vector[i].repeats;
        total.vector[i].elements += one.vector[i].elements;
    }
    total.bytes_in += one.bytes_in;
    total.bytes_out += one.bytes_out;
    total.transfers_in += one.transfers_in;
    total.transfers_out += one.transfers_out;
    total.bursts += one.bursts;
    total.scalar_gm_bytes += one.scalar_gm_bytes;
    total.scalar_ub_reads += one.scalar_ub_reads;
    total.barriers += one.barriers;
    total.syncs += one.syncs;
    for (int i = 0; i < 32; ++i) total.burst_sizes[i] += one.burst_sizes[i];
}

void write_counters(std::ostream& out, const Counters& c) {
    out << "{\"bytes_in\":" << c.bytes_in << ",\"bytes_out\":" << c.bytes_out << ",\"transfers_in\":" << c.transfers_in
        << ",\"transfers_out\":" << c.transfers_out << ",\"bursts\":" << c.bursts << ",\"scalar_gm_bytes\":"
        << c.scalar_gm_bytes << ",\"scalar_ub_reads\":" << c.scalar_ub_reads << ",\"barriers\":" << c.barriers
        << ",\"syncs\":" << c.syncs << ",\"burst_sizes\":{";
    const char* comma = "";
    for (int i = 0; i < 32; ++i) {
        if (!c.burst_sizes[i]) continue;
        out << comma << "\"" << (1ull << i) << "\":" << c.burst_sizes[i];
        comma = ",";
    }
    out << "},\"vector\":{";
    comma = "";
    for (size_t i = 0; i < c.vector.size(); ++i) {
        const VectorCount& v = c.vector[i];
        if (!v.instructions) continue;
        out << comma << quoted(instruction_names()[i]) << ":[" << v.instructions << "," << v.repeats << ","
            << v.elements << "]";
        comma = ",";
    }
    out << "}}";
}

std::string report_text() {
    std::ostringstream out;
    out << "{\"findings\":[";
    const char* comma = "";
    for (const auto& item : launch->findings) {
        const Finding& f = item.second;
        out << comma << "{\"kind\":" << quoted(f.kind) << ",\"file\":" << quoted(f.file) << ",\"line\":" << f.line
            << ",\"block\":" << f.block << ",\"times\":" << f.times << ",\"text\":" << quoted(f.text) << "}";
        comma = ",";
    }
    Counters total;
    int used = 0;
    uint32_t ub = 0;
    out << "],\"cores\":[";
    comma = "";
    for (const auto& fiber : launch->fibers) {
        const Counters& c = fiber->core.count;
        add(total, c);
        used += c.bytes_in + c.bytes_out > 0 && !c.vector.empty();
        ub = std::max(ub, fiber->core.allocated);
        out << comma;
        write_counters(out, c);
        comma = ",";
    }
    out << "],\"total\":";
    write_counters(out, total);
    out << ",\"cores_used\":" << used << ",\"ub_allocated\":" << ub << ",\"buffers\":[";
    comma = "";
    for (const auto& b : launch->machine.gm) {
        out << comma << "{\"bytes\":" << b.bytes << ",\"in\":" << b.bytes_in << ",\"out\":" << b.bytes_out << "}";
        comma = ",";
    }
    out << "]}";
    return out.str();
}

}  // namespace

void Core::reset(int block) {
    index = block;
    ub.assign(ub_bytes, char(0xff));
    written.assign(ub_bytes, 0);
    blocks.assign(ub_blocks, UbBlock());
    std::memset(issued, 0, sizeof(issued));
    std::memset(known, 0, sizeof(known));
}

Registered::Registered(const char* name, int arguments, KernelCall call) {
    registry()[name] = Kernel{arguments, call};
}

int intern(const std::string& instruction) {
    std::vector<std::string>& names = instruction_names();
    const auto found = std::find(names.begin(), names.end(), instruction);
    if (found != names.end()) return int(found - names.begin());
    names.push_back(instruction);
    return int(names.size()) - 1;
}

uint64_t random_number() {
    uint64_t& s = machine->random_state;
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return s >> 11;
}

void report(const char* kind, Where at, const char* format, ...) {
    Finding& f = launch->findings[std::make_tuple(std::string(kind), std::string(at.file), at.line)];
    if (f.times++ == 0) {
        char text[400];
        va_list list;
        va_start(list, format);
        std::vsnprintf(text, sizeof(text), format, list);
        va_end(list);
        f.kind = kind;
        f.file = at.file;
        f.line = at.line;
        f.block = core ? core->index : -1;
        f.text = text;
    }
}

void trace_issue(Pipe p) {
    TraceEntry entry{p, 0, 0, 0, {0, 0, 0, 0}, {0, 0, 0, 0}};
    for (int q = 0; q < PIPES; ++q) {
        entry.known[q] = p == PIPES ? core->issued[q] : core->known[p][q];
        entry.scalar[q] = core->known[S][q];
    }
    core->trace.push_back(entry);
}

void trace_size(uint32_t what, uint64_t size, uint64_t parts) {
    TraceEntry& last = core->trace.back();
    if (last.pipe == V && last.size) {
        issue(V);
        core->trace.back().known[V] = core->issued[V] - 1;
    }
    TraceEntry& entry = core->trace.back();
    entry.what = what;
    entry.size = uint32_t(size);
    entry.parts = uint32_t(parts);
}

void hazard(const char* kind, Pipe now, Pipe before, uint32_t block, Where at) {
    if (!machine->strict) return;
    report(kind, at, "%s on unified buffer byte %u: pipe %s is not ordered after an earlier access by pipe %s", kind,
           block * block_bytes, pipe_names[now], pipe_names[before]);
}

void yield_point() {
    if (machine->interleave && (random_number() & 7) == 0) to_scheduler();
}

void sync_all(Where at) {
    Fiber& fiber = *launch->fibers[launch->current];
    ++core->count.syncs;
    if (machine->trace) trace_issue(PIPES);
    if (machine->blocks != machine->cores) {
        report("sync", at, "SyncAll of %d blocks on %d vector cores: it waits for every core of the chip once and would hang",
               machine->blocks, machine->cores);
    }
    fiber.sync_at = at;
    fiber.state = BlockState::AT_SYNC;
    to_scheduler();
    // The hardware form waits for all pipes of the block before it signals, and holds all of them until it returns.
    for (int p = 0; p < PIPES; ++p)
        for (int q = 0; q < PIPES; ++q) core->known[p][q] = core->issued[q];
}

int gm_find(const void* address) {
    const char* a = static_cast<const char*>(address);
    int at_end = -1;  // an empty tensor may point to the end of another
    for (size_t i = 0; i < machine->gm.size(); ++i) {
        const GmBuffer& b = machine->gm[i];
        if (b.data && a >= b.data && a < b.data + b.bytes) return int(i);
        if (b.data && a == b.data + b.bytes) at_end = int(i);
    }
    return at_end;
}

void* gm_check(int buffer, const void* address, uint64_t bytes, Where at, bool write, Pipe pipe) {
    if (bytes == 0) return nullptr;
    if (buffer < 0) {
        report("gm_bounds", at, "%s %llu bytes through a global tensor that points to no argument of the launch",
               write ? "writes" : "reads", (unsigned long long)bytes);
        return nullptr;
    }
    GmBuffer& b = machine->gm[buffer];
    const int64_t offset = static_cast<const char*>(address) - b.data;
    if (offset < 0 || uint64_t(offset) + bytes > b.bytes) {
        report("gm_bounds", at, "%s bytes %lld..%lld of argument %d, which has %llu", write ? "writes" : "reads",
               (long long)offset, (long long)(offset + int64_t(bytes)) - 1, buffer, (unsigned long long)b.bytes);
        return nullptr;
    }
    if (write && b.kind == GM_INPUT) {
        report("gm_write", at, "writes argument %d, which is an input", buffer);
        return nullptr;
    }
    (write ? b.bytes_out : b.bytes_in) += bytes;
    if (b.kind == GM_INPUT) return b.data + offset;
    const uint32_t epoch = core->epoch & 63u, self = uint32_t(core->index + 1);
    const uint32_t mine = tag(core->index, write && core->atomic_add, core->epoch, core->issued[pipe]);
    bool race = false, unordered = false, unwritten = false, stale = false;
    for (uint64_t i = uint64_t(offset) / 2; i < (uint64_t(offset) + bytes + 1) / 2; ++i) {
        const uint32_t w = b.writer[i];
        if (w && tag_epoch(w) == epoch) {
            if (tag_block(w) != self) {
                race |= !(write && tag_atomic(w) && core->atomic_add);
            } else if (younger(w, core->known[pipe][MTE3])) {
                unordered |= !(write && tag_atomic(w) && core->atomic_add);
            }
        }
        if (write) {
            const uint32_t r = b.reader[i];
            race |= r && tag_epoch(r) == epoch && tag_block(r) != self;
            b.writer[i] = mine;
        } else {
            unwritten |= b.kind != GM_INOUT && !w;
            stale |= pipe == S && w;
            const uint32_t r = b.reader[i];
            const bool other = r && tag_epoch(r) == epoch && tag_block(r) != self;
            b.reader[i] = other ? ((mine & ~127u) | many_readers) : mine;
        }
    }
    if (race) {
        report("race", at, "%s argument %d where another block %s since the last SyncAll", write ? "writes" : "reads",
               buffer, write ? "read or wrote" : "wrote");
    }
    if (unordered && machine->strict) {
        report(write ? "WAW" : "RAW", at, "%s global memory (argument %d) without order after its own earlier write",
               write ? "writes" : "reads", buffer);
    }
    if (unwritten) report("gm_uninitialised", at, "reads parts of argument %d that nobody has written", buffer);
    if (stale) report("stale", at, "the scalar unit's cache may hold an old value of argument %d", buffer);
    return b.data + offset;
}

}  // namespace emulator

// ---- the launch interface, called from Python (ctypes) and from the ahead-of-time operators --------------------
using namespace emulator;

#define EMULATOR_EXPORT __attribute__((visibility("default")))
extern "C" {

// Runs `name` in `blocks` blocks on a chip of `cores` vector cores. kinds: GmKind of each pointer. flags: 1 strict, 2
// interleave, 4 trace. Returns the number of distinct findings, or -1 (no such kernel) / -2 (wrong number of pointers, or of blocks).
EMULATOR_EXPORT int emulator_launch(const char* name, int blocks, int cores, int n, void** pointers, const uint64_t* bytes, const int* kinds,
                    uint64_t seed, int flags) {
    auto found = registry().find(name);
    if (found == registry().end()) return -1;
    if (found->second.arguments != n || blocks < 1 || blocks > 64 || cores < 1) return -2;
    std::lock_guard<std::mutex> guard(one_launch);
    static std::vector<std::unique_ptr<Fiber>> pool;
    Launch here;
    launch = &here;
    machine = &here.machine;
    here.machine.strict = flags & 1;
    here.machine.interleave = flags & 2;
    here.machine.trace = flags & 4;
    last_trace.clear();
    here.machine.random_state = (seed + 1) * 0x9e3779b97f4a7c15ull | 1;
    here.machine.blocks = blocks;
    here.machine.cores = cores;
    here.call = found->second.call;
    for (int i = 0; i < n; ++i) {
        GmBuffer b;
        b.data = static_cast<char*>(pointers[i]);
        b.bytes = bytes[i];
        b.kind = kinds[i];
        if (b.kind != GM_INPUT) {
            b.writer.assign((b.bytes + 1) / 2, 0);
            b.reader.assign((b.bytes + 1) / 2, 0);
        }
        here.machine.gm.push_back(std::move(b));
        here.arguments.push_back(pointers[i]);
    }
    for (int i = 0; i < blocks; ++i) {
        if (pool.empty()) {
            pool.emplace_back(new Fiber());
            pool.back()->stack.resize(stack_bytes);
        }
        std::unique_ptr<Fiber> fiber = std::move(pool.back());
        pool.pop_back();
        std::vector<char> stack = std::move(fiber->stack);
        Core old = std::move(fiber->core);
        fiber->core = Core();
        fiber->core.ub = std::move(old.ub);
        fiber->core.written = std::move(old.written);
        fiber->core.blocks = std::move(old.blocks);
        fiber->core.reset(i);
        fiber->stack = std::move(stack);
        fiber->state = BlockState::READY;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.data();
        fiber->context.uc_stack.ss_size = fiber->stack.size();
        fiber->context.uc_link = &here.scheduler;
        makecontext(&fiber->context, fiber_main, 0);
        here.fibers.push_back(std::move(fiber));
    }
    run_blocks();
    last_report = report_text();
    const int count = int(here.findings.size());
    for (auto& fiber : here.fibers) {
        if (here.machine.trace) last_trace.push_back(std::move(fiber->core.trace));
        pool.push_back(std::move(fiber));
    }
    launch = nullptr;
    machine = nullptr;
    return count;
}

// JSON of the last launch: findings, counters of each core, totals, bytes by argument.
EMULATOR_EXPORT const char* emulator_report() { return last_report.c_str(); }

// Entries of one core in the last launch that was asked for them (flag 4); their number in *count.
EMULATOR_EXPORT const TraceEntry* emulator_trace(int core_index, uint64_t* count) {
    const bool there = core_index >= 0 && size_t(core_index) < last_trace.size();
    *count = there ? last_trace[size_t(core_index)].size() : 0;
    return there ? last_trace[size_t(core_index)].data() : nullptr;
}

// Names of the vector instructions by number, one a line.
EMULATOR_EXPORT const char* emulator_instructions() {
    static thread_local std::string names;
    names.clear();
    for (const auto& name : instruction_names()) names += name + "\n";
    return names.c_str();
}

EMULATOR_EXPORT const char* emulator_kernels() {
    static thread_local std::string names;
    names.clear();
    for (const auto& item : registry()) names += item.first + "\n";
    return names.c_str();
}
}
