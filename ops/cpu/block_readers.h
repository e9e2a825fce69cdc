// Readers of the blocks of GGUF files: a row is a run of blocks as llama.cpp lays them out, kept as they are.
//
// q4_0, q4_1, q5_0, q5_1, q8_0: 32 values a block; q4_k, q5_k, q6_k: 256, with 6-bit or 8-bit scales of 32 or 16 values.
// Every value is the float32 that the format's formula gives with one rounding: d·q and s·q are exact (at most 11 + 8 +
// 5 significant bits), so w = d·q + m and w = d·sc·q − dmin·m round once, in whatever form they are computed.
//
// A step of a reader is as many columns as its bytes pair up (32, 64 or 128), handed out in ascending order; blocks never
// end inside a step. Nothing is aligned to more than a byte, and nothing behind a row's last block is touched.
#pragma once

#include "weights.h"

namespace COLORA_ISA_NAMESPACE {

// What the numbers 0...15 (or 31) of a block mean: d·(q − centre), or d·q + m. With AVX-512 they are looked up.
struct Nibbles {
#if defined(__AVX512F__)
  vf table;
  static Nibbles centred(float d, int centre) { return {to_float(lane_numbers() - centre) * splat(d)}; }
  static Nibbles affine(float d, float m) { return {fma(to_float(lane_numbers()), splat(d), splat(m))}; }
  static Nibbles minus(float d, float m) {
    return {(vf)_mm512_fmsub_ps((__m512)to_float(lane_numbers()), _mm512_set1_ps(d), _mm512_set1_ps(m))};
  }
  // vpermps looks only at the low four bits of an index.
  vf low(vi raw) const { return (vf)_mm512_permutexvar_ps((__m512i)raw, (__m512)table); }
  vf high(vi raw) const { return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)raw, 4), (__m512)table); }
#else
  vf d, m;
  int centre;
  static Nibbles centred(float d, int centre) { return {splat(d), splat(-0.0f), centre}; }
  static Nibbles affine(float d, float m) { return {splat(d), splat(m), 0}; }
  static Nibbles minus(float d, float m) { return affine(d, -m); }
  vf low(vi raw) const { return fma(to_float((raw & 15) - centre), d, m); }
  vf high(vi raw) const { return fma(to_float((raw >> 4) - centre), d, m); }
#endif
};

struct FiveBits {
#if defined(__AVX512F__)
  vf lower, upper;
  static FiveBits centred(float d, int centre) {
    return {to_float(lane_numbers() - centre) * splat(d), to_float(lane_numbers() + (16 - centre)) * splat(d)};
  }
  static FiveBits affine(float d, float m) {
    return {fma(to_float(lane_numbers()), splat(d), splat(m)), fma(to_float(lane_numbers() + 16), splat(d), splat(m))};
  }
  static FiveBits minus(float d, float m) {
    const __m512 by = _mm512_set1_ps(d), less = _mm512_set1_ps(m);
    return {(vf)_mm512_fmsub_ps((__m512)to_float(lane_numbers()), by, less),
            (vf)_mm512_fmsub_ps((__m512)to_float(lane_numbers() + 16), by, less)};
  }
  vf of(vi q) const { return (vf)_mm512_permutex2var_ps((__m512)lower, (__m512i)q, (__m512)upper); }
#else
  vf d, m;
  int centre;
  static FiveBits centred(float d, int centre) { return {splat(d), splat(-0.0f), centre}; }
  static FiveBits affine(float d, float m) { return {splat(d), splat(m), 0}; }
  static FiveBits minus(float d, float m) { return affine(d, -m); }
  vf of(vi q) const { return fma(to_float(q - centre), d, m); }
#endif
};

// Where the rows lie. A reader has, as static functions, scale(block), what the block's values have in common, and
// read<step>(block, scale, out), kUnits vectors of it.
template <int kValues_, int kBytes_, int kStep_>
struct Blocks {
  static constexpr bool kBlocked = true;
  static constexpr int kValues = kValues_, kBytes = kBytes_;  // of a block
  static constexpr int kStep = kStep_, kUnits = kStep / kLanes;
  const uint8_t* p;
  int64_t stride;
  explicit Blocks(const Weight& w) : p(static_cast<const uint8_t*>(w.data)), stride(w.in / kValues * kBytes) {}
  
  const uint8_t* block(int64_t o, int64_t k) const { return p + o * stride + k / kValues * kBytes; }
  const void* address(int64_t o, int64_t k) const { return block(o, k); }
};

inline void read_nibbles(const Nibbles& values, const uint8_t* q, vf* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += kLanes) {
    const vi raw = bytes_at(q + i);
    out[i / kLanes] = values.low(raw);
    out[(16 + i) / kLanes] = values.high(raw);
  }
}

