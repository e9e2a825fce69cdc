// GlobalTensor, LocalTensor, TPipe, TQue, TQueBind, TBuf: memory and the queues that synchronise the pipes.
#pragma once
#include "machine.h"

namespace AscendC {

using emulator::Where;

enum class TPosition : uint8_t { GM, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;
using TEventID = int8_t;
enum class HardEvent : uint8_t {
    MTE2_V, V_MTE2, MTE3_V, V_MTE3, MTE2_MTE3, MTE3_MTE2, MTE2_S, S_MTE2, V_S, S_V, MTE3_S, S_MTE3
};

template <typename T>
class GlobalTensor {
  public:
    using PrimType = T;
    void SetGlobalBuffer(T* address, uint64_t elements = 0) {
        data_ = address;
        size_ = elements;
        buffer_ = emulator::gm_find(address);
    }
    T GetValue(uint64_t offset, Where at = EMULATOR_HERE) const {
        emulator::issue(emulator::S);
        emulator::core->count.scalar_gm_bytes += sizeof(T);
        if (emulator::machine->trace) {
            emulator::trace_size(1 + uint32_t(reinterpret_cast<uint64_t>(data_ + offset) >> 6), sizeof(T), 1);
        }
        void* p = check(offset * sizeof(T), sizeof(T), at, false, emulator::S);
        T value{};
        if (p) std::memcpy(&value, p, sizeof(T));
        return value;
    }
    GlobalTensor operator[](uint64_t offset) const {
        GlobalTensor part = *this;
        part.data_ = data_ + offset;
        part.size_ = size_ > offset ? size_ - offset : 0;
        part.sized_ = sized_ || size_ > 0;
        return part;
    }
    uint64_t GetSize() const { return size_; }
    const T* GetPhyAddr() const { return data_; }
    void* check(uint64_t byte_offset, uint64_t bytes, Where at, bool write, emulator::Pipe pipe) const {
        if ((size_ || sized_) && byte_offset + bytes > size_ * sizeof(T)) {
            emulator::report("gm_bounds", at, "reaches %llu bytes into a global tensor set to %llu",
                             (unsigned long long)(byte_offset + bytes), (unsigned long long)(size_ * sizeof(T)));
            return nullptr;
        }
        return emulator::gm_check(buffer_, reinterpret_cast<const char*>(data_) + byte_offset, bytes, at, write, pipe);
    }

  private:
    T* data_ = nullptr;
    uint64_t size_ = 0;
    bool sized_ = false;
    int buffer_ = -1;
};

template <typename T>
class LocalTensor {
  public:
    using PrimType = T;
    uint32_t address = 0, size = 0;  // bytes; elements
    uint32_t low = 0, high = 0;      // bytes of the buffer that this tensor must stay in
    int buffer = -1;                 // index of the queue buffer, -1 for TBuf
    uint32_t generation = 0;

    LocalTensor operator[](uint32_t offset) const {
        LocalTensor part = *this;
        part.address += uint32_t(emulator::bytes_of<T>(offset));
        part.size = size > offset ? size - offset : 0;
        return part;
    }
    template <typename U>
    LocalTensor<U> ReinterpretCast() const {
        LocalTensor<U> other;
        other.address = address;
        other.size = uint32_t(emulator::bytes_of<T>(size) * 2 / emulator::bytes_of<U>(2));
        other.low = low;
        other.high = high;
        other.buffer = buffer;
        other.generation = generation;
        return other;
    }
    uint32_t GetSize() const { return size; }
    void SetSize(uint32_t elements) { size = elements; }

