// y = x·Wᵀ of few rows of x (decode): one pass over W where it lies, in whatever format, by a reader of its values.
// The sums and their order are those of gemm.h.
#pragma once

#include "block_readers.h"
#include "gemm.h"
#include "readers.h"

namespace COLORA_ISA_NAMESPACE {

// acc += the step `step` of the blocks of O weight rows times the same columns of R rows of x, then the steps behind it.
template <class Reader, int step, int O, int R>
inline __attribute__((always_inline)) void add_steps(vf (&acc)[O][R], const uint8_t* const (&blocks)[O],
                                                     const typename Reader::Scale (&scale)[O], const float* const* x,
                                                     int64_t k) {
  if constexpr (step * Reader::kStep < Reader::kValues) {
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) {
      vf part[Reader::kUnits];
      Reader::template read<step>(blocks[i], scale[i], part);
#pragma GCC unroll 16
      for (int u = 0; u < Reader::kUnits; ++u)
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
          acc[i][r] = fma(part[u], load(x[r] + k + step * Reader::kStep + u * kLanes), acc[i][r]);
    }
    add_steps<Reader, step + 1>(acc, blocks, scale, x, k);
  }
}

// acc += the columns [k0, k1), whole blocks, of the weight rows o..o+O times R rows of x.
template <class Reader, int O, int R>
inline __attribute__((always_inline)) void add_blocks(vf (&acc)[O][R], const Reader& w, int64_t o, const float* const* x,
                                                      int64_t k0, int64_t k1, const int64_t* ahead) {
  const uint8_t* blocks[O];
  for (int i = 0; i < O; ++i) blocks[i] = w.block(o + i, k0);
  for (int64_t k = k0; k < k1; k += Reader::kValues) {
    typename Reader::Scale scale[O];
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) {
      Reader::scale(blocks[i], scale[i]);
      for (int line = 0; line < Reader::kBytes; line += 64) prefetch(blocks[i] + ahead[i] + line);
    }
    add_steps<Reader, 0>(acc, blocks, scale, x, k);
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) blocks[i] += Reader::kBytes;
  }
}

// acc += the columns [k0, k1) of the weight rows o..o+O times R rows of x.
template <class Reader, int O, int R>
inline __attribute__((always_inline)) void add_columns(vf (&acc)[O][R], const Reader& w, int64_t o, int64_t group,
                                                       const float* const* x, int64_t k0, int64_t k1,
                                                       const int64_t* ahead) {
  int64_t g = k0 == 0 ? 0 : k0 / group;
  for (int64_t k = k0; k < k1; ++g) {
    const int64_t end = std::min(k1, (g + 1) * group);
    typename Reader::Scale scale[O];
    for (int i = 0; i < O; ++i) scale[i] = w.scale(o + i, g);
    for (; k + Reader::kStep <= end; k += Reader::kStep) {
      vf part[Reader::kUnits];
      if constexpr (Reader::kUnits == 1) {
        vf xs[R];
        for (int r = 0; r < R; ++r) xs[r] = load(x[r] + k);
#pragma GCC unroll 4
        for (int i = 0; i < O; ++i) {
          w.read(o + i, k, scale[i], part);
          prefetch(static_cast<const char*>(w.address(o + i, k)) + ahead[i]);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) acc[i][r] = fma(part[0], xs[r], acc[i][r]);
        }
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < O; ++i) {
          w.read(o + i, k, scale[i], part);
          prefetch(static_cast<const char*>(w.address(o + i, k)) + ahead[i]);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r)
            for (int u = 0; u < Reader::kUnits; ++u)
              acc[i][r] = fma(part[u], load(x[r] + k + u * kLanes), acc[i][r]);
        }
      }
    }
    if (k < end) {  // the last columns of the row
      vf part[Reader::kUnits], xs[R][Reader::kUnits];
      // Rearranged rows (more than one unit) are padded, others are not.
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < Reader::kUnits; ++u)
          xs[r][u] = Reader::kUnits == 1 ? load_partial(x[r] + k, end - k) : load(x[r] + k + u * kLanes);
      for (int i = 0; i < O; ++i) {
        w.read_tail(o + i, k, end - k, scale[i], part);
        for (int r = 0; r < R; ++r)
          for (int u = 0; u < Reader::kUnits; ++u) acc[i][r] = fma(part[u], xs[r][u], acc[i][r]);
      }
      k = end;
    }
  }
}

