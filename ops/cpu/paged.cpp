// Attention over the paged cache: rotary embedding, append in place, attention of every token over its row's own past.
//
// A row that brings one token (decoding) runs by positions: tasks of (row, key/value head, chunk of positions), then a
// merge of the chunks. More tokens of a row (a piece of a prompt) run by blocks of queries, which take the chunks one after
// another. Both add in the order of attention_chunk.h, so a token's result does not depend on the other rows, on threads,
// nor on how its row was cut.
#include "paged.h"

#include "parallel.h"

namespace COLORA_ISA_NAMESPACE {

using colora::Tensor;

int64_t PagedSizes::block_bytes() const {
  switch (type) {
    case CacheType::kFloat32: return kv_heads * block_size<float>(dim) * 4;
    case CacheType::kBfloat16: return kv_heads * block_size<bf16>(dim) * 2;
    case CacheType::kInt8: break;
  }
  return kv_heads * block_size<int8_t>(dim);
}

PagedSizes paged_sizes(const Tensor& k_cache, const Tensor& v_cache, const Tensor& cos, const Tensor& sin, int64_t width,
                       const Tensor& q) {
  for (const Tensor* t : {&cos, &sin}) t->expect_dtype("float32").expect_rank(2);
  sin.expect_same_shape(cos);
  k_cache.expect_dtype("float32", "bfloat16", "int8").expect_rank(3);
  v_cache.expect_dtype(k_cache.dtype).expect_same_shape(k_cache);
  PagedSizes n{};
  n.half = cos.dim(1), n.dim = 2 * n.half;
  if (n.half < 1) cos.fail("has no columns, expected head_dim / 2 of them");
  n.factor = 1.0f / std::sqrt(float(n.dim));
  n.type = k_cache.is("float32") ? CacheType::kFloat32 : k_cache.is("int8") ? CacheType::kInt8 : CacheType::kBfloat16;
  n.blocks = k_cache.dim(0), n.kv_heads = k_cache.dim(1);
  if (n.kv_heads < 1) k_cache.fail("has %lld key/value heads, expected at least 1", (long long)n.kv_heads);
  k_cache.expect_dim(2, n.type == CacheType::kInt8 ? block_size<int8_t>(n.dim) : block_size<float>(n.dim),
                     "the numbers of a block of head_dim = 2 * the columns of cos");
  n.heads = width / n.dim, n.group = n.heads / n.kv_heads;
  if (n.group < 1 || n.group * n.kv_heads * n.dim != width)
    q.fail("has %lld columns for the queries, expected a multiple of kv_heads * head_dim = %lld", (long long)width,
           (long long)(n.kv_heads * n.dim));
  return n;
}

std::vector<Segment> segments_of(const FlatBatch& batch, const Tensor& rows, const Tensor& positions,
                                 int64_t most_positions) {
  std::vector<Segment> found;
  std::vector<bool> seen(size_t(batch.table_rows), false);
  const int64_t most = std::min(most_positions, batch.table_width * kBlock);
  for (int64_t t = 0; t < batch.tokens; ++t) {
    const int64_t row = batch.rows[t], position = batch.positions[t];
    if (row < -1 || row >= batch.table_rows)
      rows.fail("is %lld at token %lld, expected -1 (nothing) or 0 to %lld", (long long)row, (long long)t,
                (long long)batch.table_rows - 1);
    if (row < 0) continue;
    if (position < 0 || position >= most)
      positions.fail("is %lld at token %lld, expected 0 to %lld", (long long)position, (long long)t, (long long)most - 1);
    Segment* last = found.empty() ? nullptr : &found.back();
    if (last && last->row == row && last->first + last->count == t) {
      if (position != last->start + last->count)
        positions.fail("is %lld at token %lld behind %lld of the same row, expected one more", (long long)position,
                       (long long)t, (long long)(last->start + last->count - 1));
      ++last->count;
      continue;
    }
    if (seen[size_t(row)])
      rows.fail("is %lld at token %lld and at tokens before others, expected the tokens of a row together",
                (long long)row, (long long)t);
    seen[size_t(row)] = true;
    found.push_back({row, t, position, 1});
  }
  return found;
}

void check_blocks(const FlatBatch& batch, const Tensor& tables, const std::vector<int64_t>& first,
                  const std::vector<int64_t>& last, int64_t blocks) {
  std::vector<int64_t> writer(size_t(blocks), -1);
  const auto name = [&](int64_t row, int64_t i) { return "entry " + std::to_string(i) + " of row " + std::to_string(row); };
  for (const bool writing : {true, false})  // all that is written first
    for (int64_t row = 0; row < batch.table_rows; ++row) {
      if (last[size_t(row)] < 0) continue;
      const int64_t begin = first[size_t(row)] / kBlock, end = last[size_t(row)] / kBlock + 1;
      for (int64_t i = writing ? begin : 0; i < (writing ? end : begin); ++i) {
        const int64_t block = i < batch.table_width ? batch.table(row)[i] : -1;
        if (block < 0 || block >= blocks)
          tables.fail("has %lld as %s, expected a block 0 to %lld for each position", (long long)block,
                      name(row, i).c_str(), (long long)blocks - 1);
        int64_t& by = writer[size_t(block)];
        // Reading what it writes itself would be a block twice in one table.
        if (by >= 0)
          tables.fail("has %lld as %s, but row %lld writes that block, expected a block of its own", (long long)block,
                      name(row, i).c_str(), (long long)by);
        if (writing) by = row;
      }
    }
}

// A layer's tensors.
struct PagedAttention::Call {
  const PagedSizes& n;
  const float *q, *k, *v, *cos, *sin;
  void *k_cache, *v_cache;
  float* out;

