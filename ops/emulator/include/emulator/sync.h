// Flags between pipes, barriers, meetings of all blocks, block numbers.
#pragma once
#include "queue.h"

enum pipe_t { PIPE_S = 0, PIPE_V = 1, PIPE_MTE2 = 2, PIPE_MTE3 = 3, PIPE_ALL = 4 };

namespace AscendC {

inline bool event_id_valid(int32_t id, Where at) {
    if (id < 0 || id > 7) {
        emulator::report("flag", at, "event id %d, only 0..7 exist", id);
        return false;
    }
    if (id > 5) emulator::report("flag", at, "event id %d belongs to the system", id);
    return true;
}

template <HardEvent event>
void SetFlag(int32_t id, Where at = EMULATOR_HERE) {
    if (!event_id_valid(id, at)) return;
    const uint32_t key = uint32_t(event) * 8 + uint32_t(id);
    if (emulator::core->flags.count(key)) emulator::report("flag", at, "flag %d is set twice without a wait", id);
    emulator::core->flags[key] = snapshot(event_from(event));
    emulator::core->flag_places[key] = at;
}
template <HardEvent event>
void WaitFlag(int32_t id, Where at = EMULATOR_HERE) {
    if (!event_id_valid(id, at)) return;
    const uint32_t key = uint32_t(event) * 8 + uint32_t(id);
    auto found = emulator::core->flags.find(key);
    if (found == emulator::core->flags.end()) {
        return emulator::report("flag", at, "waits for flag %d, which nobody set: the kernel would hang", id);
    }
    join(event_to(event), found->second);
    emulator::core->flags.erase(found);
    emulator::core->flag_places.erase(key);
}

inline void barrier(pipe_t pipe, Where at) {
    using emulator::core;
    ++core->count.barriers;
    if (pipe == PIPE_S) return emulator::report("barrier", at, "PipeBarrier<PIPE_S> is illegal");
    if (pipe != PIPE_ALL) {
        core->known[pipe][pipe] = core->issued[pipe];
        return;
    }
    for (int p = 0; p < emulator::PIPES; ++p)
        for (int q = 0; q < emulator::PIPES; ++q) core->known[p][q] = core->issued[q];
}
template <pipe_t pipe>
void PipeBarrier(Where at = EMULATOR_HERE) {
    barrier(pipe, at);
}

template <bool isAIVOnly = true>
void SyncAll(Where at = EMULATOR_HERE) {
    static_assert(isAIVOnly, "only vector cores are emulated");
    emulator::sync_all(at);
}

inline int64_t GetBlockIdx() { return emulator::core->index; }
inline int64_t GetBlockNum() { return emulator::machine->blocks; }
inline int64_t GetSubBlockNum() { return 1; }

template <typename T>
void SetAtomicAdd() {
    emulator::core->atomic_add = true;
}
inline void SetAtomicNone() { emulator::core->atomic_add = false; }

}  // namespace AscendC

inline int64_t get_block_idx() { return AscendC::GetBlockIdx(); }
inline int64_t get_block_num() { return AscendC::GetBlockNum(); }
inline void pipe_barrier(pipe_t pipe, emulator::Where at = EMULATOR_HERE) { AscendC::barrier(pipe, at); }
