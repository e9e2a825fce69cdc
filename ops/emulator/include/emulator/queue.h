// TPipe, TQue, TQueBind, TBuf: the unified buffer's buffers, and the queues that synchronise the pipes.
//
// As on the device, a queue holds `depth` tensors, and an event id for every tensor that is queued and for every buffer
// that was freed, until it is allocated again; there are 8 ids of each kind of event.
#pragma once
#include "tensor.h"

namespace AscendC {

constexpr emulator::Pipe event_from(HardEvent e) {
    constexpr emulator::Pipe from[] = {emulator::MTE2, emulator::V, emulator::MTE3, emulator::V,
                                       emulator::MTE2, emulator::MTE3, emulator::MTE2, emulator::S,
                                       emulator::V, emulator::S, emulator::MTE3, emulator::S};
    return from[int(e)];
}
constexpr emulator::Pipe event_to(HardEvent e) {
    constexpr emulator::Pipe to[] = {emulator::V, emulator::MTE2, emulator::V, emulator::MTE3,
                                     emulator::MTE3, emulator::MTE2, emulator::S, emulator::MTE2,
                                     emulator::S, emulator::V, emulator::S, emulator::MTE3};
    return to[int(e)];
}

constexpr emulator::Pipe producer(TPosition position) {
    return position == TPosition::VECIN ? emulator::MTE2 : emulator::V;
}
constexpr emulator::Pipe consumer(TPosition position) {
    return position == TPosition::VECOUT ? emulator::MTE3 : emulator::V;
}
// The event by which pipe `to` waits for pipe `from`; V_S stands for "none" (a queue whose two ends are one pipe).
constexpr HardEvent event_between(emulator::Pipe from, emulator::Pipe to) {
    for (int e = 0; e < emulator::events; ++e) {
        if (event_from(HardEvent(e)) == from && event_to(HardEvent(e)) == to) return HardEvent(e);
    }
    return HardEvent::V_S;
}

inline std::array<uint32_t, emulator::PIPES> snapshot(emulator::Pipe p) {
    std::array<uint32_t, emulator::PIPES> known;
    for (int q = 0; q < emulator::PIPES; ++q) known[q] = emulator::core->known[p][q];
    known[p] = emulator::core->issued[p];
    return known;
}
inline void join(emulator::Pipe p, const std::array<uint32_t, emulator::PIPES>& known) {
    for (int q = 0; q < emulator::PIPES; ++q) {
        if (emulator::core->known[p][q] < known[q]) emulator::core->known[p][q] = known[q];
    }
}

// The lowest free id of an event, or -1 and a finding.
inline int8_t free_event(HardEvent event, Where at) {
    for (int8_t i = 0; i < 8; ++i) {
        if (!(emulator::core->event_ids[int(event)] >> i & 1)) return i;
    }
    emulator::report("flag", at, "all 8 event ids of one kind are in use: queues hold one for every queued tensor and for "
                     "every freed buffer that was not allocated again");
    return -1;
}
inline int8_t take_event(HardEvent event, Where at) {
    const int8_t id = free_event(event, at);
    if (id >= 0) emulator::core->event_ids[int(event)] |= uint8_t(1u << id);
    return id;
}
inline void give_event(HardEvent event, int8_t& id) {
    if (id >= 0) emulator::core->event_ids[int(event)] &= uint8_t(~(1u << id));
    id = -1;
}

template <TPosition source, TPosition target, int32_t depth>
class TQueBind {
    static_assert(depth >= 1 && depth <= 8, "emulated are queues of a depth of 1 to 8");
    static constexpr HardEvent filled_event = event_between(producer(source), consumer(target));
    static constexpr HardEvent freed_event = event_between(consumer(target), producer(source));

  public:
    template <typename T>
    LocalTensor<T> AllocTensor(Where at = EMULATOR_HERE) {
        for (int i = 0; i < count; ++i) {
            const int index = first + (next + i) % count;
            emulator::QueueBuffer& b = emulator::core->buffers[index];
            if (b.state != emulator::QueueBuffer::FREE) continue;
            next = (next + i + 1) % count;
            b.state = emulator::QueueBuffer::ALLOCATED;
            b.at = at;
            ++b.generation;
            join(producer(source), b.released);
            give_event(freed_event, b.event);
            return tensor<T>(index);
        }
        emulator::report("queue", at, "AllocTensor with all %d buffers of the queue in use: the kernel would hang", count);
        return tensor<T>(first);
    }
    template <typename T>
    bool EnQue(const LocalTensor<T>& t, Where at = EMULATOR_HERE) {
        if (!mine(t, emulator::QueueBuffer::ALLOCATED, "EnQue of a tensor that was not just allocated from here", at)) return false;
        emulator::QueueBuffer& b = emulator::core->buffers[t.buffer];
        b.state = emulator::QueueBuffer::QUEUED;
        b.ready = snapshot(producer(source));
        b.event = take_event(filled_event, at);
        if (filled >= depth) {
            emulator::report("queue", at, "EnQue of tensor %d into a queue of depth %d: an earlier one is lost", filled + 1, depth);
        }
        if (filled == 8) return false;
        order[(head + filled++) % 8] = t.buffer;
        return true;
    }
    template <typename T>
    LocalTensor<T> DeQue(Where at = EMULATOR_HERE) {
        if (filled == 0) {
            emulator::report("queue", at, "DeQue from an empty queue: the kernel would hang");
            return count ? tensor<T>(first) : LocalTensor<T>();
        }
        const int index = order[head];
        head = (head + 1) % 8;
        --filled;
        emulator::QueueBuffer& b = emulator::core->buffers[index];
        b.state = emulator::QueueBuffer::TAKEN;
        join(consumer(target), b.ready);
        give_event(filled_event, b.event);
        return tensor<T>(index);
    }
    // Not for const tensors and not for what a call returned: the device's takes a reference.
    template <typename T>
    void FreeTensor(LocalTensor<T>& t, Where at = EMULATOR_HERE) {
        if (t.buffer < first || t.buffer >= first + count) {
            return emulator::report("queue", at, "FreeTensor of a tensor of another queue");
        }
        emulator::QueueBuffer& b = emulator::core->buffers[t.buffer];
        if (b.state == emulator::QueueBuffer::FREE) return emulator::report("queue", at, "FreeTensor twice");
        if (b.state == emulator::QueueBuffer::QUEUED) {
            emulator::report("queue", at, "FreeTensor of a tensor still queued");
            give_event(filled_event, b.event);
        }
        b.released = snapshot(consumer(target));
        b.event = take_event(freed_event, at);
        b.state = emulator::QueueBuffer::FREE;
    }

