// C = A·B or C += A·B as outer products: vector lanes run along B's columns, A's elements are broadcast. The form for
// gradients, where the summed dimension is not the contiguous one of both factors.
//
// C (m, n) row-major with row stride ldc; A's element (i, k) at a[i*a_row + k*a_col], so A may be transposed;
// B (k, n) row-major with row stride ldb. Each element of C is summed in ascending k, starting from `from`
// (C itself, another matrix with C's stride, or null for 0), so the result does not depend on how m and n are cut.
#pragma once

#include <algorithm>

#include "simd.h"

namespace COLORA_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kOuterVectors = 4;  // 6 x 4 sums + 4 + 1 of 32 registers
#else
constexpr int kOuterVectors = 2;
#endif
constexpr int kOuterRows = 6;
constexpr int64_t kOuterColumns = kOuterVectors * kLanes;
constexpr int64_t kOuterDepth = 128;  // rows of a packed block of B: with kOuterColumns it stays in the L1 cache

// `partial` > 0: the last vector has that many columns only.
template <int R, int U, bool kPartial>
inline void outer_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                       const float* from, float* c, int64_t ldc, int64_t partial) {
  const auto read = [&](const float* p, int u) {
    return kPartial && u == U - 1 ? load_partial(p + u * kLanes, partial) : load(p + u * kLanes);
  };
  vf acc[R][U];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) acc[r][u] = from ? read(from + r * ldc, u) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf part[U];
    for (int u = 0; u < U; ++u) part[u] = read(b + k * ldb, u);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf one = splat(a[r * a_row + k * a_col]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) acc[r][u] = fma(one, part[u], acc[r][u]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) {
      if (kPartial && u == U - 1)
        store_partial(c + r * ldc + u * kLanes, acc[r][u], partial);
      else
        store(c + r * ldc + u * kLanes, acc[r][u]);
    }
}

template <int R>
inline void outer_rows(int64_t n, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                       int64_t ldb, const float* from, float* c, int64_t ldc) {
  const int vectors = int((n + kLanes - 1) / kLanes);
  const int64_t partial = n % kLanes;
#define COLORA_OUTER(U)                                                                              \
  case U:                                                                                            \
    return partial ? outer_tile<R, U, true>(depth, a, a_row, a_col, b, ldb, from, c, ldc, partial)  \
                   : outer_tile<R, U, false>(depth, a, a_row, a_col, b, ldb, from, c, ldc, 0);
  switch (vectors) {
    COLORA_OUTER(1)
    COLORA_OUTER(2)
#if defined(__AVX512F__)
    COLORA_OUTER(3)
    COLORA_OUTER(4)
#endif
  }
#undef COLORA_OUTER
}

// n <= kOuterColumns, any m and depth.
inline void outer_panel(int64_t m, int64_t n, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                        const float* b, int64_t ldb, const float* from, float* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + kOuterRows <= m; i += kOuterRows)
    outer_rows<kOuterRows>(n, depth, a + i * a_row, a_row, a_col, b, ldb, from ? from + i * ldc : nullptr, c + i * ldc,
                           ldc);
  const float* rest = a + i * a_row;
  const float* start = from ? from + i * ldc : nullptr;
  float* to = c + i * ldc;
  switch (m - i) {
    case 1: return outer_rows<1>(n, depth, rest, a_row, a_col, b, ldb, start, to, ldc);
    case 2: return outer_rows<2>(n, depth, rest, a_row, a_col, b, ldb, start, to, ldc);
    case 3: return outer_rows<3>(n, depth, rest, a_row, a_col, b, ldb, start, to, ldc);
    case 4: return outer_rows<4>(n, depth, rest, a_row, a_col, b, ldb, start, to, ldc);
    case 5: return outer_rows<5>(n, depth, rest, a_row, a_col, b, ldb, start, to, ldc);
  }
}

}  // namespace COLORA_ISA_NAMESPACE
