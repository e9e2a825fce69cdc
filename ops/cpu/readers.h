// Readers of weights whose rows are plain numbers: floats, and integers with a scale tensor.
//
// A reader hands out kUnits vectors for the columns [k, k + kStep). Nibbles unpack a byte vector into even and odd
// columns, so their activations are rearranged the same way once per call (rearrange).
// Each has: Scale (what one row needs inside one group), scale(o, g), read(o, k, scale, out[kUnits]) and read_tail(...)
// for the last n < kStep columns of a row (missing lanes: any finite value times x = 0).
#pragma once

#include "weights.h"

namespace COLORA_ISA_NAMESPACE {

struct Float32Reader {
  static constexpr int kUnits = 1, kStep = kLanes;
  static constexpr bool kBlocked = false;
  struct Scale {};
  const float* p;
  int64_t stride;
  explicit Float32Reader(const Weight& w) : p(w.f32()), stride(w.in) {}
  Scale scale(int64_t, int64_t) const { return {}; }
  void read(int64_t o, int64_t k, const Scale&, vf* out) const { out[0] = load(p + o * stride + k); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale&, vf* out) const {
    out[0] = load_partial(p + o * stride + k, n);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k; }
};

struct Bfloat16Reader {
  static constexpr int kUnits = 1, kStep = kLanes;
  static constexpr bool kBlocked = false;
  struct Scale {};
  const bf16* p;
  int64_t stride;
  explicit Bfloat16Reader(const Weight& w) : p(w.bf()), stride(w.in) {}
  Scale scale(int64_t, int64_t) const { return {}; }
  void read(int64_t o, int64_t k, const Scale&, vf* out) const { out[0] = load_bf16(p + o * stride + k); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale&, vf* out) const {
    out[0] = load_bf16_partial(p + o * stride + k, n);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k; }
};

struct Float16Reader {
  static constexpr int kUnits = 1, kStep = kLanes;
  static constexpr bool kBlocked = false;
  struct Scale {};
  const f16* p;
  int64_t stride;
  explicit Float16Reader(const Weight& w) : p(w.half()), stride(w.in) {}
  Scale scale(int64_t, int64_t) const { return {}; }
  void read(int64_t o, int64_t k, const Scale&, vf* out) const { out[0] = load_half(p + o * stride + k); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale&, vf* out) const {
    out[0] = load_half_partial(p + o * stride + k, n);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k; }
};

// w = q * scale, or with zero points (q - zero) * scale.
template <bool zeros>
struct BytesReader {
  static constexpr int kUnits = 1, kStep = kLanes;
  static constexpr bool kBlocked = false;
  struct Scale {
    vf factor, zero;
  };
  const int8_t* p;
  const float* scales;
  int64_t stride, groups;
  explicit BytesReader(const Weight& w) : p(w.i8()), scales(w.scale), stride(w.in), groups(w.groups) {}
  Scale scale(int64_t o, int64_t g) const {
    const int64_t at = o * groups + g;
    if constexpr (zeros) return {splat(scales[2 * at]), splat(scales[2 * at + 1])};
    else return {splat(scales[at]), vf{}};
  }
  static vf of(vf q, const Scale& s) {
    if constexpr (zeros) return (q - s.zero) * s.factor;
    else return q * s.factor;
  }
  void read(int64_t o, int64_t k, const Scale& s, vf* out) const { out[0] = of(widen(p + o * stride + k), s); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale& s, vf* out) const {
    out[0] = of(widen_partial(p + o * stride + k, n), s);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k; }
};
using Int8Reader = BytesReader<false>;
using Int8ZeroReader = BytesReader<true>;

// w = (q - 8) * scale, or with zero points (q - zero) * scale.
template <bool zeros>
struct NibblesReader {
  static constexpr int kUnits = 2, kStep = 2 * kLanes;
  static constexpr bool kBlocked = false;
#if defined(__AVX512F__)
  using Scale = vf;  // the 16 possible values of the group
#else
  struct Scale {
    vf factor, centre;
  };
#endif
  const uint8_t* p;
  const float* scales;
  int64_t stride, groups;
  explicit NibblesReader(const Weight& w) : p(w.i4()), scales(w.scale), stride(w.in / 2), groups(w.groups) {}
  Scale scale(int64_t o, int64_t g) const {
    const int64_t at = (o * groups + g) * (zeros ? 2 : 1);
    const vf factor = splat(scales[at]), centre = splat(zeros ? scales[at + 1] : 8.0f);
#if defined(__AVX512F__)
    return (to_float(lane_numbers()) - centre) * factor;
#else
    return {factor, centre};
#endif
  }
  static void unpack(const uint8_t* q, const Scale& s, vf* out) {
    const vi b = bytes_at(q);
#if defined(__AVX512F__)
    // vpermps looks only at the low four bits of an index, so the low nibble needs no mask.
    out[0] = (vf)_mm512_permutexvar_ps((__m512i)b, (__m512)s);
    out[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)b, 4), (__m512)s);
#else
    out[0] = (to_float(b & 15) - s.centre) * s.factor;
    out[1] = (to_float(b >> 4) - s.centre) * s.factor;
#endif
  }
  void read(int64_t o, int64_t k, const Scale& s, vf* out) const { unpack(p + o * stride + k / 2, s, out); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale& s, vf* out) const {
    uint8_t buffer[kLanes] = {};
    std::memcpy(buffer, p + o * stride + k / 2, size_t(n) / 2);
    unpack(buffer, s, out);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k / 2; }
};
using Int4Reader = NibblesReader<false>;
using Int4ZeroReader = NibblesReader<true>;

// Length of a row of x as nibbles want it, and the rearrangement: blocks of 2 * kLanes columns become their even columns,
// then their odd ones; zero padded.
inline int64_t rearranged_columns(int64_t in) { return (in + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }
inline void rearrange(const float* x, int64_t in, float* to) {
  for (int64_t k = 0; k < in; k += 2 * kLanes)
    for (int i = 0; i < kLanes; ++i) {
      to[k + i] = k + 2 * i < in ? x[k + 2 * i] : 0;
      to[k + kLanes + i] = k + 2 * i + 1 < in ? x[k + 2 * i + 1] : 0;
    }
}

}  // namespace COLORA_ISA_NAMESPACE