// qh: bit i belongs to value i.
inline void read_five_bits(const FiveBits& values, uint32_t qh, const uint8_t* q, vf* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += kLanes) {
    const vi raw = bytes_at(q + i), at = lane_numbers() + i;
    out[i / kLanes] = values.of((raw & 15) | ((splat_i(int32_t(qh & 0xffff)) >> at & 1) << 4));
    out[(16 + i) / kLanes] = values.of((raw >> 4) | ((splat_i(int32_t(qh >> 16)) >> at & 1) << 4));
  }
}

inline uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

struct Q4_0Reader : Blocks<32, 18, 32> {
  using Blocks::Blocks;
  using Scale = Nibbles;
  static void scale(const uint8_t* b, Scale& to) { to = Nibbles::centred(half_at(b), 8); }
  template <int>
  static void read(const uint8_t* b, const Scale& scale, vf* out) { read_nibbles(scale, b + 2, out); }
};

struct Q4_1Reader : Blocks<32, 20, 32> {
  using Blocks::Blocks;
  using Scale = Nibbles;
  static void scale(const uint8_t* b, Scale& to) { to = Nibbles::affine(half_at(b), half_at(b + 2)); }
  template <int>
  static void read(const uint8_t* b, const Scale& scale, vf* out) { read_nibbles(scale, b + 4, out); }
};

struct Q5_0Reader : Blocks<32, 22, 32> {
  using Blocks::Blocks;
  using Scale = FiveBits;
  static void scale(const uint8_t* b, Scale& to) { to = FiveBits::centred(half_at(b), 16); }
  template <int>
  static void read(const uint8_t* b, const Scale& scale, vf* out) { read_five_bits(scale, word_at(b + 2), b + 6, out); }
};

struct Q5_1Reader : Blocks<32, 24, 32> {
  using Blocks::Blocks;
  using Scale = FiveBits;
  static void scale(const uint8_t* b, Scale& to) { to = FiveBits::affine(half_at(b), half_at(b + 2)); }
  template <int>
  static void read(const uint8_t* b, const Scale& scale, vf* out) { read_five_bits(scale, word_at(b + 4), b + 8, out); }
};

struct Q8_0Reader : Blocks<32, 34, 32> {
  using Blocks::Blocks;
  using Scale = vf;
  static void scale(const uint8_t* b, Scale& to) { to = splat(half_at(b)); }
  template <int>
  static void read(const uint8_t* b, const Scale& scale, vf* out) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) out[u] = widen(reinterpret_cast<const int8_t*>(b + 2) + u * kLanes) * scale;
  }
};

// The scales of a block of 256: of q4_k and q5_k eight d·sc and then eight dmin·m, of q6_k sixteen d·sc. In memory, from
// where one number fills a vector for nothing.
struct SuperScale {
  alignas(64) float s[16];
};

// 16 small integers times 16 (8 and 8) factors.
#if defined(__AVX512F__)
inline void multiply_scales(__m512i wide, __m512 factors, SuperScale& to) {
  _mm512_store_ps(to.s, _mm512_mul_ps(_mm512_cvtepi32_ps(wide), factors));
  asm("" : "+m"(to.s));  // else GCC keeps them in a register and fills vectors by permuting it
}
#elif defined(__AVX2__)
inline void multiply_scales(__m256i first, __m256i second, float a, float b, SuperScale& to) {
  _mm256_store_ps(to.s, _mm256_mul_ps(_mm256_cvtepi32_ps(first), _mm256_set1_ps(a)));
  _mm256_store_ps(to.s + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(second), _mm256_set1_ps(b)));
  asm("" : "+m"(to.s));
}
#endif

// q4_k and q5_k: d, dmin, then 12 bytes of eight 6-bit scales and eight 6-bit minima, in words a, b, c:
//   scales 0-3: a & 63, 4-7: c & 15 | a >> 6 << 4; minima 0-3: b & 63, 4-7: c >> 4 | b >> 6 << 4, a byte each
inline void six_bit_scales(const uint8_t* b, SuperScale& to) {
#if defined(__AVX2__)
  const __m128i head = _mm_loadu_si128((const __m128i*)b);
  const __m128i low = _mm_and_si128(_mm_srlv_epi32(_mm_shuffle_epi32(head, 0xed), _mm_set_epi32(4, 0, 0, 0)),
                                    _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
  const __m128i high = _mm_and_si128(_mm_srli_epi32(_mm_shuffle_epi32(head, 0x84), 2),
                                     _mm_set_epi32(0x30303030, 0, 0x30303030, 0));
  const __m128i six = _mm_or_si128(low, high);
#if defined(__AVX512F__)
  const __m512 both = _mm512_castps128_ps512(_mm_maskz_cvtph_ps(3, head));
  const __m512i which = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  multiply_scales(_mm512_cvtepu8_epi32(six), _mm512_permutexvar_ps(which, both), to);
#else
  multiply_scales(_mm256_cvtepu8_epi32(six), _mm256_cvtepu8_epi32(_mm_srli_si128(six, 8)), half_at(b), half_at(b + 2),
                  to);
#endif
#else
  const float d = half_at(b), dmin = half_at(b + 2);
  const uint8_t* s = b + 4;
  for (int j = 0; j < 4; ++j) {
    to.s[j] = d * float(s[j] & 63);
    to.s[j + 4] = d * float((s[j + 8] & 15) | s[j] >> 6 << 4);
    to.s[j + 8] = dmin * float(s[j + 4] & 63);
    to.s[j + 12] = dmin * float(s[j + 8] >> 4 | s[j + 4] >> 6 << 4);
  }
#endif
}

struct Q4_KReader : Blocks<256, 144, 64> {
  using Blocks::Blocks;
  using Scale = SuperScale;
  static void scale(const uint8_t* b, Scale& to) { six_bit_scales(b, to); }
  // Of 32 bytes the low nibbles are 32 values, the high ones the next 32.
  template <int step>
  static void read(const uint8_t* b, const Scale& scale, vf* out) {
    const uint8_t* q = b + 16 + 32 * step;
    const float* s = scale.s + 2 * step;
    const Nibbles low = Nibbles::minus(s[0], s[8]), high = Nibbles::minus(s[1], s[9]);
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += kLanes) {
      const vi raw = bytes_at(q + i);
      out[i / kLanes] = low.low(raw);
      out[(32 + i) / kLanes] = high.high(raw);
    }
  }
};

