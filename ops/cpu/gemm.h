// y = x·Wᵀ as dot products: vector lanes run along `in`, so few rows can be multiplied with W where it lies.
//
// One tile is kOuts rows of W times up to kRows rows of x, all partial sums in registers. The order in which one
// output element is summed depends on `in` and the instruction set only: lane l adds the columns k = l (mod lanes) in
// ascending order inside a block of columns (column_block), the lanes fold as a tree, the blocks add up in ascending
// order. So the result of a row is bit-identical for any number of rows, in decode, prefill and any thread count.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "weights.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int kOuts = 4;  // rows of W in a tile
#if defined(__AVX512F__)
constexpr int kRows = 6;  // rows of x in a tile: 24 sums + 6 + 1 of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 3;  // 12 + 3 + 1 of 16
#else
constexpr int kRows = 2;
#endif

// Columns of one block: x and W parts of a tile stay in the L1 cache. A multiple of every reader's step, and of GGUF's
// blocks of 256 values where a row consists of them.
inline int64_t column_block(int64_t in) {
  const int64_t most = 1024, blocks = std::max<int64_t>(1, (in + most - 1) / most), unit = in % 256 ? 32 : 256;
  return ((in + blocks - 1) / blocks + unit - 1) / unit * unit;
}

// Numbers of an adapter, float32 or bfloat16.
struct Factor {
  const void* data = nullptr;
  bool half = false;
  const float* f32() const { return static_cast<const float*>(data); }
  const bf16* bf() const { return static_cast<const bf16*>(data); }
  Factor from(int64_t element) const {
    return half ? Factor{bf() + element, true} : Factor{f32() + element, false};
  }
};

// The low-rank part of one row: y += v·upᵀ, appended to the dot product as further columns. v is padded with zeros to
// whole vectors (padded_rank).
struct RowAdapter {
  const float* v = nullptr;  // scale * x·downᵀ, or null: no adapter
  Factor up;                 // (out, rank) of the row's slot
};
inline int64_t padded_rank(int64_t rank) { return (rank + kLanes - 1) / kLanes * kLanes; }

// Sums of four vectors, in the order of sum().
inline v4f sum4(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__)
  // halves of 512 bits: [a.low + a.high | b.low + b.high], then the same with 256
  const auto merge8 = [](__m512 p, __m512 q) {
    const __m512 other = _mm512_shuffle_f32x4(p, q, 0x4e);  // p.high, q.low
    return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, p, q), other);
  };
  const __m512 ab = merge8((__m512)a, (__m512)b), cd = merge8((__m512)c, (__m512)d);
  const __m512 even = _mm512_shuffle_f32x4(ab, cd, 0x88), odd = _mm512_shuffle_f32x4(ab, cd, 0xdd);
  const __m512 m = _mm512_add_ps(even, odd);  // four 128-bit parts: a, b, c, d
  __m128 r0 = _mm512_castps512_ps128(m), r1 = _mm512_extractf32x4_ps(m, 1), r2 = _mm512_extractf32x4_ps(m, 2),
         r3 = _mm512_extractf32x4_ps(m, 3);
#elif defined(__AVX2__)
  const auto half = [](vf v) {
    return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  };
  __m128 r0 = half(a), r1 = half(b), r2 = half(c), r3 = half(d);
#endif
#if defined(__AVX2__)
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  return (v4f)_mm_add_ps(_mm_add_ps(r0, r2), _mm_add_ps(r1, r3));
#else
  return v4f{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// acc[i][r] += up[i]·v for one row r; T: float or bf16. The loops are unrolled so that the sums stay in registers.
template <class T, int O, int R>
inline __attribute__((always_inline)) void add_row_adapter(vf (&acc)[O][R], int r, const T* up, int64_t rank,
                                                           const float* v) {
  int64_t j = 0;
  for (; j + kLanes <= rank; j += kLanes) {
    const vf part = load(v + j);
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) acc[i][r] = fma(widen(up + i * rank + j), part, acc[i][r]);
  }
  if (j < rank) {
    const vf part = load(v + j);
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) acc[i][r] = fma(widen_partial(up + i * rank + j, rank - j), part, acc[i][r]);
  }
}

// acc += up[o..o+O)·v of every row that has an adapter.
template <int O, int R>
inline __attribute__((always_inline)) void add_low_rank(vf (&acc)[O][R], int64_t o, int64_t rank,
                                                        const RowAdapter* adapters) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    if (!adapters[r].v) continue;
    const Factor up = adapters[r].up.from(o * rank);
    if (up.half)
      add_row_adapter(acc, r, up.bf(), rank, adapters[r].v);
    else
      add_row_adapter(acc, r, up.f32(), rank, adapters[r].v);
  }
}

// Puts the sums of R rows into output o, after what stands there unless this is the first piece of the columns, and before
// the bias behind the last one.
template <int R>
inline __attribute__((always_inline)) void put_output(const vf (&acc)[R], int64_t o, bool first, bool last,
                                                      const float* bias, float* const* y) {
  for (int r = 0; r < R; ++r) {
    float s = sum(acc[r]);
    if (!first) s = y[r][o] + s;
    if (last && bias) s = s + bias[o];
    y[r][o] = s;
  }
}

