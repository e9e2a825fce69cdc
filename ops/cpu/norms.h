// The norms of a layer and what goes with them: the sum before a block, a branch before it is added.
#pragma once

#include "form.h"
#include "norm.h"

namespace COLORA_ISA_NAMESPACE {

// y = (x - mean) / sqrt(variance + eps) * weight of one row.
inline void layer_norm_row(const float* x, const float* weight, float* y, int64_t n, float eps) {
  vf total{};
  for (int64_t i = 0; i < n; i += kLanes) total = total + load_upto(x + i, n - i);
  const float mean = sum(total) / float(n);
  vf squares{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf apart = load_upto(x + i, n - i) - splat(mean);
    float lanes[kLanes];
    if (n - i < kLanes) {  // the lanes behind the row are 0 - mean
      store(lanes, apart);
      std::fill(lanes + (n - i), lanes + kLanes, 0.0f);
      squares = fma(load(lanes), load(lanes), squares);
    } else {
      squares = fma(apart, apart, squares);
    }
  }
  const vf scale = splat(1.0f / std::sqrt(sum(squares) / float(n) + eps));
  for (int64_t i = 0; i < n; i += kLanes)
    store_upto(y + i, (load_upto(x + i, n - i) - splat(mean)) * scale * load_upto(weight + i, n - i), n - i);
}

struct Norm {
  NormKind kind = NormKind::rms;
  const float* weight = nullptr;  // null: there is none
  float eps = 0;
  std::vector<float> buffer;  // of a bfloat16 weight, or of 1 + weight

  bool there() const { return weight != nullptr; }
  void row(const float* x, float* y, int64_t n) const {
    if (kind == NormKind::layer)
      layer_norm_row(x, weight, y, n, eps);
    else
      norm_row(x, weight, y, n, eps);
  }
};

// A norm of n columns from its weight and its eps.
inline void read_norm(const colora::Tensor& weight, const colora::Tensor& eps, int64_t n, NormKind kind, Norm& norm) {
  if (weight.absent()) weight.fail("is absent");
  weight.expect_dtype("float32", "bfloat16").expect_rank(1).expect_dim(0, n, "the normed axis");
  norm.kind = kind, norm.eps = read_eps(eps);
  norm.weight = widened(weight, norm.buffer);
  if (kind != NormKind::rms_plus_one) return;
  std::vector<float> raised(norm.weight, norm.weight + n);
  for (float& one : raised) one += 1.0f;
  norm.buffer = std::move(raised);
  norm.weight = norm.buffer.data();
}

// sum = x + residual. Returns what the block behind it reads: the norm of sum, in h, or sum where there is no norm.
inline const float* enter(const Norm& norm, const float* x, const float* residual, int64_t rows, int64_t n, float* sum,
                          float* h) {
  if (norm.there() && norm.kind != NormKind::layer) {
    add_norm_rows(x, residual, norm.weight, norm.eps, rows, n, sum, h, nullptr);
    return h;
  }
  parallel_ranges(rows, 1, kNormGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* t = sum + r * n;
      add_row(x + r * n, residual + r * n, t, n);
      if (norm.there()) norm.row(t, h + r * n, n);
    }
  });
  return norm.there() ? h : sum;
}

inline void scale_row(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_upto(x + i, load_upto(x + i, n - i) * splat(factor), n - i);
}

inline void scale_rows(float* x, float factor, int64_t rows, int64_t n) {
  if (factor == 1.0f) return;
  parallel_ranges(rows, 1, kNormGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) scale_row(x + r * n, factor, n);
  });
}

// What a branch is before it is added: its norm if there is one, times a factor; in place.
inline void leave(const Norm& norm, float factor, int64_t rows, int64_t n, float* x) {
  if (!norm.there() && factor == 1.0f) return;
  parallel_ranges(rows, 1, kNormGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (norm.there()) norm.row(x + r * n, x + r * n, n);
      if (factor != 1.0f) scale_row(x + r * n, factor, n);
    }
  });
}

// Norm of each of `rows` pieces of n numbers, in place.
inline void norm_pieces(const Norm& norm, int64_t rows, int64_t n, float* x) {
  if (norm.there()) leave(norm, 1.0f, rows, n, x);
}

// c * tanh(x / c) of n numbers, in place.
inline void cap_range(float* x, int64_t n, float cap) {
  for (int64_t i = 0; i < n; i += kLanes) store_upto(x + i, capped(load_upto(x + i, n - i), cap), n - i);
}

}  // namespace COLORA_ISA_NAMESPACE
