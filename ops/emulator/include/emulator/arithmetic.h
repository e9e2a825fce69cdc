// Elementwise arithmetic: two tensors, a tensor and a scalar, one tensor, multiply and add.
#pragma once
#include "vector.h"

namespace AscendC {

#define EMULATOR_NUMBERS half, float, int16_t, int32_t

#define EMULATOR_BINARY(NAME, EXPRESSION, OVERLAP, ...)                                                                 \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, const int32_t& count,   \
              Where at = EMULATOR_HERE) {                                                                               \
        static_assert(emulator::one_of<T, __VA_ARGS__>, #NAME " takes " #__VA_ARGS__);                                  \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_count(id, dst, src0, src1, count, false, at, lanewise<T>([](auto x, auto y) { return EXPRESSION; }));       \
    }                                                                                                                   \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,          \
              int repeatTime, const BinaryRepeatParams& params, Where at = EMULATOR_HERE) {                             \
        static_assert(emulator::one_of<T, __VA_ARGS__>, #NAME " takes " #__VA_ARGS__);                                  \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_repeats(id, dst, src0, src1, int(mask), repeatTime, params, false, OVERLAP && sizeof(T) >= 2, at,            \
                    lanewise<T>([](auto x, auto y) { return EXPRESSION; }));                                            \
    }
EMULATOR_BINARY(Add, x + y, true, EMULATOR_NUMBERS)
EMULATOR_BINARY(Sub, x - y, true, EMULATOR_NUMBERS)
EMULATOR_BINARY(Mul, x * y, true, EMULATOR_NUMBERS)
EMULATOR_BINARY(Max, x > y ? x : y, true, EMULATOR_NUMBERS)
EMULATOR_BINARY(Min, x < y ? x : y, true, EMULATOR_NUMBERS)
EMULATOR_BINARY(Div, x / y, false, half, float)

#define EMULATOR_BITWISE(NAME, EXPRESSION)                                                                              \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,          \
              int repeatTime, const BinaryRepeatParams& params, Where at = EMULATOR_HERE) {                             \
        static_assert(emulator::one_of<T, int16_t, uint16_t>, #NAME ": int16_t or uint16_t");                           \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_repeats(id, dst, src0, src1, int(mask), repeatTime, params, false, false, at,                                \
                    lanewise<T>([](auto x, auto y) { return EXPRESSION; }));                                            \
    }
EMULATOR_BITWISE(And, x & y)
EMULATOR_BITWISE(Or, x | y)
#undef EMULATOR_BITWISE
#undef EMULATOR_BINARY

// The scalar must have the tensors' type: 1 beside a tensor of float is no call of these.
#define EMULATOR_SCALAR(NAME, EXPRESSION, ...)                                                                          \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,               \
              Where at = EMULATOR_HERE) {                                                                               \
        static_assert(emulator::one_of<T, __VA_ARGS__>, #NAME " takes " #__VA_ARGS__);                                  \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        using C = std::conditional_t<emulator::is_small_float<T>, float, T>;                                            \
        const C y = C(scalar);                                                                                          \
        run_count(id, dst, src, src, count, false, at, lanewise<T>([y](auto x, auto) { return EXPRESSION; }));          \
    }
EMULATOR_SCALAR(Adds, x + y, EMULATOR_NUMBERS)
EMULATOR_SCALAR(Muls, x * y, EMULATOR_NUMBERS)
EMULATOR_SCALAR(Maxs, x > y ? x : y, EMULATOR_NUMBERS)
EMULATOR_SCALAR(Mins, x < y ? x : y, EMULATOR_NUMBERS)
EMULATOR_SCALAR(ShiftLeft, x << y, uint16_t, uint32_t, int16_t, int32_t)
EMULATOR_SCALAR(ShiftRight, x >> y, uint16_t, uint32_t, int16_t, int32_t)
#undef EMULATOR_SCALAR

#define EMULATOR_UNARY(NAME, EXPRESSION)                                                                                \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Where at = EMULATOR_HERE) {    \
        static_assert(emulator::one_of<T, half, float>, #NAME " takes half, float");                                    \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_count(id, dst, src, src, count, false, at, lanewise<T>([](auto x, auto) { return EXPRESSION; }));           \
    }
EMULATOR_UNARY(Exp, std::exp(float(x)))
EMULATOR_UNARY(Ln, std::log(float(x)))
EMULATOR_UNARY(Abs, std::fabs(float(x)))
EMULATOR_UNARY(Sqrt, std::sqrt(float(x)))
EMULATOR_UNARY(Reciprocal, 1.0f / float(x))
#undef EMULATOR_UNARY

// Exact widening of n values; the bulk of the emulator's time goes through here.
template <typename T>
inline void widen_all(float* d, const T* s, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__) && defined(__AVX__)
    if constexpr (std::is_same<T, half>::value) {
        for (; i + 8 <= n; i += 8) {
            _mm256_storeu_ps(d + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
        }
    }
#endif
    for (; i < n; ++i) d[i] = float(s[i]);
}

template <typename T, typename U>
constexpr bool half_or_float = emulator::one_of<T, half, float> && (emulator::one_of<U, T> || emulator::one_of<U, half>);

template <typename T, typename U>
auto multiply_add() {
    static_assert(half_or_float<T, U>, "MulAddDst takes half, float, or float with sources of half");
    return [](T* d, const U* a, const U* b, int64_t n) {
        for (int64_t i = 0; i < n; ++i) d[i] = T(float(d[i]) + float(a[i]) * float(b[i]));
    };
}
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, const int32_t& count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<U>("MulAddDst"));
    run_count(id, dst, src0, src1, count, true, at, multiply_add<T, U>());
}
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, uint64_t mask, int repeatTime,
               const BinaryRepeatParams& params, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<U>("MulAddDst"));
    run_repeats(id, dst, src0, src1, int(mask), repeatTime, params, true, false, at, multiply_add<T, U>());
}

template <typename T, typename U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar, const int32_t& count, Where at = EMULATOR_HERE) {
    static_assert(half_or_float<T, U>, "Axpy takes half, float, or float with a source of half");
    static const int id = emulator::intern(instruction<U>("Axpy"));
    const float factor = float(scalar);
    run_count(id, dst, src, src, count, true, at, [factor](T* d, const U* a, const U*, int64_t n) {
        float wide[64];
        for (int64_t i = 0; i < n; i += 64) {
            const int64_t m = n - i < 64 ? n - i : 64;
            widen_all(wide, a + i, m);
            for (int64_t k = 0; k < m; ++k) d[i + k] = T(float(d[i + k]) + factor * wide[k]);
        }
    });
}
#undef EMULATOR_NUMBERS

}  // namespace AscendC