    // True if bytes [offset, offset + bytes) may be touched; misaligned starts are reported but still carried out.
    bool usable(uint64_t offset, uint64_t bytes, Where at, uint32_t alignment = emulator::block_bytes) const {
        if (high == 0) {
            emulator::report("null", at, "uses a local tensor that was never allocated");
            return false;
        }
        if (buffer >= 0) {
            const emulator::QueueBuffer& b = emulator::core->buffers[buffer];
            if (b.generation != generation || b.state == emulator::QueueBuffer::FREE) {
                emulator::report("queue", at, "uses a tensor after FreeTensor");
            }
        }
        if (address < low || address + offset + bytes > high) {
            emulator::report("ub_bounds", at, "bytes %llu..%llu of a local buffer of %u",
                             (unsigned long long)(address + offset - low),
                             (unsigned long long)(address + offset + bytes - low) - 1, high - low);
            return false;
        }
        if (address % alignment) {
            emulator::report("alignment", at, "a local operand starts at byte %u, which is no multiple of %u", address,
                             alignment);
        }
        return true;
    }
    T* data(uint32_t byte_offset = 0) const {
        return reinterpret_cast<T*>(emulator::core->ub.data() + address + byte_offset);
    }
    T GetValue(uint32_t index, Where at = EMULATOR_HERE) const {
        emulator::issue(emulator::S);
        ++emulator::core->count.scalar_ub_reads;
        if (!usable(uint64_t(index) * sizeof(T), sizeof(T), at, sizeof(T))) return T{};
        emulator::read_ub(emulator::S, address + index * sizeof(T), sizeof(T), at);
        return data()[index];
    }
    template <typename N>
    void SetValue(uint32_t index, N value, Where at = EMULATOR_HERE) const {
        emulator::issue(emulator::S);
        if (!usable(uint64_t(index) * sizeof(T), sizeof(T), at, sizeof(T))) return;
        emulator::write_ub(emulator::S, address + index * sizeof(T), sizeof(T), at);
        data()[index] = T(value);
    }
};

constexpr emulator::Pipe producer(TPosition position) {
    return position == TPosition::VECIN ? emulator::MTE2 : emulator::V;
}
constexpr emulator::Pipe consumer(TPosition position) {
    return position == TPosition::VECOUT ? emulator::MTE3 : emulator::V;
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

template <TPosition source, TPosition target, int32_t depth>
class TQueBind {
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
            return tensor<T>(index);
        }
        emulator::report("queue", at, "AllocTensor with all %d buffers of the queue in use: the kernel would hang", count);
        return tensor<T>(first);
    }
    template <typename T>
    void EnQue(const LocalTensor<T>& t, Where at = EMULATOR_HERE) {
        if (!mine(t, emulator::QueueBuffer::ALLOCATED, "EnQue of a tensor that was not just allocated from here", at)) return;
        emulator::QueueBuffer& b = emulator::core->buffers[t.buffer];
        b.state = emulator::QueueBuffer::QUEUED;
        b.ready = snapshot(producer(source));
        if (filled == count) return emulator::report("queue", at, "EnQue into a full queue");
        order[(head + filled++) % 8] = t.buffer;
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
        return tensor<T>(index);
    }
    template <typename T>
    void FreeTensor(const LocalTensor<T>& t, Where at = EMULATOR_HERE) {
        if (t.buffer < first || t.buffer >= first + count) {
            return emulator::report("queue", at, "FreeTensor of a tensor of another queue");
        }
        emulator::QueueBuffer& b = emulator::core->buffers[t.buffer];
        if (b.state == emulator::QueueBuffer::FREE) return emulator::report("queue", at, "FreeTensor twice");
        if (b.state == emulator::QueueBuffer::QUEUED) emulator::report("queue", at, "FreeTensor of a tensor still queued");
        b.released = snapshot(consumer(target));
        if (b.state == emulator::QueueBuffer::ALLOCATED) b.released = snapshot(emulator::V);  // used as scratch
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

template <TPosition position = TPosition::VECCALC>
class TBuf {
  public:
    template <typename T>
    LocalTensor<T> Get() const {
        return Get<T>(uint32_t(bytes / sizeof(T)));
    }
    template <typename T>
    LocalTensor<T> Get(uint32_t elements) const {
        LocalTensor<T> t;
        t.address = t.low = address;
        t.high = address + bytes;
        t.size = elements;
        return t;
    }
    template <typename T>
    LocalTensor<T> GetWithOffset(uint32_t elements, uint32_t offset) const {
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
    TEventID FetchEventID(HardEvent) { return 0; }
    template <HardEvent event>
    TEventID AllocEventID(Where at = EMULATOR_HERE) {
        for (int i = 0; i < 6; ++i) {
            if (!(used_[int(event)] >> i & 1)) {
                used_[int(event)] |= 1u << i;
                return TEventID(i);
            }
        }
        emulator::report("flag", at, "more than 6 event ids of one kind are in use");
        return 0;
    }
    template <HardEvent event>
    void ReleaseEventID(TEventID id) {
        used_[int(event)] &= ~(1u << id);
    }

  private:
    uint32_t take(uint32_t bytes, Where at) {
        uint32_t& top = emulator::core->allocated;
        if (bytes == 0) emulator::report("ub_capacity", at, "a buffer of 0 bytes");
        if (top + bytes > emulator::ub_usable) {
            emulator::report("ub_capacity", at, "buffers of %u bytes in all, of which %u are usable", top + bytes,
                             emulator::ub_usable);
            if (top + bytes > emulator::ub_bytes) return 0;
        }
        top += bytes;
        return top - bytes;
    }
    uint32_t used_[12] = {0};
};

}  // namespace AscendC
