// cached_attention: rotary embedding, append to the key/value cache in place, attention over each row's own past.
//
// One token a row (decoding) runs by positions: tasks of (row, key/value head, chunk of positions), then a merge of the
// chunks. More tokens (prefill) run by blocks of queries. Chunk and block borders are absolute, so a row's result does
// not depend on the other rows nor on the number of threads.

#include <cstring>

#include "attention_cached.h"
#include "parallel.h"
#include "scratch.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 256;   // positions of one decoding task
constexpr int kGroupPart = 4;     // query heads handled together; larger groups go in parts
constexpr int kStrip = kLanes == 16 ? 4 : 2;  // value vectors held in registers per query head

// Folds vectors so that lane i of the result is the sum over the lanes of v[i].
template <int kDistance, int... I>
inline vf fold_pair(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & kDistance ? kLanes + I : I)...) +
         __builtin_shufflevector(a, b, (I & kDistance ? kLanes + (I ^ kDistance) : I ^ kDistance)...);
}
template <int kDistance>
inline void fold_lanes(vf* v) {
  for (int i = 0; i < kDistance; ++i)
    v[i] = fold_pair<kDistance>(v[i], v[i + kDistance], std::make_integer_sequence<int, kLanes>{});
  if constexpr (kDistance > 1) fold_lanes<kDistance / 2>(v);
}

// Scores of kHeads query heads (rotated, scaled, padded to whole vectors with zeros) against kLanes positions.
template <int kHeads, class T>
inline void score_positions(const float* queries, int64_t query_row, const T* keys, int64_t dim, int64_t count,
                            float* scores, int64_t score_row) {
  constexpr int kTogether = 4;  // positions whose sums stay in registers
  vf sums[kHeads][kLanes];
  for (int64_t p = 0; p < kLanes; p += kTogether) {
    vf part[kTogether][kHeads] = {};
    for (int64_t d = 0; d < dim && p < count; d += kLanes) {
      vf query[kHeads];
      for (int h = 0; h < kHeads; ++h) query[h] = load(queries + h * query_row + d);
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        // A missing position repeats the last one; its score is dropped by the caller.
        const T* row = keys + std::min(p + j, count - 1) * dim + d;
        const vf key = load_upto(row, dim - d);
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) part[j][h] = fma(query[h], key, part[j][h]);
      }
    }
    for (int j = 0; j < kTogether; ++j)
      for (int h = 0; h < kHeads; ++h) sums[h][p + j] = part[j][h];
  }
  for (int h = 0; h < kHeads; ++h) {
    fold_lanes<kLanes / 2>(sums[h]);
    store(scores + h * score_row, sums[h][0]);
  }
}

