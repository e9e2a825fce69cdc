// A linear layer's weight in one of four formats, and its rows as float32 vectors.
//
// W is (out, in), row-major:
//   float32 | bfloat16
//   int8   with scale float32 (out,) or (out, groups): w = q * scale
//   uint8  (out, in/2): two 4-bit values a byte, low nibble = even column, stored as value + 8: w = (q - 8) * scale
// A quantised value is always dequantised to float32 with one rounding and then used like a float32 weight, so the
// decode form, the prefill form and the reference form see the same numbers.
//
// A reader below hands out kUnits vectors for the columns [k, k + kStep). Int4 unpacks a byte vector into even and odd
// columns, so its activations are rearranged the same way once per call (Int4Reader::rearrange).
#pragma once

#include <vector>

#include "check.h"
#include "simd.h"

namespace COLORA_ISA_NAMESPACE {

enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };

struct Weight {
  Format format = Format::kFloat32;
  const void* data = nullptr;
  const float* scale = nullptr;  // quantised formats only
  int64_t out = 0, in = 0;
  int64_t groups = 1;            // scales per row
  int64_t group = 0;             // columns per scale
  int64_t bytes() const {
    switch (format) {
      case Format::kFloat32: return out * in * 4;
      case Format::kBfloat16: return out * in * 2;
      case Format::kInt8: return out * in;
      case Format::kInt4: break;
    }
    return out * in / 2;
  }
  const float* f32() const { return static_cast<const float*>(data); }
  const bf16* bf() const { return static_cast<const bf16*>(data); }
  const int8_t* i8() const { return static_cast<const int8_t*>(data); }
  const uint8_t* i4() const { return static_cast<const uint8_t*>(data); }
};

// Reads and checks the pair (weight, weight_scale). `in` < 0: any number of columns.
inline Weight weight_of(const colora::Tensor& weight, const colora::Tensor& scale, int64_t in) {
  weight.expect_rank(2).expect_dtype("float32", "bfloat16", "int8", "uint8");
  Weight w;
  w.data = weight.raw;
  w.out = weight.dim(0);
  w.in = weight.dim(1);
  if (weight.is("uint8")) {
    w.format = Format::kInt4;
    w.in *= 2;
  } else if (weight.is("int8")) {
    w.format = Format::kInt8;
  } else {
    w.format = weight.is("float32") ? Format::kFloat32 : Format::kBfloat16;
  }
  if (in >= 0 && w.in != in)
    weight.fail("has shape %s, which is %lld input columns, expected %lld like the last dimension of 'x'",
                weight.shape_text().c_str(), (long long)w.in, (long long)in);
  w.group = w.in;
  const bool quantised = w.format == Format::kInt8 || w.format == Format::kInt4;
  if (!quantised) {
    if (!scale.absent())
      scale.fail("is given with shape %s, but a %s weight has no scale", scale.shape_text().c_str(), weight.dtype);
    return w;
  }
  if (scale.absent()) scale.fail("is absent, but a %s weight needs float32 scales of shape (%lld,) or (%lld, groups)",
                                 weight.dtype, (long long)w.out, (long long)w.out);
  scale.expect_dtype("float32").expect_rank(1, 2);
  scale.expect_dim(0, w.out, "one row of scales per output");
  w.scale = static_cast<const float*>(scale.raw);
  if (scale.ndim == 2) {
    w.groups = scale.dim(1);
    if (w.groups < 1 || w.in % w.groups)
      scale.fail("has %lld groups, which do not divide the %lld input columns", (long long)w.groups, (long long)w.in);
    w.group = w.in / w.groups;
  }
  return w;
}

// One element, for the formats' odd cases and the packing for the gradient.
inline float element(const Weight& w, int64_t o, int64_t k) {
  switch (w.format) {
    case Format::kFloat32: return w.f32()[o * w.in + k];
    case Format::kBfloat16: return bf16_to_float(w.bf()[o * w.in + k]);
    case Format::kInt8: return float(w.i8()[o * w.in + k]) * w.scale[o * w.groups + k / w.group];
    case Format::kInt4: break;
  }
  const uint8_t byte = w.i4()[(o * w.in + k) / 2];
  return float(int((k & 1) ? byte >> 4 : byte & 15) - 8) * w.scale[o * w.groups + k / w.group];
}

// ---- readers -------------------------------------------------------------------------------------------------------
// Each has: Scale (what one row needs inside one group), scale(o, g), read(o, k, scale, out[kUnits]) and read_tail(...)
// for the last n < kStep columns of a row (missing lanes: any finite value times x = 0).

