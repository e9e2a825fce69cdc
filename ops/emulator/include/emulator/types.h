// Number formats of the device that the host compiler lacks: half and bfloat16_t, with the conversions of Cast.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace emulator {

inline uint32_t float_bits(float v) {
    uint32_t b;
    std::memcpy(&b, &v, 4);
    return b;
}
inline float bits_float(uint32_t b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
}

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent == 0) {
        float v = std::ldexp(float(fraction), -24);
        return sign ? -v : v;
    }
    return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

// Round to nearest, ties to even (RoundMode::CAST_RINT); overflow becomes infinity, as in the chip's inf/nan mode.
inline uint16_t float_to_half(float v) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t bits = float_bits(v), sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (bits < 0x38800000u) {
        return uint16_t(sign | uint32_t(std::nearbyint(std::ldexp(bits_float(bits), 24))));
    }
    bits += 0xfffu + ((bits >> 13) & 1);
    return uint16_t(sign | ((bits >> 13) - (112u << 10)));
#endif
}

inline float bf16_to_float(uint16_t b) { return bits_float(uint32_t(b) << 16); }
inline uint16_t float_to_bf16(float v) {
    uint32_t b = float_bits(v);
    if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t((b >> 16) | 0x40u);
    return uint16_t((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}

}  // namespace emulator

namespace emulator {
struct half_t {
    uint16_t bits = 0;
    half_t() = default;
    template <typename N, typename = std::enable_if_t<std::is_arithmetic<N>::value>>
    half_t(N v) : bits(float_to_half(float(v))) {}
    operator float() const { return half_to_float(bits); }
};
}  // namespace emulator

// On the device `half` is a type of the compiler, in some CANN releases a macro: nothing else may have that name. With
// this macro a variable of that name does not compile here either.
#define half ::emulator::half_t

struct bfloat16_t {
    uint16_t bits = 0;
    bfloat16_t() = default;
    template <typename N, typename = std::enable_if_t<std::is_arithmetic<N>::value>>
    explicit bfloat16_t(N v) : bits(emulator::float_to_bf16(float(v))) {}
    explicit operator float() const { return emulator::bf16_to_float(bits); }
};

namespace AscendC {
// Two values of four bits in a byte, two's complement, the first in the low half. Tensors of it count values, not bytes.
struct int4b_t {
    uint8_t pair = 0;
};
}  // namespace AscendC

namespace emulator {

template <typename T>
constexpr uint64_t bytes_of(uint64_t elements) {
    return std::is_same<T, AscendC::int4b_t>::value ? (elements + 1) / 2 : elements * sizeof(T);
}

// Whether T is one of the types after it: what an instruction takes on Atlas A2/A3.
template <typename T, typename... Types>
constexpr bool one_of = (std::is_same<T, Types>::value || ...);

template <typename T>
constexpr bool is_small_float = std::is_same<T, half>::value || std::is_same<T, bfloat16_t>::value;

template <typename T>
inline float widen(T v) {
    return float(v);
}

// The neighbours that directed rounding may choose are one unit of the last place away from the nearest value.
template <typename T>
inline T step(T v, int direction) {
    bool negative = v.bits & 0x8000u;
    if ((v.bits & 0x7fffu) == 0) {
        v.bits = uint16_t(direction > 0 ? 0x0001u : 0x8001u);
    } else {
        v.bits = uint16_t(v.bits + ((direction > 0) != negative ? 1 : -1));
    }
    return v;
}

}  // namespace emulator
