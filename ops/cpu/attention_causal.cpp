// causal_attention: whole sequences from position 0 without a cache, and its gradient (the form for training).
//
// A row holds one segment or several, one after another from its left end: `lengths` is (rows,) or (rows, segments), and
// 0 skips one. Every segment is a sequence of its own, whose positions start at 0: all work is by segment, so that what
// stands beside a segment, and where in the row it stands, changes no bit of it and costs nothing.
//
// The forward pass saves the log-sum-exp of each query; the backward pass computes the scores again, block by block, so
// that no (T, T) matrix exists (FlashAttention-2, arXiv 2307.08691). One thread does one key/value head of one segment in
// the backward pass and one block of queries in the forward pass, always in the same order.

#include <cstring>
#include <vector>

#include "attention.h"
#include "check.h"
#include "parallel.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

// Consecutive tokens of a row: token `begin + i` is at position `i`.
struct Segment {
  int64_t row, begin, length;
};

struct Sequence {
  int64_t rows, tokens, heads, kv_heads, group, dim, half;
  const float *q, *k, *v, *cos, *sin;
  std::vector<Segment> segments;  // none of length 0

  // Places of (row, token, head) in q or out, and in k or v.
  int64_t query(int64_t row, int64_t token, int64_t head) const {
    return ((row * tokens + token) * heads + head) * dim;
  }
  int64_t key(int64_t row, int64_t token, int64_t kv) const { return ((row * tokens + token) * kv_heads + kv) * dim; }
  float scale() const { return 1.0f / std::sqrt(float(dim)); }
};

Sequence read(colora::Call& call) {
  const Tensor q = call.in(0, "q"), k = call.in(1, "k"), v = call.in(2, "v"), cos = call.in(3, "cos"),
               sin = call.in(4, "sin"), lengths = call.in(5, "lengths");
  for (const Tensor* t : {&q, &k, &v}) t->expect_dtype("float32").expect_rank(3);
  for (const Tensor* t : {&cos, &sin}) t->expect_dtype("float32").expect_rank(2);
  Sequence s{};
  s.rows = q.dim(0), s.tokens = q.dim(1), s.half = cos.dim(1), s.dim = 2 * s.half;
  if (s.half < 1) cos.fail("has shape %s, expected (max_len, head_dim / 2)", cos.shape_text().c_str());
  sin.expect_same_shape(cos);
  k.expect_dim(0, s.rows, "rows, as in q").expect_dim(1, s.tokens, "tokens, as in q");
  v.expect_same_shape(k);
  s.kv_heads = k.dim(2) / s.dim;
  if (s.kv_heads < 1 || s.kv_heads * s.dim != k.dim(2))
    k.fail("has a last axis of %lld, expected a multiple of head_dim = %lld", (long long)k.dim(2), (long long)s.dim);
  s.group = q.dim(2) / k.dim(2), s.heads = s.group * s.kv_heads;
  if (s.group < 1 || s.heads * s.dim != q.dim(2))
    q.fail("has a last axis of %lld, expected a multiple of that of k, %lld", (long long)q.dim(2),
           (long long)k.dim(2));
  lengths.expect_dtype("int32").expect_rank(1, 2).expect_dim(0, s.rows, "rows, as in q");
  const int64_t most = lengths.ndim == 2 ? lengths.dim(1) : 1;
  if (lengths.ndim == 1 && cos.dim(0) < s.tokens)
    cos.fail("has %lld positions, expected at least the %lld of q", (long long)cos.dim(0), (long long)s.tokens);
  for (int64_t row = 0; row < s.rows; ++row) {
    int64_t begin = 0;
    for (int64_t i = 0; i < most; ++i) {
      const int64_t length = lengths.data<int32_t>()[row * most + i];
      if (length < 0 || length > s.tokens)
        lengths.fail("is %lld in row %lld, expected 0 to %lld (the tokens of q)", (long long)length, (long long)row,
                     (long long)s.tokens);
      if (begin + length > s.tokens)
        lengths.fail("sums up to more than %lld, the tokens of q, in row %lld", (long long)s.tokens, (long long)row);
      if (length > cos.dim(0))
        cos.fail("has %lld positions, expected at least the %lld of a segment in row %lld", (long long)cos.dim(0),
                 (long long)length, (long long)row);
      if (length > 0) s.segments.push_back({row, begin, length});
      begin += length;
    }
  }
  s.q = q.data<float>(), s.k = k.data<float>(), s.v = v.data<float>();
  s.cos = cos.data<float>(), s.sin = sin.data<float>();
  return s;
}

void check_lse(const Tensor& lse, const Sequence& s) {
  lse.expect_dtype("float32").expect_rank(3);
  lse.expect_dim(0, s.rows, "rows").expect_dim(1, s.heads, "heads").expect_dim(2, s.tokens, "tokens");
}