struct Float32Reader {
  static constexpr int kUnits = 1, kStep = kLanes;
  struct Scale {};
  const float* p;
  int64_t stride;
  explicit Float32Reader(const Weight& w) : p(w.f32()), stride(w.in) {}
  Float32Reader(const float* panel, int64_t row_stride) : p(panel), stride(row_stride) {}
  static int64_t group(const Weight& w) { return w.in; }
  Scale scale(int64_t, int64_t) const { return {}; }
  void read(int64_t o, int64_t k, const Scale&, vf* out) const { out[0] = load(p + o * stride + k); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale&, vf* out) const {
    out[0] = load_partial(p + o * stride + k, n);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k; }
};

struct Bfloat16Reader {
  static constexpr int kUnits = 1, kStep = kLanes;
  struct Scale {};
  const bf16* p;
  int64_t stride;
  explicit Bfloat16Reader(const Weight& w) : p(w.bf()), stride(w.in) {}
  Bfloat16Reader(const bf16* panel, int64_t row_stride) : p(panel), stride(row_stride) {}
  Scale scale(int64_t, int64_t) const { return {}; }
  void read(int64_t o, int64_t k, const Scale&, vf* out) const { out[0] = load_bf16(p + o * stride + k); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale&, vf* out) const {
    out[0] = load_bf16_partial(p + o * stride + k, n);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k; }
};

struct Int8Reader {
  static constexpr int kUnits = 1, kStep = kLanes;
  using Scale = vf;
  const int8_t* p;
  const float* scales;
  int64_t stride, groups;
  explicit Int8Reader(const Weight& w) : p(w.i8()), scales(w.scale), stride(w.in), groups(w.groups) {}
  Scale scale(int64_t o, int64_t g) const { return splat(scales[o * groups + g]); }
  void read(int64_t o, int64_t k, const Scale& s, vf* out) const { out[0] = widen(p + o * stride + k) * s; }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale& s, vf* out) const {
    out[0] = widen_partial(p + o * stride + k, n) * s;
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k; }
};

struct Int4Reader {
  static constexpr int kUnits = 2, kStep = 2 * kLanes;
  using Scale = vf;  // AVX-512: the 16 possible values of the group; elsewhere the scale
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const uint8_t* p;
  const float* scales;
  int64_t stride, groups;
  explicit Int4Reader(const Weight& w) : p(w.i4()), scales(w.scale), stride(w.in / 2), groups(w.groups) {}
  Scale scale(int64_t o, int64_t g) const {
    const vf s = splat(scales[o * groups + g]);
#if defined(__AVX512F__)
    const vf values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return values * s;
#else
    return s;
#endif
  }
  static void unpack(const uint8_t* q, const Scale& s, vf* out) {
#if defined(__AVX512F__)
    // vpermps looks only at the low four bits of an index, so the low nibble needs no mask.
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)q));
    out[0] = (vf)_mm512_permutexvar_ps(b, (__m512)s);
    out[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), (__m512)s);
#else
#if defined(__AVX2__)
    const vi b = (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)q));
#else
    Bytes raw;
    std::memcpy(&raw, q, sizeof raw);
    const vi b = __builtin_convertvector(raw, vi);
#endif
    out[0] = to_float((b & 15) - 8) * s;
    out[1] = to_float((b >> 4) - 8) * s;
#endif
  }
  void read(int64_t o, int64_t k, const Scale& s, vf* out) const { unpack(p + o * stride + k / 2, s, out); }
  void read_tail(int64_t o, int64_t k, int64_t n, const Scale& s, vf* out) const {
    uint8_t buffer[kLanes];
    std::memset(buffer, 0x88, sizeof buffer);  // zeros
    std::memcpy(buffer, p + o * stride + k / 2, size_t(n) / 2);
    unpack(buffer, s, out);
  }
  const void* address(int64_t o, int64_t k) const { return p + o * stride + k / 2; }

  // Length of a rearranged activation row, and the rearrangement: blocks of kStep columns become their even columns,
  // then their odd ones; zero padded.
  static int64_t padded(int64_t in) { return (in + kStep - 1) / kStep * kStep; }
  static void rearrange(const float* x, int64_t in, float* to) {
    for (int64_t k = 0; k < in; k += kStep)
      for (int i = 0; i < kLanes; ++i) {
        to[k + i] = k + 2 * i < in ? x[k + 2 * i] : 0;
        to[k + kLanes + i] = k + 2 * i + 1 < in ? x[k + 2 * i + 1] : 0;
      }
  }
};

// Groups whose border falls inside a reader's step cannot use the vector readers; such weights (odd group sizes) are
// dequantised row by row.
inline bool regular_groups(const Weight& w) {
  const int step = w.format == Format::kInt4 ? Int4Reader::kStep : kLanes;
  return w.scale == nullptr || w.groups == 1 || w.group % step == 0;
}

}  // namespace COLORA_ISA_NAMESPACE
