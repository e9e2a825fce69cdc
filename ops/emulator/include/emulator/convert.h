// Cast, Duplicate, Brcb: other types, one value everywhere, one value a block.
#pragma once
#include "arithmetic.h"

namespace AscendC {

enum class RoundMode : uint8_t { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
struct BrcbRepeatParams {
    uint16_t dstBlkStride = 1, dstRepStride = 8;
    BrcbRepeatParams() {}
    BrcbRepeatParams(uint16_t dstBlk, uint16_t dstRep) : dstBlkStride(dstBlk), dstRepStride(dstRep) {}
};

template <typename D>
D round_to(float v, RoundMode mode) {
    if constexpr (emulator::is_small_float<D>) {
        const D nearest = D(v);
        if (mode == RoundMode::CAST_RINT || std::isnan(v) || std::isinf(float(nearest)) || float(nearest) == v) return nearest;
        const bool up = mode == RoundMode::CAST_CEIL || (mode == RoundMode::CAST_TRUNC && v < 0);
        if (mode == RoundMode::CAST_ROUND) return nearest;
        if (up) return float(nearest) < v ? emulator::step(nearest, 1) : nearest;
        return float(nearest) > v ? emulator::step(nearest, -1) : nearest;
    } else {
        const float r = mode == RoundMode::CAST_FLOOR ? std::floor(v) : mode == RoundMode::CAST_CEIL ? std::ceil(v)
                      : mode == RoundMode::CAST_TRUNC ? std::trunc(v) : mode == RoundMode::CAST_ROUND ? std::round(v)
                      : std::nearbyint(v);
        const double low = double(std::numeric_limits<D>::min()), high = double(std::numeric_limits<D>::max());
        return std::isnan(r) ? D(0) : double(r) <= low ? std::numeric_limits<D>::min()
             : double(r) >= high ? std::numeric_limits<D>::max() : D(r);
    }
}

template <typename D, typename A>
constexpr bool castable =
    std::is_same<A, half>::value ? emulator::one_of<D, float, int32_t, int16_t, int8_t, uint8_t>
    : std::is_same<A, float>::value ? emulator::one_of<D, float, half, bfloat16_t, int32_t, int16_t>
    : std::is_same<A, bfloat16_t>::value ? emulator::one_of<D, float, int32_t>
    : std::is_same<A, int16_t>::value || std::is_same<A, int32_t>::value ? emulator::one_of<D, float>
    : emulator::one_of<A, int8_t, uint8_t> && emulator::one_of<D, half>;

template <typename D, typename A>
void Cast(const LocalTensor<D>& dst, const LocalTensor<A>& src, const RoundMode& mode, const uint32_t count, Where at = EMULATOR_HERE) {
    constexpr bool widening = std::is_same<D, float>::value || (std::is_same<D, half>::value && sizeof(A) == 1);
    static_assert(castable<D, A>, "no such Cast on Atlas A2/A3");
    static const int id = emulator::intern(instruction<D>((std::string("Cast.") + type_name<A>()).c_str()));
    if (widening && std::is_same<A, int32_t>::value == false && mode != RoundMode::CAST_NONE) {
        emulator::report("range", at, "a widening Cast takes CAST_NONE");
    }
    if (!widening && (mode == RoundMode::CAST_NONE || (std::is_same<D, bfloat16_t>::value && mode == RoundMode::CAST_ODD))) {
        emulator::report("range", at, "this Cast has no such rounding mode");
    }
    const RoundMode how = mode;
    run_count(id, dst, src, src, count, false, at, [how](D* d, const A* a, const A*, int64_t n) {
        if constexpr (std::is_same<D, float>::value) {
            widen_all(d, a, n);
        } else if constexpr (widening) {
            for (int64_t i = 0; i < n; ++i) d[i] = D(float(a[i]));
        } else {
            if (emulator::is_small_float<D> && how == RoundMode::CAST_RINT) {
                for (int64_t i = 0; i < n; ++i) d[i] = D(float(a[i]));
            } else {
                for (int64_t i = 0; i < n; ++i) d[i] = round_to<D>(float(a[i]), how);
            }
        }
    });
}

// Four-bit integers, two in a byte, to half. The count is one of values.
inline void Cast(const LocalTensor<half>& dst, const LocalTensor<int4b_t>& src, const RoundMode& mode, const uint32_t count,
                 Where at = EMULATOR_HERE) {
    static const int id = emulator::intern("Cast.i4.f16");
    if (mode != RoundMode::CAST_NONE) emulator::report("range", at, "a widening Cast takes CAST_NONE");
    if (count % 2) emulator::report("range", at, "a Cast of %u int4b_t: the count must be even", count);
    if (!count_valid(count, at)) return;
    emulator::issue(emulator::V);
    tally(id, (uint64_t(count) * sizeof(half) + 255) / 256, count);
    const uint32_t from = (count + 1) / 2, to = count * uint32_t(sizeof(half));
    if (!src.usable(0, from, at) || !dst.usable(0, to, at)) return;
    if (src.address < dst.address + to && dst.address < src.address + from) {
        emulator::report("overlap", at, "source and destination overlap");
    }
    emulator::read_ub(emulator::V, src.address, from, at);
    emulator::write_ub(emulator::V, dst.address, to, at);
    static const half values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    const uint8_t* pairs = reinterpret_cast<const uint8_t*>(src.data());
    for (uint32_t i = 0; i < count; ++i) dst.data()[i] = values[pairs[i / 2] >> (i % 2 * 4) & 15];
}

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& value, const int32_t& count, Where at = EMULATOR_HERE) {
    static_assert(emulator::one_of<T, half, bfloat16_t, int16_t, uint16_t, int32_t, uint32_t, float>,
                  "Duplicate takes half, bfloat16_t, float and integers of 16 and 32 bits");
    static const int id = emulator::intern(instruction<T>("Duplicate"));
    if (!count_valid(count, at)) return;
    emulator::issue(emulator::V);
    tally(id, (uint64_t(count) * sizeof(T) + 255) / 256, uint64_t(count));
    if (!dst.usable(0, uint64_t(count) * sizeof(T), at)) return;
    emulator::write_ub(emulator::V, dst.address, uint32_t(count * sizeof(T)), at);
    for (int32_t i = 0; i < count; ++i) dst.data()[i] = value;
}

// Each repeat takes 8 elements and fills a block of 32 bytes with each of them.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, int repeatTime, const BrcbRepeatParams& p,
          Where at = EMULATOR_HERE) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb takes elements of 16 or 32 bits");
    static const int id = emulator::intern(instruction<T>("Brcb"));
    if (!repeat_valid(1, repeatTime, 1, at)) return;
    if (p.dstBlkStride == 0) emulator::report("range", at, "Brcb with dstBlkStride 0");
    if (dst.address == src.address) emulator::report("overlap", at, "Brcb in place");
    emulator::issue(emulator::V);
    tally(id, uint64_t(repeatTime), uint64_t(repeatTime) * 8);
    const uint32_t per_block = 32 / sizeof(T);
    const uint64_t reach = (uint64_t(repeatTime - 1) * p.dstRepStride + 7u * p.dstBlkStride + 1) * 32;
    if (!src.usable(0, uint64_t(repeatTime) * 8 * sizeof(T), at) || !dst.usable(0, reach, at)) return;
    emulator::read_ub(emulator::V, src.address, uint32_t(repeatTime * 8 * sizeof(T)), at);
    for (int r = 0; r < repeatTime; ++r) {
        for (uint32_t e = 0; e < 8; ++e) {
            const uint32_t offset = (uint32_t(r) * p.dstRepStride + e * p.dstBlkStride) * 32;
            emulator::write_ub(emulator::V, dst.address + offset, 32, at);
            for (uint32_t i = 0; i < per_block; ++i) dst.data(offset)[i] = src.data()[uint32_t(r) * 8 + e];
        }
    }
}

}  // namespace AscendC
