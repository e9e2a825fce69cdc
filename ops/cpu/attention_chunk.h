// One order of addition for attention over the paged cache, whatever the number of queries in a call.
//
// A score is one chain of fused multiply-adds over ascending dimensions. Positions are taken in chunks with absolute
// borders, each with its own maximum; within one a mass is summed lane by lane and an output is one chain over ascending
// positions. Chunks are merged in ascending order. So a query's result is the same to the last bit when it comes alone,
// among others, or in another cut of the prompt.
//
// A block holds kBlock positions of one key/value head: keys as (dim, kBlock), so that a vector holds the same dimension
// of neighbouring positions, values as (kBlock, dim). int8 blocks end with kBlock float scales, one a position.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "small_gemm.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int64_t kBlock = 16;   // positions of a block
constexpr int64_t kChunk = 256;  // positions with one maximum
constexpr int64_t kChunkBlocks = kChunk / kBlock;
constexpr int64_t kBlockVectors = kBlock / kLanes;
constexpr int kGroupPart = 4;                 // query heads handled together; larger groups go in parts
constexpr int kStrip = kLanes == 16 ? 4 : 2;  // value vectors held in registers per query head
static_assert(kBlock % kLanes == 0 && kChunk % kBlock == 0, "a block is whole vectors, a chunk whole blocks");

// Elements of a block of one head.
template <class T>
constexpr int64_t block_size(int64_t dim) {
  return kBlock * dim + (sizeof(T) == 1 ? kBlock * int64_t(sizeof(float)) : 0);
}

// The scales behind the numbers of an int8 block.
inline float* scales_of(int8_t* block, int64_t dim) { return reinterpret_cast<float*>(block + kBlock * dim); }
inline const float* scales_of(const int8_t* block, int64_t dim) {
  return reinterpret_cast<const float*>(block + kBlock * dim);
}

// Position `at` of a value block as a factor of its numbers; 1 where there are no scales.
template <class T>
inline vf value_scale(const T* block, int64_t dim, int64_t at) {
  if constexpr (sizeof(T) == 1) return splat(scales_of(block, dim)[at]);
  else return splat(1.0f);
}

// kLanes neighbouring keys of dimension d.
template <class T>
inline vf keys_at(const T* block, int64_t dim, int64_t d, int64_t v) {
  const vf numbers = widen(block + d * kBlock + v * kLanes);
  if constexpr (sizeof(T) == 1) return numbers * load(scales_of(block, dim) + v * kLanes);
  else return numbers;
}

// Scores of kHeads queries (dim, rotated and scaled) against kTogether blocks.
template <int kHeads, int kTogether, class T>
inline void score_blocks(const float* queries, int64_t query_row, const T* const* blocks, int64_t dim, float* scores,
                         int64_t score_row) {
  vf sums[kHeads][kTogether][kBlockVectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
    vf key[kTogether][kBlockVectors];
#pragma GCC unroll 8
    for (int b = 0; b < kTogether; ++b)
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) key[b][v] = keys_at(blocks[b], dim, d, v);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const vf query = splat(queries[h * query_row + d]);
#pragma GCC unroll 8
      for (int b = 0; b < kTogether; ++b)
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVectors; ++v) sums[h][b][v] = fma(query, key[b][v], sums[h][b][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int b = 0; b < kTogether; ++b)
      for (int v = 0; v < kBlockVectors; ++v)
        store(scores + h * score_row + b * kBlock + v * kLanes, sums[h][b][v]);
}

// Scores of kHeads queries against the first `count` positions of a chunk; those up to the next whole block mean nothing.
template <int kHeads, class T>
inline void score_chunk(const float* queries, int64_t query_row, const T* const* blocks, int64_t dim, int64_t count,
                        float* scores, int64_t score_row) {
  // As many sums in flight as hide the latency of a multiply-add and fit into the registers.
  constexpr int kSums = kLanes == 16 ? 16 : 8, kWide = kSums / (kHeads * int(kBlockVectors));
  constexpr int kTogether = kWide >= 4 ? 4 : kWide >= 2 ? 2 : 1;
  const int64_t all = (count + kBlock - 1) / kBlock;
  int64_t b = 0;
  for (; b + kTogether <= all; b += kTogether)
    score_blocks<kHeads, kTogether>(queries, query_row, blocks + b, dim, scores + b * kBlock, score_row);
  for (; b < all; ++b) score_blocks<kHeads, 1>(queries, query_row, blocks + b, dim, scores + b * kBlock, score_row);
}

