// Attention over a key/value cache, as cached_attention and the fused decoder layers use it.
#pragma once

#include "attention.h"
#include "check.h"

namespace COLORA_ISA_NAMESPACE {

struct CachedSizes {
  int64_t rows, tokens, heads, kv_heads, group, dim, half, max_len;
};

struct CachedArguments {
  CachedSizes n;
  const float *q, *k, *v, *cos, *sin;
  const int32_t *cache_rows, *start, *length;
  float* out;
  bool active(int64_t row) const { return length[row] > 0; }
  template <class T>
  T* cache(void* base, int64_t row, int64_t kv) const {
    return static_cast<T*>(base) + (int64_t(cache_rows[row]) * n.kv_heads + kv) * n.max_len * n.dim;
  }
  const float* cosines(int64_t row, int64_t token) const { return cos + (start[row] + token) * n.half; }
  const float* sines(int64_t row, int64_t token) const { return sin + (start[row] + token) * n.half; }
};

// Sizes of a call for queries of `heads_width` = heads * head_dim columns; refuses caches and tables that do not fit.
// `q` is the argument to name when the number of heads is wrong.
CachedSizes cached_sizes(const colora::Tensor& k_cache, const colora::Tensor& v_cache, const colora::Tensor& cos,
                         const colora::Tensor& sin, int64_t rows, int64_t tokens, int64_t heads_width,
                         const colora::Tensor& q);

// Refuses cache rows out of range or shared, lengths outside 0..tokens and positions past the cache.
void check_cache_rows(const colora::Tensor& cache_rows, const colora::Tensor& start, const colora::Tensor& length,
                      int64_t rows, int64_t tokens, int64_t total, int64_t max_len);

// Rotates, appends to the caches and attends; `half_width`: the caches are bfloat16.
void attend_cached(const CachedArguments& a, void* k_cache, void* v_cache, bool half_width);

}  // namespace COLORA_ISA_NAMESPACE