// Scratch of one thread in the backward pass: one key/value head of one row.
struct BackwardScratch {
  std::vector<float> q, dout, delta, lse, k, v, dq, dk, dv, keys, values, weights, slopes;
  BackwardScratch(int64_t tokens, int64_t group, int64_t dim)
      : q(size_t(tokens * group * dim)), dout(q.size()), delta(size_t(tokens * group)), lse(delta.size()),
        k(size_t(tokens * dim)), v(k.size()), dq(q.size()), dk(k.size()), dv(k.size()), keys(size_t(dim * kKeyBlock)),
        values(keys.size()), weights(size_t((kQueryBlock + group) * kKeyBlock)), slopes(weights.size()) {}
};

// Gradients of one key/value head: b.dq (token, group, dim), b.dk and b.dv (token, dim), still rotated and scaled.
void backward(BackwardScratch& b, int64_t length, int64_t group, int64_t dim) {
  std::fill_n(b.dq.data(), length * group * dim, 0.0f);
  std::fill_n(b.dk.data(), length * dim, 0.0f);
  std::fill_n(b.dv.data(), length * dim, 0.0f);
  const int64_t block = std::max<int64_t>(1, kQueryBlock / group);  // tokens
  float *weights = b.weights.data(), *slopes = b.slopes.data();
  for (int64_t p0 = 0; p0 < length; p0 += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, length - p0);
    transpose(b.k.data() + p0 * dim, count, dim, dim, b.keys.data(), kKeyBlock);
    transpose(b.v.data() + p0 * dim, count, dim, dim, b.values.data(), kKeyBlock);
    for (int64_t t0 = p0; t0 < length; t0 += block) {
      const int64_t rows = std::min(block, length - t0) * group, at = t0 * group * dim;
      const float *q = b.q.data() + at, *dout = b.dout.data() + at;
      small_gemm(rows, count, dim, q, dim, 1, b.keys.data(), kKeyBlock, weights, kKeyBlock, false);
      small_gemm(rows, count, dim, dout, dim, 1, b.values.data(), kKeyBlock, slopes, kKeyBlock, false);
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t seen = std::min(count, t0 + m / group + 1 - p0);
        const vf lse = splat(b.lse[size_t(t0 * group + m)]), delta = splat(b.delta[size_t(t0 * group + m)]);
        float *w = weights + m * kKeyBlock, *s = slopes + m * kKeyBlock;
        for (int64_t i = 0; i < seen; i += kLanes) {
          const int64_t left = seen - i;
          const vf p = exp(load_upto(w + i, left) - lse);
          store_upto(s + i, p * (load_upto(s + i, left) - delta), left);
          store_upto(w + i, p, left);
        }
        std::fill(w + seen, w + count, 0.0f);
        std::fill(s + seen, s + count, 0.0f);
      }
      small_gemm(count, dim, rows, weights, 1, kKeyBlock, dout, dim, b.dv.data() + p0 * dim, dim, true);
      small_gemm(rows, dim, count, slopes, kKeyBlock, 1, b.k.data() + p0 * dim, dim, b.dq.data() + at, dim, true);
      small_gemm(count, dim, rows, slopes, 1, kKeyBlock, q, dim, b.dk.data() + p0 * dim, dim, true);
    }
  }
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (q, k, v, cos, sin, lengths) -> (out, log-sum-exp (rows, heads, tokens))
COLORA_OPERATOR(causal_attention) {
  call.expect(6, 2);
  const Sequence s = read(call);
  const Tensor out = call.out(0, "out"), lse = call.out(1, "lse");
  out.expect_dtype("float32").expect_same_shape(call.in(0, "q"));
  check_lse(lse, s);
  if (s.rows == 0 || s.tokens == 0) return;
  const int64_t block = std::max<int64_t>(1, kQueryBlock / s.group), key_size = s.kv_heads * s.dim;
  std::vector<float> rotated(size_t(s.rows * s.tokens * key_size));
  std::vector<BlockScratch> scratches(size_t(colora::thread_count()), BlockScratch(block * s.group, s.dim));

  // Blocks of queries; those that see the most positions come first, so that no long one is left for the end.
  struct Block {
    const Segment* segment;
    int64_t first, count;
  };
  std::vector<Block> blocks;
  std::vector<int32_t> position(size_t(s.rows * s.tokens), -1);  // -1: padding
  for (const Segment& one : s.segments) {
    for (int64_t first = 0; first < one.length; first += block)
      blocks.push_back({&one, first, std::min(block, one.length - first)});
    for (int64_t i = 0; i < one.length; ++i) position[size_t(one.row * s.tokens + one.begin + i)] = int32_t(i);
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Block& a, const Block& b) { return a.first + a.count > b.first + b.count; });

  std::memset(out.raw, 0, size_t(out.size()) * sizeof(float));
  std::memset(lse.raw, 0, size_t(lse.size()) * sizeof(float));
  parallel_ranges(s.rows * s.tokens, 1, (1 << 14) / key_size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = position[size_t(i)];
      for (int64_t kv = 0; at >= 0 && kv < s.kv_heads; ++kv)
        rotate_head(s.k + (i * s.kv_heads + kv) * s.dim, s.cos + at * s.half, s.sin + at * s.half, s.half, 1.0f,
                    rotated.data() + (i * s.kv_heads + kv) * s.dim);
    }
  });
  parallel_tasks(int64_t(blocks.size()) * s.kv_heads, [&](int64_t i) {
    const Block& part = blocks[size_t(i / s.kv_heads)];
    const int64_t row = part.segment->row, begin = part.segment->begin, kv = i % s.kv_heads;
    BlockScratch& scratch = scratches[size_t(worker_index())];
    for (int64_t m = 0; m < part.count * s.group; ++m) {
      const int64_t at = part.first + m / s.group;
      rotate_head(s.q + s.query(row, begin + at, kv * s.group + m % s.group), s.cos + at * s.half, s.sin + at * s.half,
                  s.half, s.scale(), scratch.queries.data() + m * s.dim);
    }
    attend_block(scratch, part.count * s.group, s.group, part.first, s.dim, rotated.data() + s.key(row, begin, kv),
                 key_size, s.v + s.key(row, begin, kv), key_size);
    for (int64_t m = 0; m < part.count * s.group; ++m) {
      const int64_t token = begin + part.first + m / s.group, head = kv * s.group + m % s.group;
      std::memcpy(out.data<float>() + s.query(row, token, head), scratch.out.data() + m * s.dim,
                  size_t(s.dim) * sizeof(float));
      lse.data<float>()[(row * s.heads + head) * s.tokens + token] =
          scratch.top[size_t(m)] + std::log(scratch.mass[size_t(m)]);
    }
  });
}

