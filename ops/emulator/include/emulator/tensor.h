// GlobalTensor and LocalTensor: views of global memory and of the unified buffer.
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
static_assert(int(HardEvent::S_MTE3) + 1 == emulator::events, "the machine counts event ids for each of these");

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
            const int64_t at_byte = buffer_ < 0 ? 0 : reinterpret_cast<const char*>(data_ + offset) - emulator::machine->gm[buffer_].data;
            emulator::trace_size(uint32_t(buffer_ + 1) << 24 | (uint32_t(at_byte >> 6) + 1), sizeof(T), 1);
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
    void SetValue(uint32_t index, const N value, Where at = EMULATOR_HERE) const {
        emulator::issue(emulator::S);
        if (!usable(uint64_t(index) * sizeof(T), sizeof(T), at, sizeof(T))) return;
        emulator::write_ub(emulator::S, address + index * sizeof(T), sizeof(T), at);
        data()[index] = static_cast<T>(value);
    }
};

}  // namespace AscendC
