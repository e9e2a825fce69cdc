// Parts that the attention operators share: rotary embedding and the blocked softmax attention of one key/value head.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "small_gemm.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int64_t kQueryBlock = 64;  // query rows (tokens x heads of a group) of one block, about
constexpr int64_t kKeyBlock = 64;    // positions of one block

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// y = scale * (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of x. `Out` is float or bf16.
template <class Out>
inline void rotate_head(const float* x, const float* cos, const float* sin, int64_t half, float scale, Out* y) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const vf a = load_upto(x + i, n), b = load_upto(x + half + i, n), c = load_upto(cos + i, n),
             s = load_upto(sin + i, n);
    store_upto(y + i, (a * c - b * s) * splat(scale), n);
    store_upto(y + half + i, (b * c + a * s) * splat(scale), n);
  }
}

// The transpose of that rotation: what a gradient needs.
inline void rotate_head_back(const float* x, const float* cos, const float* sin, int64_t half, float scale, float* y) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const vf a = load_upto(x + i, n), b = load_upto(x + half + i, n), c = load_upto(cos + i, n),
             s = load_upto(sin + i, n);
    store_upto(y + i, (a * c + b * s) * splat(scale), n);
    store_upto(y + half + i, (b * c - a * s) * splat(scale), n);
  }
}

// Scratch of one thread for attend_block.
struct BlockScratch {
  std::vector<float> queries, out, scores, keys, values, top, mass;
  BlockScratch(int64_t query_rows, int64_t dim)
      : queries(size_t(query_rows * dim)), out(size_t(query_rows * dim)), scores(size_t(query_rows * kKeyBlock)),
        keys(size_t(dim * kKeyBlock)), values(size_t(dim * kKeyBlock)), top(size_t(query_rows)),
        mass(size_t(query_rows)) {}
};

// Softmax attention of a block of query rows over the positions 0.., blocked over the positions with a running maximum
// (FlashAttention-2, arXiv 2307.08691, algorithm 1).
//
// Query row m (scratch.queries, rotated and scaled) belongs to token m / group and sees the positions
// 0 .. first + m / group. K and V: float or bf16, position p at k + p * k_row. Result: scratch.out (rows, dim), divided
// by the mass, and scratch.top + log(scratch.mass) is the log-sum-exp.
template <class T>
inline void attend_block(BlockScratch& scratch, int64_t rows, int64_t group, int64_t first, int64_t dim, const T* k,
                         int64_t k_row, const T* v, int64_t v_row) {
  float *scores = scratch.scores.data(), *out = scratch.out.data();
  std::fill_n(out, rows * dim, 0.0f);
  std::fill_n(scratch.top.data(), rows, -std::numeric_limits<float>::infinity());
  std::fill_n(scratch.mass.data(), rows, 0.0f);
  const int64_t positions = first + (rows - 1) / group + 1;
  for (int64_t p0 = 0; p0 < positions; p0 += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, positions - p0);
    transpose(k + p0 * k_row, count, dim, k_row, scratch.keys.data(), kKeyBlock);
    // Query rows whose last position lies before this block have nothing to do here.
    const int64_t skip = p0 > first ? std::min(rows, (p0 - first) * group) : 0;
    small_gemm(rows - skip, count, dim, scratch.queries.data() + skip * dim, dim, 1, scratch.keys.data(), kKeyBlock,
               scores + skip * kKeyBlock, kKeyBlock, false);
    for (int64_t m = skip; m < rows; ++m) {
      float* s = scores + m * kKeyBlock;
      const int64_t seen = std::min(count, first + m / group + 1 - p0);
      vf top = splat(scratch.top[size_t(m)]);
      int64_t i = 0;
      for (; i + kLanes <= seen; i += kLanes) top = max(load(s + i), top);
      float highest = max_of(top);
      for (; i < seen; ++i) highest = s[i] > highest ? s[i] : highest;
      const float keep = exp_one(scratch.top[size_t(m)] - highest);  // 0 in the first block
      vf mass{};
      for (i = 0; i < count; i += kLanes) {
        const int64_t left = seen - i;
        vf p{};
        if (left > 0) p = exp(load_upto(s + i, left) - splat(highest));
        if (left > 0 && left < kLanes) {  // the lanes behind `seen` came from zeros, not from scores
          store(s + i, p);
          std::fill(s + i + left, s + i + kLanes, 0.0f);
          p = load(s + i);
        }
        mass = mass + p;
        store(s + i, p);
      }
      scratch.mass[size_t(m)] = scratch.mass[size_t(m)] * keep + sum(mass);
      scratch.top[size_t(m)] = highest;
      if (keep != 1.0f)
        for (int64_t d = 0; d < dim; d += kLanes)
          store_upto(out + m * dim + d, load_upto(out + m * dim + d, dim - d) * splat(keep), dim - d);
    }
    const float* values;
    int64_t values_row = dim;
    if constexpr (sizeof(T) == 2) {
      for (int64_t p = 0; p < count; ++p)
        for (int64_t d = 0; d < dim; d += kLanes)
          store_upto(scratch.values.data() + p * dim + d, load_upto(v + (p0 + p) * v_row + d, dim - d), dim - d);
      values = scratch.values.data();
    } else {
      values = v + p0 * v_row;
      values_row = v_row;
    }
    small_gemm(rows - skip, dim, count, scores + skip * kKeyBlock, kKeyBlock, 1, values, values_row, out + skip * dim,
               dim, true);
  }
  for (int64_t m = 0; m < rows; ++m) {
    const vf scale = splat(1.0f / scratch.mass[size_t(m)]);
    for (int64_t d = 0; d < dim; d += kLanes)
      store_upto(out + m * dim + d, load_upto(out + m * dim + d, dim - d) * scale, dim - d);
  }
}

}  // namespace COLORA_ISA_NAMESPACE
