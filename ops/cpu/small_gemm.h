// A float32 matrix product for operands that fit into the caches; the callers do the outer blocking.
//
//   C (M, N) = A (M, K) . B (K, N)   or   C += A . B
//
// A has any two strides (so that its transpose needs no copy), B and C have contiguous rows. Every element of C is
// one chain of fused multiply-adds over k in ascending order: it depends neither on M and N nor on its place.
#pragma once

#include <type_traits>

#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int kGemmRows = kLanes == 16 ? 8 : 6;  // rows x 2 vectors of accumulators stay in registers

template <int kRows, int kVectors>
inline void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                      float* c, int64_t c_row, int64_t columns, bool accumulate) {
  // `columns` counts those of the last vector that exist, 1..kLanes.
  vf sums[kRows][kVectors];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) {
      const float* place = c + m * c_row + v * kLanes;
      sums[m][v] = !accumulate ? vf{} : v + 1 < kVectors ? load(place) : load_upto(place, columns);
    }
  const auto steps = [&](auto last) {
    for (int64_t k = 0; k < depth; ++k) {
      vf row[kVectors];
      for (int v = 0; v + 1 < kVectors; ++v) row[v] = load(b + k * b_row + v * kLanes);
      row[kVectors - 1] = last(b + k * b_row + (kVectors - 1) * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const vf value = splat(a[m * a_row + k * a_k]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[m][v] = fma(value, row[v], sums[m][v]);
      }
    }
  };
  if (columns == kLanes) steps([](const float* p) { return load(p); });
  else steps([&](const float* p) { return load_partial(p, columns); });
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v)
      store_upto(c + m * c_row + v * kLanes, sums[m][v], v + 1 < kVectors ? kLanes : columns);
}

template <int kVectors>
inline void gemm_panel(int64_t M, int64_t depth, const float* a, int64_t a_row, int64_t a_k, const float* b,
                       int64_t b_row, float* c, int64_t c_row, int64_t columns, bool accumulate) {
  int64_t m = 0;
  for (; m + kGemmRows <= M; m += kGemmRows)
    gemm_tile<kGemmRows, kVectors>(depth, a + m * a_row, a_row, a_k, b, b_row, c + m * c_row, c_row, columns,
                                   accumulate);
  const auto rest = [&](auto rows) {
    gemm_tile<decltype(rows)::value, kVectors>(depth, a + m * a_row, a_row, a_k, b, b_row, c + m * c_row, c_row,
                                               columns, accumulate);
    m += decltype(rows)::value;
  };
  if (M - m >= 4) rest(std::integral_constant<int, 4>{});
  if (M - m >= 2) rest(std::integral_constant<int, 2>{});
  if (M - m >= 1) rest(std::integral_constant<int, 1>{});
}

inline void small_gemm(int64_t M, int64_t N, int64_t depth, const float* a, int64_t a_row, int64_t a_k, const float* b,
                       int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  int64_t n = 0;
  for (; n + kLanes < N; n += 2 * kLanes)
    gemm_panel<2>(M, depth, a, a_row, a_k, b + n, b_row, c + n, c_row, N - n - kLanes < kLanes ? N - n - kLanes : kLanes,
                  accumulate);
  if (n < N) gemm_panel<1>(M, depth, a, a_row, a_k, b + n, b_row, c + n, c_row, N - n, accumulate);
}

// out (columns, rows) = the transpose of in (rows, columns), row strides in_row and out_row.
template <class T>
inline void transpose(const T* in, int64_t rows, int64_t columns, int64_t in_row, float* out, int64_t out_row) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock)
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock)
      for (int64_t c = c0; c < columns && c < c0 + kBlock; ++c)
        for (int64_t r = r0; r < rows && r < r0 + kBlock; ++r) {
          if constexpr (sizeof(T) == 2) out[c * out_row + r] = bf16_to_float(in[r * in_row + c]);
          else out[c * out_row + r] = in[r * in_row + c];
        }
}

}  // namespace COLORA_ISA_NAMESPACE