  template <class T>
  static T* block(void* cache, const PagedSizes& n, int64_t number, int64_t kv) {
    return static_cast<T*>(cache) + (number * n.kv_heads + kv) * block_size<T>(n.dim);
  }
  // The blocks of the chunk that begins at position p0, as many as `count` positions need.
  template <class T>
  static void blocks_of(void* cache, const PagedSizes& n, const int32_t* table, int64_t kv, int64_t p0, int64_t count,
                        const T** to) {
    for (int64_t i = 0; i * kBlock < count; ++i) to[i] = block<T>(cache, n, table[p0 / kBlock + i], kv);
  }
  // A head's vector at a position, its channels in the layer's order, rotated, times a factor.
  void rotate(const float* x, int64_t position, float factor, float* to) const {
    if (!cos) {
      for (int64_t d = 0; d < n.dim; d += kLanes)
        store_upto(to + d, load_upto(x + d, n.dim - d) * splat(factor), n.dim - d);
      return;
    }
    if (n.order) {
      static thread_local std::vector<float> ordered;
      ordered.resize(size_t(n.dim));
      for (int64_t d = 0; d < n.dim; ++d) ordered[size_t(d)] = x[n.order[d]];
      x = ordered.data();
    }
    rotate_head(x, cos + position * n.half, sin + position * n.half, n.half, factor, to);
  }
  void rotate_query(int64_t token, int64_t head, int64_t position, float* to) const {
    rotate(q + (token * n.heads + head) * n.dim, position, n.factor, to);
  }
};

PagedAttention::Scratch::Scratch(int64_t query_rows, int64_t dim)
    : queries(size_t(query_rows * dim)), out(size_t(query_rows * dim)), part(size_t(query_rows * dim)),
      scores(size_t(query_rows * kChunk)), keys(size_t(dim * kKeyBlock)), values(size_t(dim * kKeyBlock)),
      top(size_t(query_rows)), mass(size_t(query_rows)), part_top(size_t(query_rows)), part_mass(size_t(query_rows)) {}

void PagedAttention::begin(const FlatBatch& batch, std::vector<Segment> segments) {
  batch_ = batch, segments_ = std::move(segments);
  token_position_.assign(size_t(batch.tokens), -1);
  for (const Segment& s : segments_)
    for (int64_t i = 0; i < s.count; ++i) token_position_[size_t(s.first + i)] = s.start + i;
  dim_ = -1;
}

void PagedAttention::plan(const PagedSizes& n) {
  if (n.kv_heads == kv_heads_ && n.group == group_ && n.dim == dim_ && n.window == window_) return;
  const bool same_scratch = n.group == group_ && n.dim == dim_;
  kv_heads_ = n.kv_heads, group_ = n.group, dim_ = n.dim, window_ = n.window;
  query_tokens_ = std::max<int64_t>(1, kQueryBlock / n.group);
  tasks_.clear(), first_part_.assign(segments_.size(), 0);
  positions_ = 0;
  int64_t parts = 0;
  bool longer = false;
  for (size_t s = 0; s < segments_.size(); ++s) {
    const Segment& one = segments_[s];
    if (one.count > 1) {
      longer = true;
      for (int64_t token = 0; token < one.count; token += query_tokens_)
        for (int64_t kv = 0; kv < n.kv_heads; ++kv) tasks_.push_back({int64_t(s), kv, token});
      continue;
    }
    first_part_[s] = parts;
    const int64_t begin = n.lower(one.start) / kChunk, end = one.start / kChunk + 1;
    for (int64_t kv = 0; kv < n.kv_heads; ++kv)
      for (int64_t chunk = begin; chunk < end; ++chunk) tasks_.push_back({int64_t(s), kv, chunk});
    parts += (end - begin) * n.heads;
    positions_ += one.start + 1 - begin * kChunk;
  }
  if (longer) {
    // The longest first, so that no thread is left with a long one at the end.
    const auto cost = [&](const Task& t) {
      const Segment& s = segments_[size_t(t.segment)];
      const int64_t seen = s.start + t.part - n.lower(s.start + t.part);
      return s.count > 1 ? (seen + kBlock) * std::min(query_tokens_, s.count - t.part) : int64_t(0);
    };
    std::stable_sort(tasks_.begin(), tasks_.end(), [&](const Task& x, const Task& y) { return cost(x) > cost(y); });
    positions_ = int64_t(1) << 40;
    if (!same_scratch || int(scratches_.size()) != colora::thread_count())
      scratches_.assign(size_t(colora::thread_count()), Scratch(query_tokens_ * n.group, n.dim));
  }
  queries_.resize(int64_t(segments_.size()) * n.heads * n.dim);
  partial_.resize(parts * n.dim), top_.resize(parts + 1), mass_.resize(parts + 1);
}

template <class T>
void PagedAttention::append(const Call& call, int64_t token) const {
  const PagedSizes& n = call.n;
  const int64_t position = token_position_[size_t(token)], dim = n.dim, at = position % kBlock;
  if (position < 0) return;
  const int64_t number = batch_.table(batch_.rows[token])[position / kBlock];
  constexpr int64_t kMost = 1024;
  float buffer[kMost];
  std::vector<float> wide(dim > kMost ? size_t(dim) : 0);
  float* rotated = dim > kMost ? wide.data() : buffer;
  const auto largest = [&](const float* x) {
    float most = 0;
    for (int64_t d = 0; d < dim; ++d)
      if (!(std::fabs(x[d]) <= most)) most = std::fabs(x[d]);  // a NaN stays, so that the scale tells of it
    return most;
  };
  for (int64_t kv = 0; kv < n.kv_heads; ++kv) {
    const float* values_from = call.v + (token * n.kv_heads + kv) * dim;
    T *keys = Call::block<T>(call.k_cache, n, number, kv), *values = Call::block<T>(call.v_cache, n, number, kv);
    call.rotate(call.k + (token * n.kv_heads + kv) * dim, position, 1.0f, rotated);
    if constexpr (sizeof(T) == 1) {
      const float key_scale = largest(rotated) / 127.0f, value_scale = largest(values_from) / 127.0f;
      scales_of(keys, dim)[at] = key_scale, scales_of(values, dim)[at] = value_scale;
      const auto rounded = [](float x, float scale) {  // (0 times a scale that is not finite is read as NaN)
        return int8_t(scale > 0 && std::isfinite(scale) ? std::nearbyint(x / scale) : 0.0f);
      };
      for (int64_t d = 0; d < dim; ++d) keys[d * kBlock + at] = rounded(rotated[d], key_scale);
      for (int64_t d = 0; d < dim; ++d) values[at * dim + d] = rounded(values_from[d], value_scale);
    } else {
      T narrow[kLanes];
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, dim - d);
        store_upto(narrow, load_upto(rotated + d, count), count);
        for (int64_t i = 0; i < count; ++i) keys[(d + i) * kBlock + at] = narrow[i];
        store_upto(values + at * dim + d, load_upto(values_from + d, dim - d), dim - d);
      }
    }
  }
}