    int first = 0, count = 0, next = 0, head = 0, filled = 0;
    int order[8] = {0};

  private:
    template <typename T>
    LocalTensor<T> tensor(int index) {
        LocalTensor<T> t;
        if (count == 0) return t;
        const emulator::QueueBuffer& b = emulator::core->buffers[index];
        t.address = t.low = b.address;
        t.high = b.address + b.bytes;
        t.size = uint32_t(b.bytes / sizeof(T));
        t.buffer = index;
        t.generation = b.generation;
        return t;
    }
    template <typename T>
    bool mine(const LocalTensor<T>& t, emulator::QueueBuffer::State state, const char* text, Where at) {
        if (t.buffer >= first && t.buffer < first + count && emulator::core->buffers[t.buffer].state == state) return true;
        emulator::report("queue", at, "%s", text);
        return false;
    }
};

template <TPosition position, int32_t depth>
class TQue : public TQueBind<position, position, depth> {};

// Its functions are not const, as on the device.
template <TPosition position>
class TBuf {
  public:
    template <typename T>
    LocalTensor<T> Get() {
        return Get<T>(uint32_t(bytes / sizeof(T)));
    }
    template <typename T>
    LocalTensor<T> Get(uint32_t elements) {
        LocalTensor<T> t;
        t.address = t.low = address;
        t.high = address + bytes;
        t.size = elements;
        return t;
    }
    template <typename T>
    LocalTensor<T> GetWithOffset(uint32_t elements, uint32_t offset) {
        LocalTensor<T> t = Get<T>(elements);
        t.address += offset;
        return t;
    }
    uint32_t address = 0, bytes = 0;
};

class TPipe {
  public:
    template <TPosition source, TPosition target, int32_t depth>
    bool InitBuffer(TQueBind<source, target, depth>& queue, uint8_t number, uint32_t bytes, Where at = EMULATOR_HERE) {
        if (queue.count) emulator::report("queue", at, "InitBuffer twice for one queue");
        if (number == 0) emulator::report("queue", at, "a queue of no buffers");
        queue.first = int(emulator::core->buffers.size());
        queue.count = number;
        for (int i = 0; i < number; ++i) {
            emulator::QueueBuffer b;
            b.bytes = (bytes + 31) / 32 * 32;
            b.address = take(b.bytes, at);
            emulator::core->buffers.push_back(b);
        }
        return true;
    }
    template <TPosition position>
    bool InitBuffer(TBuf<position>& buffer, uint32_t bytes, Where at = EMULATOR_HERE) {
        buffer.bytes = (bytes + 31) / 32 * 32;
        buffer.address = take(buffer.bytes, at);
        return true;
    }
    TEventID FetchEventID(HardEvent event, Where at = EMULATOR_HERE) {
        const int8_t id = free_event(event, at);
        return id < 0 ? 0 : id;
    }
    template <HardEvent event>
    TEventID AllocEventID(Where at = EMULATOR_HERE) {
        const int8_t id = take_event(event, at);
        return id < 0 ? 0 : id;
    }
    template <HardEvent event>
    void ReleaseEventID(TEventID id) {
        give_event(event, id);
    }

  private:
    uint32_t take(uint32_t bytes, Where at) {
        uint32_t& top = emulator::core->allocated;
        if (bytes == 0) emulator::report("ub_capacity", at, "a buffer of 0 bytes");
        if (++emulator::core->buffer_count > 64) emulator::report("ub_capacity", at, "more than 64 buffers in a pipe");
        if (top + bytes > emulator::ub_usable) {
            emulator::report("ub_capacity", at, "buffers of %u bytes in all, of which %u are usable", top + bytes,
                             emulator::ub_usable);
            if (top + bytes > emulator::ub_bytes) return 0;
        }
        top += bytes;
        return top - bytes;
    }
};

}  // namespace AscendC