// One chunk of positions for kHeads query heads: the unnormalized output, its mass and the maximum.
template <int kHeads, class T>
void decode_chunk(const float* queries, int64_t query_row, const T* keys, const T* values, int64_t dim, int64_t count,
                  float* out, int64_t out_row, float* top, float* mass) {
  alignas(64) float weights[kHeads][kChunk];
  for (int64_t p = 0; p < count; p += kLanes)
    score_positions<kHeads>(queries, query_row, keys + p * dim, dim, std::min<int64_t>(kLanes, count - p),
                            &weights[0][p], kChunk);
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t p = count; p < kChunk && p % kLanes; ++p)
      weights[h][p] = -std::numeric_limits<float>::infinity();
    vf highest = splat(-std::numeric_limits<float>::infinity()), total{};
    for (int64_t p = 0; p < count; p += kLanes) highest = max(load(&weights[h][p]), highest);
    top[h] = max_of(highest);
    for (int64_t p = 0; p < count; p += kLanes) {
      const vf weight = exp(load(&weights[h][p]) - splat(top[h]));
      total = total + weight;
      store(&weights[h][p], weight);
    }
    mass[h] = sum(total);
  }
  const auto strip = [&](auto vectors, int64_t d, int64_t columns) {
    constexpr int kVectors = decltype(vectors)::value;
    vf sums[kHeads][kVectors] = {};
    for (int64_t p = 0; p < count; ++p) {
      vf value[kVectors];
      for (int i = 0; i < kVectors; ++i)
        value[i] = load_upto(values + p * dim + d + i * kLanes, columns - i * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const vf weight = splat(weights[h][p]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sums[h][i] = fma(weight, value[i], sums[h][i]);
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

template <class T>
void append(const CachedArguments& a, void* k_cache, void* v_cache, int64_t row, int64_t token) {
  const int64_t position = a.start[row] + token, width = a.n.kv_heads * a.n.dim;
  for (int64_t kv = 0; kv < a.n.kv_heads; ++kv) {
    const int64_t from = (row * a.n.tokens + token) * width + kv * a.n.dim, to = position * a.n.dim;
    rotate_head(a.k + from, a.cosines(row, token), a.sines(row, token), a.n.half, 1.0f,
                a.cache<T>(k_cache, row, kv) + to);
    T* values = a.cache<T>(v_cache, row, kv) + to;
    for (int64_t d = 0; d < a.n.dim; d += kLanes)
      store_upto(values + d, load_upto(a.v + from + d, a.n.dim - d), a.n.dim - d);
  }
}

template <class T>
void decode(const CachedArguments& a, void* k_cache, void* v_cache) {
  const CachedSizes& n = a.n;
  const int64_t width = padded(n.dim), heads = n.heads;
  AlignedFloats queries(n.rows * heads * width);
  struct Task { int64_t row, kv, chunk; };
  std::vector<Task> tasks;
  std::vector<int64_t> first_part(size_t(n.rows));  // index of a row's first partial result
  int64_t parts = 0, positions = 0;
  for (int64_t row = 0; row < n.rows; ++row) {
    first_part[size_t(row)] = parts;
    if (!a.active(row)) continue;
    const int64_t chunks = a.start[row] / kChunk + 1;
    for (int64_t kv = 0; kv < n.kv_heads; ++kv)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) tasks.push_back({row, kv, chunk});
    parts += chunks * heads;
    positions += a.start[row] + 1;
  }
  AlignedFloats partial(parts * n.dim), top(parts + 1), mass(parts + 1);

  for (int64_t row = 0; row < n.rows; ++row) {  // little work: one token a row
    if (!a.active(row)) continue;
    append<T>(a, k_cache, v_cache, row, 0);
    for (int64_t h = 0; h < heads; ++h)
      rotate_head(a.q + (row * heads + h) * n.dim, a.cosines(row, 0), a.sines(row, 0), n.half,
                  1.0f / std::sqrt(float(n.dim)), queries.data() + (row * heads + h) * width);
  }

  const auto work = [&](int64_t i) {
    const Task task = tasks[size_t(i)];
    const int64_t p0 = task.chunk * kChunk, count = std::min(kChunk, a.start[task.row] + 1 - p0);
    const T* keys = a.cache<T>(k_cache, task.row, task.kv) + p0 * n.dim;
    const T* values = a.cache<T>(v_cache, task.row, task.kv) + p0 * n.dim;
    for (int64_t g = 0; g < n.group;) {
      const int64_t h = task.kv * n.group + g, part = first_part[size_t(task.row)] + task.chunk * heads + h;
      const float* query = queries.data() + (task.row * heads + h) * width;
      const auto run = [&](auto together) {
        decode_chunk<decltype(together)::value>(query, width, keys, values, n.dim, count, partial.data() + part * n.dim,
                                                n.dim, &top.data()[part], &mass.data()[part]);
        g += decltype(together)::value;
      };
      switch (std::min<int64_t>(n.group - g, kGroupPart)) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        default: run(std::integral_constant<int, 4>{});
      }
    }
  };
  if (positions * n.kv_heads * n.dim * int64_t(sizeof(T)) < (1 << 15)) {  // less than what starting threads costs
    for (int64_t i = 0; i < int64_t(tasks.size()); ++i) work(i);
  } else {
    parallel_tasks(int64_t(tasks.size()), work);
  }

  for (int64_t row = 0; row < n.rows; ++row) {
    if (!a.active(row)) continue;
    const int64_t chunks = a.start[row] / kChunk + 1;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t part = first_part[size_t(row)] + h;
      float highest = top.data()[part];
      for (int64_t c = 1; c < chunks; ++c)
        if (top.data()[part + c * heads] > highest) highest = top.data()[part + c * heads];
      float total = 0.0f;
      for (int64_t c = 0; c < chunks; ++c) {
        float& share = top.data()[part + c * heads];
        share = exp_one(share - highest);
        total += share * mass.data()[part + c * heads];
      }
      float* out = a.out + (row * heads + h) * n.dim;
      for (int64_t d = 0; d < n.dim; d += kLanes) {
        vf value{};
        for (int64_t c = 0; c < chunks; ++c)
          value = fma(load_upto(partial.data() + (part + c * heads) * n.dim + d, n.dim - d),
                      splat(top.data()[part + c * heads]), value);
        store_upto(out + d, value / splat(total), n.dim - d);
      }
    }
  }
}

template <class T>
void prefill(const CachedArguments& a, void* k_cache, void* v_cache) {
  const CachedSizes& n = a.n;
  const int64_t block = std::max<int64_t>(1, kQueryBlock / n.group);  // tokens of a block
  struct Task { int64_t row, kv, token; };
  std::vector<Task> tasks;
  for (int64_t row = 0; row < n.rows; ++row)
    for (int64_t token = 0; token < a.length[row]; token += block)
      for (int64_t kv = 0; kv < n.kv_heads; ++kv) tasks.push_back({row, kv, token});
  // The longest first, so that no thread is left with a long one at the end.
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& x, const Task& y) {
    return a.start[x.row] + x.token > a.start[y.row] + y.token;
  });
  std::vector<BlockScratch> scratches(size_t(colora::thread_count()), BlockScratch(block * n.group, n.dim));

  const int64_t grain = (1 << 14) / (n.kv_heads * n.dim) + 1;
  parallel_ranges(n.rows * n.tokens, 1, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (i % n.tokens < a.length[i / n.tokens]) append<T>(a, k_cache, v_cache, i / n.tokens, i % n.tokens);
  });
  parallel_tasks(int64_t(tasks.size()), [&](int64_t i) {
    const Task task = tasks[size_t(i)];
    BlockScratch& scratch = scratches[size_t(worker_index())];
    const int64_t count = std::min<int64_t>(block, a.length[task.row] - task.token);
    const auto place = [&](int64_t m) {  // of query row m in q and in the output
      return ((task.row * n.tokens + task.token + m / n.group) * n.heads + task.kv * n.group + m % n.group) * n.dim;
    };
    for (int64_t m = 0; m < count * n.group; ++m)
      rotate_head(a.q + place(m), a.cosines(task.row, task.token + m / n.group),
                  a.sines(task.row, task.token + m / n.group), n.half, 1.0f / std::sqrt(float(n.dim)),
                  scratch.queries.data() + m * n.dim);
    attend_block(scratch, count * n.group, n.group, a.start[task.row] + task.token, n.dim,
                 a.cache<T>(k_cache, task.row, task.kv), n.dim, a.cache<T>(v_cache, task.row, task.kv), n.dim);
    for (int64_t m = 0; m < count * n.group; ++m)
      std::memcpy(a.out + place(m), scratch.out.data() + m * n.dim, size_t(n.dim) * sizeof(float));
  });
}

}  // namespace