template <class T>
void PagedAttention::decode(const Call& call, const Task& task) {
  const PagedSizes& n = call.n;
  const Segment& segment = segments_[size_t(task.segment)];
  const int64_t p0 = task.part * kChunk, count = std::min(kChunk, segment.start + 1 - p0);
  const int64_t lower = n.lower(segment.start), from = std::max<int64_t>(0, lower - p0), skipped = from / kBlock;
  const int64_t part_of_row = task.part - lower / kChunk;
  const T *keys[kChunkBlocks], *values[kChunkBlocks];
  Call::blocks_of(call.k_cache, n, batch_.table(segment.row), task.kv, p0, count, keys);
  Call::blocks_of(call.v_cache, n, batch_.table(segment.row), task.kv, p0, count, values);
  by_heads(n.group, [&](auto together, int64_t g) {
    constexpr int kHeads = decltype(together)::value;
    const int64_t h = task.kv * n.group + g, part = first_part_[size_t(task.segment)] + part_of_row * n.heads + h;
    alignas(64) float weights[kHeads][kChunk];
    score_chunk<kHeads>(queries_.data() + (task.segment * n.heads + h) * n.dim, n.dim, keys + skipped, n.dim,
                        count - skipped * kBlock, &weights[0][skipped * kBlock], kChunk);
    for (int k = 0; k < kHeads; ++k)
      weigh(weights[k], from, count, n.cap, top_.data()[part + k], mass_.data()[part + k]);
    weighted_values<kHeads>(&weights[0][0], kChunk, values, from, count, n.dim, partial_.data() + part * n.dim, n.dim,
                            false);
  });
}

