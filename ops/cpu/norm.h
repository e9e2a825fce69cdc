// Rows of the root-mean-square norm (arXiv 1910.07467), for the operators of norm.cpp and the fused decoder layers.
#pragma once

#include <cmath>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int64_t kNormGrain = 1 << 15;  // elements a thread should get at least; starting one costs about 2 us

inline float read_eps(const colora::Tensor& eps) {
  eps.expect_dtype("float32").expect_rank(0, 1);
  if (eps.size() != 1) eps.fail("has shape %s, expected one element", eps.shape_text().c_str());
  const float value = *eps.data<float>();
  if (!(value >= 0.0f) || !std::isfinite(value)) eps.fail("is %g, expected a finite number >= 0", double(value));
  return value;
}

// weight as float32: itself, or a widened copy in `buffer`.
inline const float* widened(const colora::Tensor& weight, std::vector<float>& buffer) {
  if (weight.is("float32")) return weight.data<float>();
  buffer.resize(size_t(weight.size()));
  for (int64_t i = 0; i < weight.size(); ++i) buffer[size_t(i)] = bf16_to_float(weight.data<bf16>()[i]);
  return buffer.data();
}

inline float norm_row(const float* x, const float* weight, float* y, int64_t n, float eps) {
  const float inverse = 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps);
  const vf scale = splat(inverse);
  for (int64_t i = 0; i < n; i += kLanes)
    store_upto(y + i, load_upto(x + i, n - i) * scale * load_upto(weight + i, n - i), n - i);
  return inverse;
}

// total = a + b, rows of n.
inline void add_row(const float* a, const float* b, float* total, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_upto(total + i, load_upto(a + i, n - i) + load_upto(b + i, n - i), n - i);
}

// total = x + residual and y = norm(total) of `rows` rows of n; inverse (rows,) may be null.
inline void add_norm_rows(const float* x, const float* residual, const float* weight, float eps, int64_t rows, int64_t n,
                          float* total, float* y, float* inverse) {
  parallel_ranges(rows, 1, kNormGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* t = total + r * n;
      add_row(x + r * n, residual + r * n, t, n);
      const float value = norm_row(t, weight, y + r * n, n, eps);
      if (inverse) inverse[r] = value;
    }
  });
}

}  // namespace COLORA_ISA_NAMESPACE
