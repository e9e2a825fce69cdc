// Compare, CompareScalar, Select: masks of one bit an element, the lowest bit first.
#pragma once
#include "vector.h"

namespace AscendC {

enum class CMPMODE : uint8_t { LT, GT, EQ, LE, GE, NE };
enum class SELMODE : uint8_t { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };

template <typename T>
bool compares(T a, T b, CMPMODE mode) {
    const float x = float(a), y = float(b);
    switch (mode) {
        case CMPMODE::LT: return x < y;
        case CMPMODE::GT: return x > y;
        case CMPMODE::EQ: return x == y;
        case CMPMODE::LE: return x <= y;
        case CMPMODE::GE: return x >= y;
        default: return x != y;
    }
}
template <typename T, typename U, typename Right>
void compare(int id, const LocalTensor<U>& dst, const LocalTensor<T>& src0, Right right, CMPMODE mode, uint32_t count, Where at) {
    static_assert(emulator::one_of<T, half, float, int32_t>, "comparisons take half, float, and int32_t for EQ");
    if (std::is_same<T, int32_t>::value && mode != CMPMODE::EQ) emulator::report("range", at, "int32_t compares by EQ alone");
    emulator::issue(emulator::V);
    if (!count_valid(count, at)) return;
    tally(id, (uint64_t(count) * sizeof(T) + 255) / 256, count);
    if (count * sizeof(T) % 256) {
        emulator::report("range", at, "a comparison of %u elements: the bytes must be a multiple of 256", count);
    }
    if (!src0.usable(0, count * sizeof(T), at) || !dst.usable(0, (count + 7) / 8, at)) return;
    emulator::read_ub(emulator::V, src0.address, count * sizeof(T), at);
    emulator::write_ub(emulator::V, dst.address, (count + 7) / 8, at);
    uint8_t* bits = reinterpret_cast<uint8_t*>(dst.data());
    for (uint32_t i = 0; i < count; i += 8) {
        uint8_t byte = 0;
        for (uint32_t k = 0; k < 8 && i + k < count; ++k) byte |= uint8_t(compares<T>(src0.data()[i + k], right(i + k), mode) << k);
        bits[i / 8] = byte;
    }
}
template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE mode, uint32_t count, Where at = EMULATOR_HERE) {
    static_assert(emulator::one_of<U, int8_t, uint8_t>, "the mask of Compare is int8_t or uint8_t");
    static const int id = emulator::intern(instruction<T>("Compare"));
    if (!src1.usable(0, count * sizeof(T), at)) return;
    const T* right = src1.data();
    compare<T>(id, dst, src0, [right](uint32_t i) { return right[i]; }, mode, count, at);
    emulator::read_ub(emulator::V, src1.address, count * sizeof(T), at);
}
template <typename T, typename U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T scalar, CMPMODE mode, uint32_t count, Where at = EMULATOR_HERE) {
    static_assert(emulator::one_of<U, uint8_t>, "the mask of CompareScalar is uint8_t");
    static const int id = emulator::intern(instruction<T>("CompareScalar"));
    compare<T>(id, dst, src0, [scalar](uint32_t) { return scalar; }, mode, count, at);
}
// Where the mask's bit is 1 the result is src0, elsewhere the scalar. (The tensor/scalar mode of Select.)
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0, T scalar, SELMODE mode, uint32_t count, Where at = EMULATOR_HERE) {
    static_assert(emulator::one_of<T, half, float>, "Select takes half, float");
    static_assert(emulator::one_of<U, uint8_t, uint16_t, uint32_t, uint64_t>, "the mask of Select is unsigned");
    static const int id = emulator::intern(instruction<T>("Select"));
    if (mode != SELMODE::VSEL_TENSOR_SCALAR_MODE) emulator::report("range", at, "Select with a scalar needs the tensor/scalar mode");
    if (!mask.usable(0, (count + 7) / 8, at)) return;
    const uint8_t* bits = reinterpret_cast<const uint8_t*>(mask.data());
    run_count(id, dst, src0, src0, count, false, at, [=](T* d, const T* a, const T*, int64_t n) {
        for (int64_t i = 0; i < n; ++i) d[i] = bits[i / 8] >> (i % 8) & 1 ? a[i] : scalar;
    });
    emulator::read_ub(emulator::V, mask.address, (count + 7) / 8, at);
}

}  // namespace AscendC