struct Q5_KReader : Blocks<256, 176, 64> {
  using Blocks::Blocks;
  using Scale = SuperScale;
  static void scale(const uint8_t* b, Scale& to) { six_bit_scales(b, to); }
  template <int step>
  static void read(const uint8_t* b, const Scale& scale, vf* out) {
    const uint8_t *q = b + 48 + 32 * step, *h = b + 16;  // bit j of a byte of h belongs to the j-th 32 values
    const float* s = scale.s + 2 * step;
    const FiveBits low = FiveBits::minus(s[0], s[8]), high = FiveBits::minus(s[1], s[9]);
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += kLanes) {
      const vi raw = bytes_at(q + i), fifth = bytes_at(h + i) >> (2 * step);
      out[i / kLanes] = low.of((raw & 15) | (fifth & 1) << 4);
      out[(32 + i) / kLanes] = high.of((raw >> 4) | (fifth & 2) << 3);
    }
  }
};

struct Q6_KReader : Blocks<256, 210, 128> {
  using Blocks::Blocks;
  using Scale = SuperScale;
  static void scale(const uint8_t* b, Scale& to) {
    const float d = half_at(b + 208);
#if defined(__AVX2__)
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(b + 192));
#endif
#if defined(__AVX512F__)
    multiply_scales(_mm512_cvtepi8_epi32(bytes), _mm512_set1_ps(d), to);
#elif defined(__AVX2__)
    multiply_scales(_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)), d, d, to);
#else
    for (int i = 0; i < 16; ++i) to.s[i] = d * float(int8_t(b[192 + i]));
#endif
  }
  template <int step>
  static void read(const uint8_t* b, const Scale& scale, vf* out) {
    const uint8_t *q = b + 64 * step, *h = b + 128 + 32 * step;
    const float* s = scale.s + 8 * step;
#if defined(__AVX512F__)
    // All 128 six-bit numbers as bytes first.
    const __m512i low4 = _mm512_set1_epi8(15), high2 = _mm512_set1_epi8(0x30), centre = _mm512_set1_epi8(32);
    const __m512i nibbles = _mm512_loadu_si512(q);
    const __m256i two = _mm256_loadu_si256((const __m256i*)h);
    const __m512i twos = _mm512_inserti64x4(_mm512_castsi256_si512(two), two, 1);
    const __m512i left = _mm512_inserti64x4(_mm512_set1_epi16(4), _mm256_set1_epi16(2), 1);
    const __m512i right = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    const __m512i first = _mm512_ternarylogic_epi32(_mm512_and_si512(nibbles, low4), _mm512_sllv_epi16(twos, left),
                                                    high2, kOrAnd);
    const __m512i second = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low4),
                                                     _mm512_srlv_epi16(twos, right), high2, kOrAnd);
    alignas(64) int8_t numbers[128];
    _mm512_store_si512(numbers, _mm512_sub_epi8(first, centre));
    _mm512_store_si512(numbers + 64, _mm512_sub_epi8(second, centre));
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) out[u] = widen(numbers + u * kLanes) * splat(s[u]);
#else
    for (int g = 0; g < 4; ++g)
#pragma GCC unroll 8
      for (int i = 0; i < 32; i += kLanes) {
        const vi raw = bytes_at(q + (g & 1) * 32 + i), two = bytes_at(h + i) >> (2 * g) & 3;
        const vi number = ((g < 2 ? raw & 15 : raw >> 4) | two << 4) - 32;
        out[(32 * g + i) / kLanes] = to_float(number) * splat(s[(32 * g + i) / 16]);
      }
#endif
  }
};

}  // namespace COLORA_ISA_NAMESPACE