using colora::Tensor;

void check_cache_rows(const Tensor& cache_rows, const Tensor& start, const Tensor& length, int64_t rows, int64_t tokens,
                int64_t total, int64_t max_len) {
  for (const Tensor* t : {&cache_rows, &start, &length})
    t->expect_dtype("int32").expect_rank(1).expect_dim(0, rows, "rows, as in q");
  std::vector<int64_t> user(size_t(total), -1);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = length.data<int32_t>()[row];
    if (count < 0 || count > tokens)
      length.fail("is %lld in row %lld, expected 0 to %lld (the tokens of q)", (long long)count, (long long)row,
                  (long long)tokens);
    if (count == 0) continue;
    const int64_t cache_row = cache_rows.data<int32_t>()[row], first = start.data<int32_t>()[row];
    if (cache_row < 0 || cache_row >= total)
      cache_rows.fail("is %lld in row %lld, expected 0 to %lld", (long long)cache_row, (long long)row,
                      (long long)total - 1);
    if (user[size_t(cache_row)] >= 0)
      cache_rows.fail("is %lld in row %lld and in row %lld, expected a cache row of its own for each active row",
                      (long long)cache_row, (long long)user[size_t(cache_row)], (long long)row);
    user[size_t(cache_row)] = row;
    if (first < 0 || first + count > max_len)
      start.fail("is %lld in row %lld with length %lld, expected positions within the cache (0 to %lld)",
                 (long long)first, (long long)row, (long long)count, (long long)max_len - 1);
  }
}