// Attention of a block of query rows (s.queries) over the positions 0.. of one head of a row. Query row m belongs to token
// m / group and sees the positions up to first + m / group, with a window the last ones of them.
template <class T>
void PagedAttention::attend_rows(const Call& call, Scratch& s, const Segment& segment, int64_t kv, int64_t rows,
                                 int64_t first) {
  const PagedSizes& n = call.n;
  const int64_t group = n.group, dim = n.dim, positions = first + (rows - 1) / group + 1;
  const T *keys[kChunkBlocks], *values[kChunkBlocks];
  for (int64_t p0 = n.lower(first) / kChunk * kChunk; p0 < positions; p0 += kChunk) {
    const int64_t count = std::min(kChunk, positions - p0);
    Call::blocks_of(call.k_cache, n, batch_.table(segment.row), kv, p0, count, keys);
    Call::blocks_of(call.v_cache, n, batch_.table(segment.row), kv, p0, count, values);
    // Tokens before `skip` see nothing of this chunk yet, those from `past` on nothing any more; all between see, but for
    // their windows, its first `common` positions.
    const int64_t skip = std::max<int64_t>(0, p0 - first), begin = skip * group;
    const int64_t past = n.window > 0 ? std::min(rows / group, p0 + kChunk + n.window - 1 - first) : rows / group;
    const int64_t end = past * group, tokens = past - skip;
    const int64_t common = std::min(count, first + skip + 1 - p0);
    const auto lower = [&](int64_t m) { return n.lower(first + m / group); };
    for (int64_t p = 0; p < count; p += kKeyBlock) {
      const int64_t width = std::min(kKeyBlock, count - p);
      for (int64_t b = 0; b < width; b += kBlock)  // keys as (dim, kKeyBlock)
        for (int64_t d = 0; d < dim; ++d)
          for (int64_t v = 0; v < kBlockVectors; ++v)
            store(s.keys.data() + d * kKeyBlock + b + v * kLanes, keys_at(keys[(p + b) / kBlock], dim, d, v));
      small_gemm(end - begin, width, dim, s.queries.data() + begin * dim, dim, 1, s.keys.data(), kKeyBlock,
                 s.scores.data() + begin * kChunk + p, kChunk, false);
    }
    for (int64_t m = begin; m < end; ++m)
      weigh(s.scores.data() + m * kChunk, std::max<int64_t>(0, lower(m) - p0),
            std::min(count, first + m / group + 1 - p0), n.cap, s.part_top[size_t(m)], s.part_mass[size_t(m)]);
    for (int64_t p = 0; p < common; p += kKeyBlock) {
      const int64_t width = std::min(kKeyBlock, common - p);
      for (int64_t i = 0; i < width; ++i) {  // values as (kKeyBlock, dim)
        const T* block = values[(p + i) / kBlock];
        const int64_t at = (p + i) % kBlock;
        for (int64_t d = 0; d < dim; d += kLanes) {
          vf value = load_upto(block + at * dim + d, dim - d);
          if constexpr (sizeof(T) == 1) value = value * value_scale(block, dim, at);
          store_upto(s.values.data() + i * dim + d, value, dim - d);
        }
      }
      small_gemm(end - begin, dim, width, s.scores.data() + begin * kChunk + p, kChunk, 1, s.values.data(), dim,
                 s.part.data() + begin * dim, dim, p > 0);
    }
    for (int64_t t = 0; t < tokens; ++t) {  // what a token sees beyond that, and no later position
      const int64_t seen = std::min(count, first + skip + t + 1 - p0);
      if (seen > common)
        by_heads(group, [&](auto together, int64_t g) {
          const int64_t m = (skip + t) * group + g;
          weighted_values<decltype(together)::value>(s.scores.data() + m * kChunk, kChunk, values, common, seen, dim,
                                                     s.part.data() + m * dim, dim, true);
        });
    }
    for (int64_t m = begin; m < end; ++m)
      merge_chunk(s.part.data() + m * dim, s.part_top[size_t(m)], s.part_mass[size_t(m)], lower(m) >= p0, dim,
                  s.out.data() + m * dim, s.top[size_t(m)], s.mass[size_t(m)]);
  }
}

