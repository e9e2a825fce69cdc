// Vectors of the instruction set this file is compiled for: `vf` holds kLanes floats, `vi` kLanes int32.
// They are GCC/clang vector extensions, so + - * / < ?: work on them directly; the functions below cover the rest.
// The build passes -ffp-contract=off: a*b+c is two roundings everywhere, fma(a, b, c) is one where the machine has it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace COLORA_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

using bf16 = uint16_t;  // bit pattern of a bfloat16

inline vf splat(float a) { return a - vf{}; }
inline vi splat_i(int32_t a) { return a - vi{}; }
inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vi load_i(const int32_t* p) { vi v; std::memcpy(&v, p, sizeof v); return v; }
inline void store_i(int32_t* p, vi v) { std::memcpy(p, &v, sizeof v); }

// First n (0 <= n <= kLanes) elements, the other lanes 0; memory beyond them is not touched.
inline vf load_partial(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#else
  float buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(float));
  return load(buffer);
#endif
}
inline void store_partial(float* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#else
  float buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(n) * sizeof(float));
#endif
}

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }

// float <-> int32, bit casts
inline vf to_float(vi a) { return __builtin_convertvector(a, vf); }
inline vi to_int(vf a) { return __builtin_convertvector(a, vi); }  // towards zero
inline vi bits(vf a) { return (vi)a; }
inline vf from_bits(vi a) { return (vf)a; }

// Horizontal operations fold the halves together, so the order is the same tree in every use.
typedef float v4f __attribute__((vector_size(16)));
template <class Fold>
inline float fold(vf v, const Fold& op) {
#if defined(__AVX512F__)
  const __m256 a = _mm512_castps512_ps256((__m512)v), b = _mm512_extractf32x8_ps((__m512)v, 1);
  const __m256 c = op(a, b);
  v4f d = op((v4f)_mm256_castps256_ps128(c), (v4f)_mm256_extractf128_ps(c, 1));
#elif defined(__AVX2__)
  v4f d = op((v4f)_mm256_castps256_ps128((__m256)v), (v4f)_mm256_extractf128_ps((__m256)v, 1));
#else
  v4f d = v;
#endif
  const float low = op(d[0], d[2]), high = op(d[1], d[3]);
  return op(low, high);
}
inline float sum(vf v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
inline float max_of(vf v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// bfloat16: exact widening; narrowing rounds to nearest, ties to even, and keeps NaN a NaN.
inline float bf16_to_float(bf16 h) {
  const uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
inline bf16 float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16((u >> 16) | 0x40);
  return bf16((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline vf load_bf16(const bf16* p) {
#if defined(__AVX512F__)  // (the compiler splits the conversion of a vector extension in two)
  return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
inline vf load_bf16_partial(const bf16* p, int64_t n) {
  bf16 buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(bf16));
  return load_bf16(buffer);
}
inline void store_bf16(bf16* p, vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  const vu chosen = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)chosen));
#else
  const vh h = __builtin_convertvector(chosen, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}
inline void store_bf16_partial(bf16* p, vf v, int64_t n) {
  bf16 buffer[kLanes];
  store_bf16(buffer, v);
  std::memcpy(p, buffer, size_t(n) * sizeof(bf16));
}

inline vf load_int8(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vf);
#endif
}

// Numbers of any width as float32.
inline vf widen(const float* p) { return load(p); }
inline vf widen(const bf16* p) { return load_bf16(p); }
inline vf widen(const int8_t* p) { return load_int8(p); }
inline vf widen_partial(const float* p, int64_t n) { return load_partial(p, n); }
inline vf widen_partial(const bf16* p, int64_t n) { return load_bf16_partial(p, n); }
inline vf widen_partial(const int8_t* p, int64_t n) {
  int8_t buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(n));
  return load_int8(buffer);
}

// (always inlined: as a function of its own GCC takes it for one without effect and drops the call)
inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace COLORA_ISA_NAMESPACE