CachedSizes cached_sizes(const Tensor& k_cache, const Tensor& v_cache, const Tensor& cos, const Tensor& sin,
                         int64_t rows, int64_t tokens, int64_t heads_width, const Tensor& q) {
  for (const Tensor* t : {&cos, &sin}) t->expect_dtype("float32").expect_rank(2);
  k_cache.expect_dtype("float32", "bfloat16").expect_rank(4);
  v_cache.expect_dtype(k_cache.dtype).expect_same_shape(k_cache);
  CachedSizes n;
  n.rows = rows, n.tokens = tokens, n.kv_heads = k_cache.dim(1), n.max_len = k_cache.dim(2);
  n.dim = k_cache.dim(3), n.half = n.dim / 2;
  if (n.dim < 2 || n.dim % 2) k_cache.fail("has head_dim %lld, expected an even number >= 2", (long long)n.dim);
  if (n.kv_heads < 1) k_cache.fail("has %lld key/value heads, expected at least 1", (long long)n.kv_heads);
  n.heads = heads_width / n.dim, n.group = n.heads / n.kv_heads;
  if (n.group < 1 || n.group * n.kv_heads * n.dim != heads_width)
    q.fail("has %lld outputs for the queries, expected a multiple of kv_heads * head_dim = %lld",
           (long long)heads_width, (long long)(n.kv_heads * n.dim));
  cos.expect_dim(1, n.half, "head_dim / 2");
  if (cos.dim(0) < n.max_len)
    cos.fail("has %lld positions, expected at least the cache's %lld", (long long)cos.dim(0), (long long)n.max_len);
  sin.expect_same_shape(cos);
  return n;
}

void attend_cached(const CachedArguments& a, void* k_cache, void* v_cache, bool half_width) {
  const CachedSizes& n = a.n;
  const int64_t width = n.heads * n.dim;
  for (int64_t row = 0; row < n.rows; ++row)
    std::fill(a.out + (row * n.tokens + a.length[row]) * width, a.out + (row + 1) * n.tokens * width, 0.0f);
  if (n.rows == 0 || n.tokens == 0) return;
  if (n.tokens == 1) {
    half_width ? decode<bf16>(a, k_cache, v_cache) : decode<float>(a, k_cache, v_cache);
  } else {
    half_width ? prefill<bf16>(a, k_cache, v_cache) : prefill<float>(a, k_cache, v_cache);
  }
}

}  // namespace COLORA_ISA_NAMESPACE

// (q, k, v, cos, sin, k_cache, v_cache, cache_rows, start, length) -> out
COLORA_OPERATOR(cached_attention) {
  using colora::Tensor;
  call.expect(10, 1);
  const Tensor q = call.in(0, "q"), k = call.in(1, "k"), v = call.in(2, "v"), cos = call.in(3, "cos"),
               sin = call.in(4, "sin"), k_cache = call.in(5, "k_cache"), v_cache = call.in(6, "v_cache"),
               out = call.out(0, "out");
  for (const Tensor* t : {&q, &k, &v}) t->expect_dtype("float32").expect_rank(3);
  const CachedSizes n = cached_sizes(k_cache, v_cache, cos, sin, q.dim(0), q.dim(1), q.dim(2), q);
  k.expect_dim(0, n.rows, "rows, as in q").expect_dim(1, n.tokens, "tokens, as in q");
  k.expect_dim(2, n.kv_heads * n.dim, "kv_heads * head_dim, as in k_cache");
  v.expect_same_shape(k);
  out.expect_dtype("float32").expect_same_shape(q);
  const Tensor cache_rows = call.in(7, "cache_rows"), start = call.in(8, "start"), length = call.in(9, "length");
  check_cache_rows(cache_rows, start, length, n.rows, n.tokens, k_cache.dim(0), n.max_len);
  attend_cached({n, q.data<float>(), k.data<float>(), v.data<float>(), cos.data<float>(), sin.data<float>(),
                 cache_rows.data<int32_t>(), start.data<int32_t>(), length.data<int32_t>(), out.data<float>()},
                k_cache.raw, v_cache.raw, k_cache.is("bfloat16"));
}
