// DataCopy, DataCopyPad: transfers between global memory and the unified buffer.
#pragma once
#include "sync.h"

namespace AscendC {

struct DataCopyParams {
    uint16_t blockCount = 1, blockLen = 0, srcStride = 0, dstStride = 0;
    DataCopyParams() {}
    DataCopyParams(uint16_t count, uint16_t length, uint16_t source, uint16_t target)
        : blockCount(count), blockLen(length), srcStride(source), dstStride(target) {}
};
struct DataCopyExtParams {
    uint16_t blockCount = 1;
    uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
    DataCopyExtParams() {}
    DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source, uint32_t target, uint32_t r)
        : blockCount(count), blockLen(length), srcStride(source), dstStride(target), rsv(r) {}
};
template <typename T>
struct DataCopyPadExtParams {
    bool isPad = false;
    uint8_t leftPadding = 0, rightPadding = 0;
    T paddingValue = T();
    DataCopyPadExtParams() {}
    DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, T value)
        : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

inline void count_bursts(uint64_t bursts, uint64_t bytes) {
    emulator::Counters& c = emulator::core->count;
    c.bursts += bursts;
    int k = 0;
    while (k < 31 && (2ull << k) <= bytes) ++k;
    c.burst_sizes[k] += bursts;
    if (emulator::machine->trace) emulator::trace_size(0, bursts * bytes, bursts);
}

template <typename T>
void copy_in(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t bursts, uint64_t bytes, uint64_t gm_gap,
             uint64_t ub_gap_blocks, const DataCopyPadExtParams<T>& pad, Where at) {
    emulator::yield_point();
    emulator::issue(emulator::MTE2);
    const uint64_t left = uint64_t(pad.leftPadding) * sizeof(T), right = uint64_t(pad.rightPadding) * sizeof(T);
    if (left > 32 || right > 32) emulator::report("range", at, "padding of more than 32 bytes");
    const uint64_t row = (left + bytes + right + 31) / 32 * 32, pitch = row + ub_gap_blocks * 32;
    if (bursts == 0 || bytes == 0) return;
    ++emulator::core->count.transfers_in;
    emulator::core->count.bytes_in += uint64_t(bursts) * bytes;
    count_bursts(bursts, bytes);
    for (uint32_t i = 0; i < bursts; ++i) {
        const char* from = static_cast<const char*>(src.check(i * (bytes + gm_gap), bytes, at, false, emulator::MTE2));
        if (!dst.usable(i * pitch, row, at) || !from) return;
        emulator::write_ub(emulator::MTE2, uint32_t(dst.address + i * pitch), uint32_t(row), at);
        char* to = reinterpret_cast<char*>(dst.data()) + i * pitch;
        // Left padding, the data, right padding and the filling up to 32 bytes; without padding the filling repeats
        // the first element, with padding and isPad == false its value is undefined (here: a pattern of ones).
        T fill = pad.paddingValue;
        if (!pad.isPad) {
            if (left + right == 0) std::memcpy(&fill, from, sizeof(T));
            else std::memset(static_cast<void*>(&fill), 0xff, sizeof(T));
        }
        for (uint64_t at_byte = 0; at_byte < row; at_byte += sizeof(T)) {
            if (at_byte < left || at_byte >= left + bytes) std::memcpy(to + at_byte, &fill, sizeof(T));
        }
        std::memcpy(to + left, from, bytes);
    }
}

template <typename T>
void copy_out(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t bursts, uint64_t bytes,
              uint64_t ub_gap_blocks, uint64_t gm_gap, Where at) {
    emulator::yield_point();
    emulator::issue(emulator::MTE3);
    if (bursts == 0 || bytes == 0) return;
    ++emulator::core->count.transfers_out;
    emulator::core->count.bytes_out += uint64_t(bursts) * bytes;
    count_bursts(bursts, bytes);
    const uint64_t pitch = (bytes + 31) / 32 * 32 + ub_gap_blocks * 32;
    for (uint32_t i = 0; i < bursts; ++i) {
        char* to = static_cast<char*>(dst.check(i * (bytes + gm_gap), bytes, at, true, emulator::MTE3));
        if (!src.usable(i * pitch, bytes, at) || !to) return;
        emulator::read_ub(emulator::MTE3, uint32_t(src.address + i * pitch), uint32_t(bytes), at);
        const char* from = reinterpret_cast<const char*>(src.data()) + i * pitch;
        if (!emulator::core->atomic_add) {
            std::memcpy(to, from, bytes);
        } else {
            for (uint64_t k = 0; k < bytes; k += sizeof(float)) {
                float sum, add;
                std::memcpy(&sum, to + k, 4);
                std::memcpy(&add, from + k, 4);
                sum += add;
                std::memcpy(to + k, &sum, 4);
            }
        }
    }
}

inline uint64_t rounded_count(uint64_t bytes, Where at) {
    if (bytes % 32) {
        emulator::report("alignment", at, "DataCopy of %llu bytes is silently cut to a multiple of 32",
                         (unsigned long long)bytes);
    }
    return bytes / 32 * 32;
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count, Where at = EMULATOR_HERE) {
    copy_in(dst, src, 1, rounded_count(uint64_t(count) * sizeof(T), at), 0, 0, DataCopyPadExtParams<T>(), at);
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count, Where at = EMULATOR_HERE) {
    copy_out(dst, src, 1, rounded_count(uint64_t(count) * sizeof(T), at), 0, 0, at);
}

inline void check_pad_copy(uint32_t bursts, uint64_t bytes, uint64_t element, Where at) {
    if (bursts > 4095) emulator::report("range", at, "blockCount %u, at most 4095", bursts);
    if (bytes > 2097151) emulator::report("range", at, "blockLen %llu, at most 2097151", (unsigned long long)bytes);
    if (bytes % element) emulator::report("range", at, "blockLen is no multiple of the element size");
}
template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad, Where at = EMULATOR_HERE) {
    check_pad_copy(p.blockCount, p.blockLen, sizeof(T), at);
    copy_in(dst, src, p.blockCount, p.blockLen, p.srcStride, p.dstStride, pad, at);
}
template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p,
                 Where at = EMULATOR_HERE) {
    check_pad_copy(p.blockCount, p.blockLen, sizeof(T), at);
    copy_out(dst, src, p.blockCount, p.blockLen, p.srcStride, p.dstStride, at);
}

}  // namespace AscendC