template <class T>
void PagedAttention::prefill(const Call& call, const Task& task) {
  const PagedSizes& n = call.n;
  const Segment& segment = segments_[size_t(task.segment)];
  Scratch& scratch = scratches_[size_t(worker_index())];
  const int64_t rows = std::min(query_tokens_, segment.count - task.part) * n.group, first = segment.start + task.part;
  const auto token = [&](int64_t m) { return segment.first + task.part + m / n.group; };
  const auto head = [&](int64_t m) { return task.kv * n.group + m % n.group; };
  for (int64_t m = 0; m < rows; ++m)
    call.rotate_query(token(m), head(m), first + m / n.group, scratch.queries.data() + m * n.dim);
  attend_rows<T>(call, scratch, segment, task.kv, rows, first);
  for (int64_t m = 0; m < rows; ++m)
    finish_chunks(scratch.out.data() + m * n.dim, scratch.mass[size_t(m)], n.dim,
                  call.out + (token(m) * n.heads + head(m)) * n.dim);
}

// The results of the single tokens, from those of their chunks.
void PagedAttention::merge(const Call& call) {
  const PagedSizes& n = call.n;
  for (size_t s = 0; s < segments_.size(); ++s) {
    const Segment& segment = segments_[s];
    if (segment.count > 1) continue;
    const int64_t chunks = segment.start / kChunk + 1 - n.lower(segment.start) / kChunk;
    for (int64_t h = 0; h < n.heads; ++h) {
      const int64_t first = first_part_[s] + h;
      float highest = 0, total = 0, *sum = partial_.data() + first * n.dim;
      for (int64_t c = 0; c < chunks; ++c)
        merge_chunk(sum + c * n.heads * n.dim, top_.data()[first + c * n.heads], mass_.data()[first + c * n.heads], c == 0,
                    n.dim, sum, highest, total);
      finish_chunks(sum, total, n.dim, call.out + (segment.first * n.heads + h) * n.dim);
    }
  }
}

template <class T>
void PagedAttention::run_as(const Call& call) {
  const PagedSizes& n = call.n;
  parallel_ranges(batch_.tokens, 1, (1 << 14) / (n.kv_heads * n.dim) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) append<T>(call, t);
  });
  for (size_t s = 0; s < segments_.size(); ++s)  // little work: one token a row
    if (segments_[s].count == 1)
      for (int64_t h = 0; h < n.heads; ++h)
        call.rotate_query(segments_[s].first, h, segments_[s].start,
                          queries_.data() + (int64_t(s) * n.heads + h) * n.dim);
  const auto work = [&](int64_t i) {
    const Task& task = tasks_[size_t(i)];
    segments_[size_t(task.segment)].count > 1 ? prefill<T>(call, task) : decode<T>(call, task);
  };
  // Less than what starting threads costs stays here.
  const bool little = positions_ * n.kv_heads * n.dim * int64_t(sizeof(T)) < (1 << 15);
  parallel_tasks(int64_t(tasks_.size()), little ? 1 : threads_for(int64_t(tasks_.size()), 1), work);
  merge(call);
}

void PagedAttention::run(const PagedSizes& n, const float* q, const float* k, const float* v, const float* cos,
                         const float* sin, void* k_cache, void* v_cache, float* out) {
  if (segments_.empty()) return;
  plan(n);
  const Call call{n, q, k, v, cos, sin, k_cache, v_cache, out};
  switch (n.type) {
    case CacheType::kFloat32: return run_as<float>(call);
    case CacheType::kBfloat16: return run_as<bf16>(call);
    case CacheType::kInt8: return run_as<int8_t>(call);
  }
}

}  // namespace COLORA_ISA_NAMESPACE
