// Attention over the paged cache, for flat batches of tokens: each token has a row and a position; a row's table says
// which block of the cache holds the positions kBlock * i on.
#pragma once

#include <vector>

#include "attention.h"
#include "attention_chunk.h"
#include "check.h"
#include "scratch.h"

namespace COLORA_ISA_NAMESPACE {

enum class CacheType { kFloat32, kBfloat16, kInt8 };

// What the tensors of a layer's cache say, and the queries' width; and the form of the attention.
struct PagedSizes {
  int64_t blocks, heads, kv_heads, group, dim, half;
  CacheType type;
  float factor;                    // on scores; 1 / sqrt(dim) unless said otherwise
  float cap = 0;                   // 0, or c of c * tanh(score / c)
  int64_t window = 0;              // 0, or how many positions a query sees, its own counted
  const int32_t* order = nullptr;  // of a head's channels, see channel_order; null: as they are
  // The first position that a query at `position` sees.
  int64_t lower(int64_t position) const { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; }
  int64_t block_bytes() const;  // of one block of all heads, keys or values
};

// Sizes for queries of `width` = heads * head_dim columns; refuses caches that do not fit. Caches are (blocks, kv_heads,
// numbers of a block) float32, bfloat16 or int8. `q` is the argument to name when the number of heads is wrong.
PagedSizes paged_sizes(const colora::Tensor& k_cache, const colora::Tensor& v_cache, const colora::Tensor& cos,
                       const colora::Tensor& sin, int64_t width, const colora::Tensor& q);

// Neighbouring tokens of a flat batch that belong to one row, at ascending positions.
struct Segment {
  int64_t row, first, start, count;  // first: the index of its first token; start: that token's position
};

// A flat batch as an operator gets it. tables: (rows, width) int32.
struct FlatBatch {
  const int32_t *rows, *positions, *tables;
  int64_t tokens, table_rows, table_width;
  const int32_t* table(int64_t row) const { return tables + row * table_width; }
};

// The segments of a batch whose tokens have a row >= 0 (-1: a token that only fills). Refuses rows out of range, rows that
// appear twice, and positions that do not ascend by one or lie outside 0 .. positions - 1.
std::vector<Segment> segments_of(const FlatBatch& batch, const colora::Tensor& rows, const colora::Tensor& positions,
                                 int64_t most_positions);

// Refuses tables without blocks for all positions up to `last[row]` (-1: the row is not used), blocks that are not there,
// and blocks that one row writes (its positions from `first[row]` on) and another one reads or writes.
void check_blocks(const FlatBatch& batch, const colora::Tensor& tables, const std::vector<int64_t>& first,
                  const std::vector<int64_t>& last, int64_t blocks);

// Tasks and scratch of a step's attention; made once a step and used by every layer.
class PagedAttention {
 public:
  // Takes the batch's segments (which must be checked).
  void begin(const FlatBatch& batch, std::vector<Segment> segments);
  // q (tokens, heads * dim), k and v (tokens, kv_heads * dim), not rotated: appends k and v and writes out like q. cos and
  // sin may be null: no rotary.
  void run(const PagedSizes& n, const float* q, const float* k, const float* v, const float* cos, const float* sin,
           void* k_cache, void* v_cache, float* out);

 private:
  struct Task { int64_t segment, kv, part; };  // part: the chunk of a single token, the first token of a longer segment
  struct Scratch {
    std::vector<float> queries, out, part, scores, keys, values, top, mass, part_top, part_mass;
    Scratch(int64_t query_rows, int64_t dim);
  };
  struct Call;

  void plan(const PagedSizes& n);
  template <class T> void run_as(const Call& call);
  template <class T> void append(const Call& call, int64_t token) const;
  template <class T> void decode(const Call& call, const Task& task);
  template <class T> void prefill(const Call& call, const Task& task);
  template <class T> void attend_rows(const Call& call, Scratch& s, const Segment& segment, int64_t kv, int64_t rows,
                                      int64_t first);
  void merge(const Call& call);

  FlatBatch batch_{};
  std::vector<Segment> segments_;
  int64_t kv_heads_ = -1, group_ = -1, dim_ = -1, window_ = 0;  // what the plan was made for
  int64_t query_tokens_ = 1, positions_ = 0;
  std::vector<int64_t> token_position_, first_part_;  // by token: its position; by segment: its first partial result
  std::vector<Task> tasks_;
  std::vector<Scratch> scratches_;
  AlignedFloats queries_, partial_, top_, mass_;
};

}  // namespace COLORA_ISA_NAMESPACE
