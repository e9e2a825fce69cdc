// Reductions over a repeat, over blocks of 32 bytes, and over whole tensors.
#pragma once
#include <limits>

#include "vector.h"

namespace AscendC {

// Sums as the device does: pairs, then pairs of pairs.
template <typename T>
inline T tree_sum(const T* values, uint32_t n) {
    if (n == 8) {
        const T a = T(float(values[0]) + float(values[1])), b = T(float(values[2]) + float(values[3]));
        const T c = T(float(values[4]) + float(values[5])), d = T(float(values[6]) + float(values[7]));
        return T(float(T(float(a) + float(b))) + float(T(float(c) + float(d))));
    }
    T part[128];
    for (uint32_t i = 0; i < n; ++i) part[i] = values[i];
    for (; n > 1; n = (n + 1) / 2) {
        for (uint32_t i = 0; i < n / 2; ++i) part[i] = T(float(part[2 * i]) + float(part[2 * i + 1]));
        if (n % 2) part[n / 2] = part[n - 1];
    }
    return part[0];
}

// Each repeat gives `outputs` results of `group` lanes each; dst moves by dst_step bytes a repeat.
template <typename T, typename F>
void reduce_repeats(int id, const LocalTensor<T>& dst, const LocalTensor<T>& src, int mask, int repeats, uint32_t group,
                    int32_t dst_step, uint32_t alignment, int32_t block_stride, int32_t repeat_stride, Where at, F f) {
    static_assert(emulator::one_of<T, half, float>, "reductions take half or float");
    if (!repeat_valid(mask, repeats, int(256 / sizeof(T)), at)) return;
    emulator::issue(emulator::V);
    tally(id, uint64_t(repeats), uint64_t(repeats) * uint64_t(mask));
    Operand o;
    if (!operand(o, src, mask, repeats, block_stride, repeat_stride, at)) return;
    const uint32_t outputs = (uint32_t(mask) + group - 1) / group;
    if (!dst.usable(0, uint64_t(repeats - 1) * dst_step + outputs * sizeof(T), at, alignment)) return;
    T scratch[128];
    for (uint32_t r = 0; r < uint32_t(repeats); ++r) {
        const T* s = gather(o, r, mask, scratch, at, false);
        T results[16];
        for (uint32_t k = 0; k < outputs; ++k) {
            results[k] = f(s + k * group, uint32_t(mask) - k * group < group ? uint32_t(mask) - k * group : group);
        }
        emulator::write_ub(emulator::V, dst.address + r * dst_step, outputs * sizeof(T), at);
        std::memcpy(dst.data(r * dst_step), results, outputs * sizeof(T));
    }
}

// Sum of each block of 32 bytes; 8 results a repeat. (Order of mask and repeatTime differs from WholeReduceSum.)
template <typename T>
void BlockReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t repeatTime, const int32_t mask,
                    const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("BlockReduceSum"));
    reduce_repeats(id, dst, src, mask, repeatTime, 32 / sizeof(T), dstRepStride * 8 * int(sizeof(T)), 8 * sizeof(T),
                   srcBlkStride, srcRepStride, at, [](const T* s, uint32_t n) { return tree_sum(s, n); });
}
template <typename T>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask, const int32_t repeatTime,
                    const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("WholeReduceSum"));
    reduce_repeats(id, dst, src, mask, repeatTime, 256 / sizeof(T), dstRepStride * int(sizeof(T)), sizeof(T),
                   srcBlkStride, srcRepStride, at, [](const T* s, uint32_t n) { return tree_sum(s, n); });
}

// Largest of count values and, with calIndex, the smallest index that holds it (as the bits of dst[1]).
// A macro on the device: one pass over the values, then passes over 2 results a repeat, all in sharedTmpBuffer.
template <typename T>
void ReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& tmp, const int32_t count,
               bool calIndex = false, Where at = EMULATOR_HERE) {
    static_assert(emulator::one_of<T, half, float>, "ReduceMax takes half or float");
    static const int id = emulator::intern(instruction<T>("WholeReduceMax"));
    if (!count_valid(count, at)) return;
    const uint64_t lanes = 256 / sizeof(T), per_block = 32 / sizeof(T);
    uint64_t left = uint64_t(count), scratch = 0;
    emulator::issue(emulator::V);
    do {
        left = (left + lanes - 1) / lanes;
        tally(id, left, left * lanes);
        left *= 2;
        scratch = calIndex ? scratch + (left + per_block - 1) / per_block * per_block
                           : (scratch > left ? scratch : (left + per_block - 1) / per_block * per_block);
    } while (left > 2);
    if (!src.usable(0, uint64_t(count) * sizeof(T), at) || !tmp.usable(0, scratch * sizeof(T), at) ||
        !dst.usable(0, (calIndex ? 2 : 1) * sizeof(T), at, sizeof(T))) return;
    // The scratch may hold the result, but not the source.
    if (tmp.address < src.address + count * sizeof(T) && src.address < tmp.address + scratch * sizeof(T)) {
        emulator::report("overlap", at, "the scratch of ReduceMax lies over its source");
    }
    emulator::read_ub(emulator::V, src.address, uint32_t(count * sizeof(T)), at);
    emulator::write_ub(emulator::V, tmp.address, uint32_t(scratch * sizeof(T)), at);
    emulator::write_ub(emulator::V, dst.address, (calIndex ? 2 : 1) * sizeof(T), at);
    int32_t best = 0;
    for (int32_t i = 1; i < count; ++i) {
        if (float(src.data()[i]) > float(src.data()[best])) best = i;
    }
    const T value = src.data()[best];
    dst.data()[0] = value;
    if (!calIndex) return;
    if (sizeof(T) == 2 && best > 65535) emulator::report("range", at, "an index past 65535 does not fit half");
    std::memcpy(reinterpret_cast<char*>(dst.data()) + sizeof(T), &best, sizeof(T));
}

}  // namespace AscendC