// One tile over the columns [k0, k1) of x rows x[0..R) and weight rows o..o+O. `first`: y is set, otherwise added to.
// `last`: the low-rank part joins the sums and the bias is added. ahead[i]: how many bytes ahead row o + i is fetched.
template <class Reader, int O, int R>
inline __attribute__((always_inline)) void tile(const Reader& w, int64_t o, int64_t group, const float* const* x,
                                                int64_t k0, int64_t k1, bool first, bool last, int64_t rank,
                                                const RowAdapter* adapters, const float* bias, float* const* y,
                                                const int64_t* ahead) {
  vf acc[O][R];
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i)
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[i][r] = vf{};
  if constexpr (Reader::kBlocked)
    add_blocks(acc, w, o, x, k0, k1, ahead);
  else
    add_columns(acc, w, o, group, x, k0, k1, ahead);
  if (last && adapters) add_low_rank<O, R>(acc, o, rank, adapters);
  if constexpr (O == kOuts)
    put_outputs<R>(acc, o, first, last, bias, y);
  else
    for (int i = 0; i < O; ++i) put_output<R>(acc[i], o + i, first, last, bias, y);
}

template <class Reader, int O>
inline void tile_rows(int rows, const Reader& w, int64_t o, int64_t group, const float* const* x, int64_t k0,
                      int64_t k1, bool first, bool last, int64_t rank, const RowAdapter* adapters, const float* bias,
                      float* const* y, const int64_t* ahead) {
#define COLORA_TILE(R) \
  case R: return tile<Reader, O, R>(w, o, group, x, k0, k1, first, last, rank, adapters, bias, y, ahead);
  switch (rows) {
    COLORA_TILE(1)
    COLORA_TILE(2)
#if defined(__AVX2__)
    COLORA_TILE(3)
#endif
#if defined(__AVX512F__)
    COLORA_TILE(4)
    COLORA_TILE(5)
    COLORA_TILE(6)
#endif
  }
#undef COLORA_TILE
}

// Outputs [o0, o1) of all rows, one pass over W; for few rows (decode). `block` = column_block(in).
template <class Reader>
inline void dense_few_rows(const Reader& w, int64_t columns, int64_t block, int64_t group, const float* bias,
                           const Rows& rows, int64_t o0, int64_t o1) {
  const int64_t tiles = row_tiles(rows.count);
  // The tile after this one, or further where rows are short: far enough to hide the latency of memory.
  const int64_t ahead = std::max<int64_t>(
      8192, static_cast<const char*>(w.address(kOuts, 0)) - static_cast<const char*>(w.address(0, 0)));
  int64_t o = o0;
  const auto run = [&](auto outs) {
    constexpr int O = decltype(outs)::value;
    for (; o + O <= o1; o += O)
      for (int64_t k = 0; k < columns; k += block) {
        const int64_t end = std::min(columns, k + block);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t r = row_begin(rows.count, tiles, t), n = row_begin(rows.count, tiles, t + 1) - r;
          const RowAdapter* adapters = rows.adapters ? rows.adapters + r : nullptr;
          // The tiles of a strip share the fetching of the next one, so that the memory is busy all the time; a distance
          // of 0 costs nothing.
          int64_t distance[O];
          for (int i = 0; i < O; ++i) distance[i] = i * tiles / O == t ? ahead : 0;
          tile_rows<Reader, O>(int(n), w, o, group, rows.x + r, k, end, k == 0, end == columns, rows.rank, adapters,
                               bias, rows.y + r, distance);
        }
      }
  };
  run(std::integral_constant<int, kOuts>());
  run(std::integral_constant<int, 1>());
}

}  // namespace COLORA_ISA_NAMESPACE