// Scores -> weights exp(score - top) of the positions from .. count - 1; zeros before them and up to the next whole block.
// cap: 0, or c of c * tanh(score / c).
inline void weigh(float* scores, int64_t from, int64_t count, float cap, float& top, float& mass) {
  const int64_t end = (count + kBlock - 1) / kBlock * kBlock;
  if (cap > 0.0f)
    for (int64_t p = from / kLanes * kLanes; p < end; p += kLanes) store(scores + p, capped(load(scores + p), cap));
  for (int64_t p = 0; p < from; ++p) scores[p] = -std::numeric_limits<float>::infinity();
  for (int64_t p = count; p < end; ++p) scores[p] = -std::numeric_limits<float>::infinity();
  vf highest = splat(-std::numeric_limits<float>::infinity()), total{};
  for (int64_t p = 0; p < end; p += kLanes) highest = max(load(scores + p), highest);
  top = max_of(highest);
  for (int64_t p = 0; p < end; p += kLanes) {
    const vf weight = exp(load(scores + p) - splat(top));
    total = total + weight;
    store(scores + p, weight);
  }
  mass = sum(total);
}

// out (kHeads, dim) = or += sum over the chunk's positions first .. count - 1 of weight * value.
template <int kHeads, class T>
inline void weighted_values(const float* weights, int64_t weight_row, const T* const* blocks, int64_t first,
                            int64_t count, int64_t dim, float* out, int64_t out_row, bool accumulate) {
  const auto strip = [&](auto vectors, int64_t d, int64_t columns) {
    constexpr int kVectors = decltype(vectors)::value;
    vf sums[kHeads][kVectors] = {};
    if (accumulate)
      for (int h = 0; h < kHeads; ++h)
        for (int i = 0; i < kVectors; ++i)
          sums[h][i] = load_upto(out + h * out_row + d + i * kLanes, columns - i * kLanes);
    for (int64_t p = first; p < count;) {
      const T* block = blocks[p / kBlock];
      for (const int64_t end = std::min(count, (p / kBlock + 1) * kBlock); p < end; ++p) {
        const T* row = block + p % kBlock * dim + d;
        [[maybe_unused]] const vf scale = value_scale(block, dim, p % kBlock);
        vf value[kVectors];
        for (int i = 0; i < kVectors; ++i) {
          value[i] = load_upto(row + i * kLanes, columns - i * kLanes);
          if constexpr (sizeof(T) == 1) value[i] = value[i] * scale;
        }
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) {
          const vf weight = splat(weights[h * weight_row + p]);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) sums[h][i] = fma(weight, value[i], sums[h][i]);
        }
      }
    }
    for (int h = 0; h < kHeads; ++h)
      for (int i = 0; i < kVectors; ++i)
        store_upto(out + h * out_row + d + i * kLanes, sums[h][i], columns - i * kLanes);
  };
  int64_t d = 0;
  for (; d + kStrip * kLanes <= dim; d += kStrip * kLanes)
    strip(std::integral_constant<int, kStrip>{}, d, kStrip * kLanes);
  for (; d < dim; d += kLanes) strip(std::integral_constant<int, 1>{}, d, std::min<int64_t>(kLanes, dim - d));
}

// Calls work(std::integral_constant heads, first head) for `heads` query heads, kGroupPart of them together.
template <class Work>
inline void by_heads(int64_t heads, const Work& work) {
  for (int64_t h = 0; h < heads;) {
    const auto run = [&](auto together) {
      work(together, h);
      h += decltype(together)::value;
    };
    switch (std::min<int64_t>(heads - h, kGroupPart)) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      default: run(std::integral_constant<int, 4>{});
    }
  }
}

// What a query has of the chunks so far: the sum (dim) of weights times values relative to the maximum `top`, and their
// mass. The next chunk's part is merged into it; the first one begins.
inline void merge_chunk(const float* part, float part_top, float part_mass, bool begins, int64_t dim, float* out,
                        float& top, float& mass) {
  if (begins) {
    if (part != out) std::memcpy(out, part, size_t(dim) * sizeof(float));
    top = part_top, mass = part_mass;
    return;
  }
  const float highest = part_top > top ? part_top : top;
  const float keep = exp_one(top - highest), share = exp_one(part_top - highest);
  mass = mass * keep + part_mass * share;
  top = highest;
  for (int64_t d = 0; d < dim; d += kLanes)
    store_upto(out + d, fma(load_upto(part + d, dim - d), splat(share), load_upto(out + d, dim - d) * splat(keep)),
               dim - d);
}

// The end of it: the sum divided by the mass.
inline void finish_chunks(const float* sum, float mass, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += kLanes) store_upto(out + d, load_upto(sum + d, dim - d) / splat(mass), dim - d);
}

}  // namespace COLORA_ISA_NAMESPACE