// The same of outputs [o, o + kOuts).
template <int R>
inline __attribute__((always_inline)) void put_outputs(const vf (&acc)[kOuts][R], int64_t o, bool first, bool last,
                                                       const float* bias, float* const* y) {
  v4f b = {};
  if (last && bias) std::memcpy(&b, bias + o, sizeof b);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    v4f s = sum4(acc[0][r], acc[1][r], acc[2][r], acc[3][r]);
    if (!first) {
      v4f before;
      std::memcpy(&before, y[r] + o, sizeof before);
      s = before + s;
    }
    if (last && bias) s = s + b;
    std::memcpy(y[r] + o, &s, sizeof s);
  }
}

// Rows of x with their outputs; arrays of `count` pointers.
struct Rows {
  int64_t count = 0;
  const float* const* x = nullptr;
  float* const* y = nullptr;  // y[r] + o is the place of output o
  const RowAdapter* adapters = nullptr;  // null: no adapters at all
  int64_t rank = 0;
};

// Number of tiles for `rows`, and the rows of tile i: as even as possible (8 rows are 4 + 4, not 6 + 2).
inline int64_t row_tiles(int64_t rows) { return (rows + kRows - 1) / kRows; }
inline int64_t row_begin(int64_t rows, int64_t tiles, int64_t i) { return rows * i / tiles; }

// ---- many rows -----------------------------------------------------------------------------------------------------
// x and W are copied into aligned blocks in the order in which a tile reads them: for every kLanes columns the vectors
// of the tile's rows. Missing columns and outputs are zeros. Same sums in the same order as above.

// Columns as a reader hands them out, in vectors.
inline int64_t packed_vectors(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// One row into its place (row i of a tile of n rows).
inline void pack_row(const float* from, int64_t columns, int i, int n, float* tile) {
  int64_t k = 0;
  float* to = tile + i * kLanes;
  for (; k + kLanes <= columns; k += kLanes, to += n * kLanes) store(to, load(from + k));
  if (k < columns) store(to, load_partial(from + k, columns - k));
}

template <int R>
inline __attribute__((always_inline)) void packed_tile(const float* w, const float* x, int64_t vectors, bool first,
                                                       bool last, int64_t o, int64_t outs, int64_t rank,
                                                       const RowAdapter* adapters, const float* bias,
                                                       float* const* y) {
  vf acc[kOuts][R];
#pragma GCC unroll 4
  for (int i = 0; i < kOuts; ++i)
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[i][r] = vf{};
  for (int64_t s = 0; s < vectors; ++s, w += kOuts * kLanes, x += R * kLanes) {
    vf xs[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) xs[r] = load(x + r * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kOuts; ++i) {
      const vf part = load(w + i * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) acc[i][r] = fma(part, xs[r], acc[i][r]);
    }
  }
  if (outs == kOuts) {
    if (last && adapters) add_low_rank<kOuts, R>(acc, o, rank, adapters);
    return put_outputs<R>(acc, o, first, last, bias, y);
  }
  for (int i = 0; i < outs; ++i) {  // the last outputs, one by one
    vf one[1][R];
    for (int r = 0; r < R; ++r) one[0][r] = i == 0 ? acc[0][r] : i == 1 ? acc[1][r] : acc[2][r];
    if (last && adapters) add_low_rank<1, R>(one, o + i, rank, adapters);
    put_output<R>(one[0], o + i, first, last, bias, y);
  }
}

template <int R>
__attribute__((noinline)) inline void packed_strip(const float* w, const float* x, int64_t k0, int64_t k1,
                                                   int64_t vectors, int64_t o0, int64_t o1, const Rows& rows,
                                                   int64_t row, const float* bias) {
  const RowAdapter* adapters = nullptr;
  for (int r = 0; rows.adapters && r < R; ++r)
    if (rows.adapters[row + r].v) adapters = rows.adapters + row;
  for (int64_t o = o0; o < o1; o += kOuts)
    packed_tile<R>(w + ((o - o0) * vectors + k0 * kOuts) * kLanes, x + k0 * R * kLanes, k1 - k0, k0 == 0,
                   k1 == vectors, o, std::min<int64_t>(kOuts, o1 - o), rows.rank, adapters, bias, rows.y + row);
}

// Outputs [o0, o1) of all rows. `w`: their packed rows in tiles of kOuts; `x`: all rows packed in row_tiles(count)
// tiles; both `vectors` long. `block` = column_block(in) / kLanes.
inline void dense_many_rows(const float* w, const float* x, int64_t vectors, int64_t block, const float* bias,
                            const Rows& rows, int64_t o0, int64_t o1) {
  const int64_t tiles = row_tiles(rows.count);
  for (int64_t k = 0; k < vectors; k += block) {
    const int64_t end = std::min(vectors, k + block);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r = row_begin(rows.count, tiles, t), n = row_begin(rows.count, tiles, t + 1) - r;
      const float* packed = x + r * vectors * kLanes;
#define COLORA_STRIP(R) \
  case R: packed_strip<R>(w, packed, k, end, vectors, o0, o1, rows, r, bias); break;
      switch (n) {
        COLORA_STRIP(1)
        COLORA_STRIP(2)
#if defined(__AVX2__)
        COLORA_STRIP(3)
#endif
#if defined(__AVX512F__)
        COLORA_STRIP(4)
        COLORA_STRIP(5)
        COLORA_STRIP(6)
#endif
      }
#undef COLORA_STRIP
    }
  }
}

}  // namespace COLORA_ISA_NAMESPACE
