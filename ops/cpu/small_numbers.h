// Small numbers in vectors: IEEE half-precision ones (float16), widened exactly to float32, and bytes.
#pragma once

#include "simd.h"

namespace COLORA_ISA_NAMESPACE {

using f16 = uint16_t;  // bit pattern of a float16

inline float half_to_float(f16 h) {
#if defined(__AVX512F__)
  return _mm_cvtss_f32(_mm_maskz_cvtph_ps(1, _mm_cvtsi32_si128(h)));
#elif defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  uint32_t u;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24 is exact
    const float value = float(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&u, &value, sizeof u);
    u |= sign;
  } else {
    // infinity stays infinity; a NaN keeps its bits and becomes a quiet one, as the machine's conversion makes it
    const uint32_t quiet = exponent == 31 && fraction ? 1u << 22 : 0;
    u = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | fraction << 13 | quiet;
  }
  float value;
  std::memcpy(&value, &u, sizeof value);
  return value;
#endif
}

// The half at an address that need not be aligned.
inline float half_at(const uint8_t* p) {
  f16 h;
  std::memcpy(&h, p, sizeof h);
  return half_to_float(h);
}

inline vf load_half(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = half_at(reinterpret_cast<const uint8_t*>(p + i));
  return v;
#endif
}
inline vf load_half_partial(const f16* p, int64_t n) {
  f16 buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(f16));
  return load_half(buffer);
}

// kLanes bytes as integers.
inline vi bytes_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(raw, vi);
#endif
}

inline vi lane_numbers() {
#if defined(__AVX512F__)
  return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return vi{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return vi{0, 1, 2, 3};
#endif
}

}  // namespace COLORA_ISA_NAMESPACE