// (q, k, v, cos, sin, lengths, out, lse, dout) -> (dq, dk, dv)
COLORA_OPERATOR(causal_attention_grad) {
  call.expect(9, 3);
  Sequence s = read(call);
  const Tensor q = call.in(0, "q"), k = call.in(1, "k"), out = call.in(6, "out"), lse = call.in(7, "lse"),
               dout = call.in(8, "dout"), dq = call.out(0, "dq"), dk = call.out(1, "dk"), dv = call.out(2, "dv");
  for (const Tensor* t : {&out, &dout, &dq}) t->expect_dtype("float32").expect_same_shape(q);
  for (const Tensor* t : {&dk, &dv}) t->expect_dtype("float32").expect_same_shape(k);
  check_lse(lse, s);
  if (s.rows == 0 || s.tokens == 0) return;
  std::stable_sort(s.segments.begin(), s.segments.end(),
                   [](const Segment& a, const Segment& b) { return a.length > b.length; });
  const int64_t tasks = int64_t(s.segments.size()) * s.kv_heads;
  std::vector<BackwardScratch> scratches;
  for (int i = 0; tasks > 0 && i < threads_for(tasks, 1); ++i)
    scratches.emplace_back(s.segments[0].length, s.group, s.dim);

  for (const Tensor* t : {&dq, &dk, &dv}) std::memset(t->raw, 0, size_t(t->size()) * sizeof(float));
  parallel_tasks(tasks, [&](int64_t task) {
    const Segment& one = s.segments[size_t(task / s.kv_heads)];
    const int64_t row = one.row, kv = task % s.kv_heads, dim = s.dim;
    BackwardScratch& b = scratches[size_t(worker_index())];
    for (int64_t i = 0; i < one.length; ++i) {
      const int64_t token = one.begin + i;
      const float *cos = s.cos + i * s.half, *sin = s.sin + i * s.half;
      rotate_head(s.k + s.key(row, token, kv), cos, sin, s.half, 1.0f, b.k.data() + i * dim);
      std::memcpy(b.v.data() + i * dim, s.v + s.key(row, token, kv), size_t(dim) * sizeof(float));
      for (int64_t g = 0; g < s.group; ++g) {
        const int64_t m = i * s.group + g, head = kv * s.group + g, at = s.query(row, token, head);
        rotate_head(s.q + at, cos, sin, s.half, s.scale(), b.q.data() + m * dim);
        std::memcpy(b.dout.data() + m * dim, dout.data<float>() + at, size_t(dim) * sizeof(float));
        b.delta[size_t(m)] = dot(out.data<float>() + at, dout.data<float>() + at, dim);
        b.lse[size_t(m)] = lse.data<float>()[(row * s.heads + head) * s.tokens + token];
      }
    }
    backward(b, one.length, s.group, dim);
    for (int64_t i = 0; i < one.length; ++i) {
      const int64_t token = one.begin + i;
      const float *cos = s.cos + i * s.half, *sin = s.sin + i * s.half;
      rotate_head_back(b.dk.data() + i * dim, cos, sin, s.half, 1.0f, dk.data<float>() + s.key(row, token, kv));
      std::memcpy(dv.data<float>() + s.key(row, token, kv), b.dv.data() + i * dim, size_t(dim) * sizeof(float));
      for (int64_t g = 0; g < s.group; ++g)
        rotate_head_back(b.dq.data() + (i * s.group + g) * dim, cos, sin, s.half, s.scale(),
                         dq.data<float>() + s.query(row, token, kv * s.group + g));
    }
  });
}
