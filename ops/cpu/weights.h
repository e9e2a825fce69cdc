// A linear layer's weight in one of the formats below, which are those of models/formats.py in the same order.
//
// W is (out, in), row-major:
//   float32 | bfloat16 | float16
//   int8   with scale float32 (out,) or (out, groups): w = q * scale
//   uint8  (out, in/2): two 4-bit values a byte, low nibble = even column, stored as value + 8: w = (q - 8) * scale
//   int8_zero, int4_zero: the same with (scale, zero point) float32 (out, groups, 2): w = (q - zero) * scale, where the
//          four bits are stored as they are
//          (their ordered forms in operands.h are these, with the order in which the columns meet x)
//   q4_0 ... q6_k: rows of the blocks of GGUF files as bytes, scales among them (block_readers.h)
// A quantised value is always dequantised to float32 with one rounding and then used like a float32 weight, so the
// decode form, the prefill form and the reference form see the same numbers.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "small_numbers.h"
#include "simd.h"

namespace COLORA_ISA_NAMESPACE {

enum class Format {
  kFloat32, kBfloat16, kInt8, kInt4, kFloat16, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kInt4_Zero,
  kInt8_Zero
};

// How a format's rows lie: so many values are so many elements of a dtype; numbers of a group of the scale tensor, if any.
struct Layout {
  const char* name;
  const char* dtype;
  int values, elements, element_bytes, scale_numbers;
  bool blocks;  // of a GGUF file
};

inline const Layout& layout_of(Format format) {
  static constexpr Layout kLayouts[] = {
      {"float32", "float32", 1, 1, 4, 0, false}, {"bfloat16", "bfloat16", 1, 1, 2, 0, false},
      {"int8", "int8", 1, 1, 1, 1, false},       {"int4", "uint8", 2, 1, 1, 1, false},
      {"float16", "float16", 1, 1, 2, 0, false}, {"q4_0", "uint8", 32, 18, 1, 0, true},
      {"q4_1", "uint8", 32, 20, 1, 0, true},     {"q5_0", "uint8", 32, 22, 1, 0, true},
      {"q5_1", "uint8", 32, 24, 1, 0, true},     {"q8_0", "uint8", 32, 34, 1, 0, true},
      {"q4_k", "uint8", 256, 144, 1, 0, true},   {"q5_k", "uint8", 256, 176, 1, 0, true},
      {"q6_k", "uint8", 256, 210, 1, 0, true},   {"int4_zero", "uint8", 2, 1, 1, 2, false},
      {"int8_zero", "int8", 1, 1, 1, 2, false}};
  return kLayouts[int(format)];
}

struct Weight {
  Format format = Format::kFloat32;
  const void* data = nullptr;
  const float* scale = nullptr;  // of formats with a scale tensor only
  int64_t out = 0, in = 0;
  int64_t groups = 1;            // scales per row
  int64_t group = 0;             // columns per scale
  const Layout& layout() const { return layout_of(format); }
  int64_t row_bytes() const { return in / layout().values * layout().elements * layout().element_bytes; }
  int64_t bytes() const { return out * row_bytes(); }
  // Whether its values must be computed, so that several rows of x pay for doing it once.
  bool packed() const { return scale != nullptr || layout().blocks; }
  // Two columns a byte: the readers hand out even and odd ones apart.
  bool nibble_pairs() const { return layout().values == 2; }
  const float* f32() const { return static_cast<const float*>(data); }
  const bf16* bf() const { return static_cast<const bf16*>(data); }
  const f16* half() const { return static_cast<const f16*>(data); }
  const int8_t* i8() const { return static_cast<const int8_t*>(data); }
  const uint8_t* i4() const { return static_cast<const uint8_t*>(data); }
  const uint8_t* row(int64_t o) const { return static_cast<const uint8_t*>(data) + o * row_bytes(); }
};

// Reads and checks the pair (weight, weight_scale). `in` < 0: any number of columns.
inline Weight weight_of(const colora::Tensor& weight, const colora::Tensor& scale, int64_t in, Format format) {
  const Layout& layout = layout_of(format);
  weight.expect_rank(2);
  if (!scale.absent() && (weight.is("float32") || weight.is("bfloat16") || weight.is("float16")))
    scale.fail("is given with shape %s, but a %s weight has no scale", scale.shape_text().c_str(), weight.dtype);
  if (!weight.is(layout.dtype))
    weight.fail("has dtype %s, but its tag says that it is %s, which is %s", weight.dtype, layout.name, layout.dtype);
  Weight w;
  w.format = format;
  w.data = weight.raw;
  w.out = weight.dim(0);
  if (weight.dim(1) % layout.elements)
    weight.fail("has rows of %lld bytes, expected a multiple of %d, the bytes of a block of %d values of %s",
                (long long)weight.dim(1), layout.elements, layout.values, layout.name);
  w.in = weight.dim(1) / layout.elements * layout.values;
  if (in >= 0 && w.in != in)
    weight.fail("has shape %s, which is %lld input columns of %s, expected %lld like the last dimension of 'x'",
                weight.shape_text().c_str(), (long long)w.in, layout.name, (long long)in);
  w.group = w.in;
  if (!layout.scale_numbers) return w;
  const bool zeros = layout.scale_numbers == 2;
  if (scale.absent())
    scale.fail("is absent, but a %s weight needs float32 scales of shape (%lld, %s", layout.name, (long long)w.out,
               zeros ? "groups, 2)" : ") or with groups behind");
  scale.expect_dtype("float32");
  if (zeros) scale.expect_rank(3).expect_dim(2, 2, "scale and zero point");
  else scale.expect_rank(1, 2);
  scale.expect_dim(0, w.out, "one row of scales per output");
  w.scale = static_cast<const float*>(scale.raw);
  if (scale.ndim >= 2) {
    w.groups = scale.dim(1);
    if (w.groups < 1 || w.in % w.groups)
      scale.fail("has %lld groups, which do not divide the %lld input columns", (long long)w.groups, (long long)w.in);
    w.group = w.in / w.groups;
  }
  return w;
}

// The columns [k0, k1) of row o of a format with a scale tensor, float32, whatever its groups.
inline void read_scaled(const Weight& w, int64_t o, int64_t k0, int64_t k1, float* to) {
  const bool zeros = w.layout().scale_numbers == 2, nibbles = w.nibble_pairs();
  for (int64_t k = k0; k < k1;) {
    const int64_t g = k / w.group, end = std::min(k1, (g + 1) * w.group);
    const float* scale = w.scale + (o * w.groups + g) * (zeros ? 2 : 1);
    const float factor = scale[0], centre = zeros ? scale[1] : nibbles ? 8.0f : 0.0f;
    if (!nibbles) {
      for (const int8_t* from = w.i8() + o * w.in; k < end; ++k) to[k - k0] = (float(from[k]) - centre) * factor;
      continue;
    }
    const uint8_t* from = w.i4() + o * w.in / 2;
    const auto low = [&](int64_t pair) { return (float(int(from[pair] & 15)) - centre) * factor; };
    const auto high = [&](int64_t pair) { return (float(int(from[pair] >> 4)) - centre) * factor; };
    if (k & 1) to[k - k0] = high(k / 2), ++k;
    float* pairs = to + k - k0;
    const int64_t first = k / 2, count = std::max<int64_t>(0, end - k) / 2;
    for (int64_t i = 0; i < count; ++i) pairs[2 * i] = low(first + i), pairs[2 * i + 1] = high(first + i);
    k += 2 * count;
    if (k < end) to[k - k0] = low(k / 2), ++k;
  }
}

// Groups whose border falls inside a step of the readers of nibbles or bytes cannot use them; such weights (odd group
// sizes) are dequantised row by row.
inline bool regular_groups(const Weight& w) {
  return w.scale == nullptr || w.groups == 1 || w.group % (w.nibble_pairs() ? 2 * kLanes : kLanes) == 0;
}

}  // namespace COLORA_ISA_NAMESPACE
