// linear_cross_entropy: the loss of a language model's head with the gradient of its input, without a (tokens, vocab)
// matrix (the idea of Cut Cross-Entropy, arXiv 2411.09009), its weight gradient, and the per-token losses alone.
//
// Tokens with a label go through in blocks; for each, the vocabulary goes through in chunks. The logits of a block are
// kept transposed, (vocab, block), so that the weight's rows are read as they lie. Chunk borders are fixed, and sums
// over chunks run in ascending order: the same result for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "operands.h"
#include "parallel.h"
#include "products.h"
#include "small_gemm.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

constexpr int32_t kIgnored = -100;
constexpr int64_t kChunk = 128;    // rows of the weight of one task
constexpr int64_t kDepth = 320;    // part of hidden_size that a panel of hidden states in the L1/L2 cache covers
constexpr int64_t kScratch = 16 << 20;  // floats for the logits of a block

struct Head {
  int64_t tokens, hidden, vocab;
  const float* x;
  Weight weight;
  const int32_t* labels;
  std::vector<int64_t> active;  // tokens with a label

  // Rows [v, v + rows), columns [c, c + columns) of the weight as float32: in place, or widened into `buffer`.
  const float* rows(int64_t v, int64_t count, int64_t c, int64_t columns, float* buffer, int64_t* stride) const {
    if (in_place()) {
      *stride = hidden;
      return weight.f32() + v * hidden + c;
    }
    for (int64_t r = 0; r < count; ++r) read_columns(weight, v + r, c, c + columns, buffer + r * columns);
    *stride = columns;
    return buffer;
  }
  bool in_place() const { return weight.format == Format::kFloat32; }
  int64_t chunks() const { return (vocab + kChunk - 1) / kChunk; }
  // Tokens of a block: many enough that reading the weight costs little beside the product, and blocks of like size.
  int64_t block(bool keep_logits) const {
    const int64_t fit = keep_logits ? kScratch / vocab / 32 * 32 : 128, most = std::clamp<int64_t>(fit, 32, 128);
    const int64_t count = std::max<int64_t>(1, int64_t(active.size())), blocks = (count + most - 1) / most;
    return (count + blocks - 1) / blocks;
  }
};

// hidden, labels and the tensors of the weight as a linear's base, its tag first.
Head read(Reader& reader) {
  const Tensor hidden = reader.next("hidden"), labels = reader.next("labels");
  hidden.expect_dtype("float32").expect_rank(2);
  labels.expect_dtype("int32").expect_rank(1).expect_dim(0, hidden.dim(0), "tokens, as in hidden");
  const Base base = read_base(reader, Tag::of(reader.next("weight's tag")), hidden.dim(1));
  if (base.product() || base.bias) base.last.fail("is a factor of a product or has a bias, expected one matrix");
  if (base.order) base.last.fail("has columns in an order of its own, which this loss does not take");
  Head h{hidden.dim(0), hidden.dim(1), base.out(), hidden.data<float>(), base.matrix(), labels.data<int32_t>(), {}};
  if (h.hidden < 1 || h.vocab < 1)
    base.last.fail("has shape %s, expected (vocab, hidden_size) of at least (1, 1)", base.last.shape_text().c_str());
  for (int64_t n = 0; n < h.tokens; ++n) {
    const int32_t label = h.labels[n];
    if (label == kIgnored) continue;
    if (label < 0 || label >= h.vocab)
      labels.fail("holds %d at index %lld, expected -100 (ignored) or 0 to %lld", int(label), (long long)n,
                  (long long)h.vocab - 1);
    h.active.push_back(n);
  }
  return h;
}

// The hidden states of a block of tokens, transposed: (hidden, stride), zeros in the missing columns.
void gather_transposed(const Head& h, int64_t first, int64_t count, int64_t stride, float* out) {
  for (int64_t i = 0; i < h.hidden; ++i) std::fill(out + i * stride + count, out + (i + 1) * stride, 0.0f);
  for (int64_t j = 0; j < count; ++j)
    transpose(h.x + h.active[size_t(first + j)] * h.hidden, 1, h.hidden, h.hidden, out + j, stride);
}

// Logits of `count` vocabulary rows from v on, (count, stride), for the block in `xt`, `used` columns of it.
void chunk_logits(const Head& h, const float* xt, int64_t stride, int64_t used, int64_t v, int64_t count,
                  float* buffer, float* logits) {
  int64_t row;
  const float* w = h.rows(v, count, 0, h.hidden, buffer, &row);
  for (int64_t k = 0; k < h.hidden; k += kDepth)
    small_gemm(count, used, std::min(kDepth, h.hidden - k), w + k, row, 1, xt + k * stride, stride, logits, stride,
               k > 0);
}

struct Work {
  std::vector<float> xt, logits, top, mass, at_label, buffers, lse;
  int64_t stride, logits_size, buffer_size;
  Work(const Head& h, int64_t block, bool keep_logits) : stride((block + 15) / 16 * 16) {
    const size_t threads = size_t(colora::thread_count());
    // An odd number of cache lines a row: a column of logits then spreads over all sets of the L1 cache.
    if (stride / 16 % 2 == 0) stride += 16;
    logits_size = kChunk * stride;
    buffer_size = kChunk * h.hidden;
    xt.resize(size_t(h.hidden * stride));
    logits.resize(keep_logits ? size_t(h.vocab * stride) : size_t(logits_size) * threads);
    top.resize(size_t(h.chunks() * stride));
    mass.resize(top.size());
    at_label.resize(size_t(stride));
    lse.resize(size_t(stride));
    if (!h.in_place()) buffers.resize(size_t(buffer_size) * threads);
  }
  float* buffer() { return buffers.empty() ? nullptr : buffers.data() + worker_index() * buffer_size; }
};

// The log-sum-exp and the label's logit of a block of tokens. With `keep`, w.logits holds exp(logit - chunk maximum).
void block_statistics(const Head& h, Work& w, int64_t first, int64_t count, bool keep) {
  const int64_t stride = w.stride, used = (count + kLanes - 1) / kLanes * kLanes;
  gather_transposed(h, first, count, stride, w.xt.data());
  parallel_tasks(h.chunks(), [&](int64_t c) {
    const int64_t v0 = c * kChunk, rows = std::min(kChunk, h.vocab - v0);
    float* logits = w.logits.data() + (keep ? v0 * stride : worker_index() * w.logits_size);
    chunk_logits(h, w.xt.data(), stride, used, v0, rows, w.buffer(), logits);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t label = h.labels[h.active[size_t(first + j)]];
      if (label >= v0 && label < v0 + rows) w.at_label[size_t(j)] = logits[(label - v0) * stride + j];
    }
    for (int64_t j = 0; j < used; j += kLanes) {
      vf top = load(logits + j), sum{};
      for (int64_t r = 1; r < rows; ++r) top = max(load(logits + r * stride + j), top);
      for (int64_t r = 0; r < rows; ++r) {
        const vf value = exp(load(logits + r * stride + j) - top);
        store(logits + r * stride + j, value);
        sum = sum + value;
      }
      store(w.top.data() + c * stride + j, top);
      store(w.mass.data() + c * stride + j, sum);
    }
  });
  for (int64_t j = 0; j < count; ++j) {
    float top = w.top[size_t(j)];
    for (int64_t c = 1; c < h.chunks(); ++c) top = std::max(top, w.top[size_t(c * stride + j)]);
    double sum = 0.0;
    for (int64_t c = 0; c < h.chunks(); ++c)
      sum += double(w.mass[size_t(c * stride + j)]) * exp_one(w.top[size_t(c * stride + j)] - top);
    w.lse[size_t(j)] = top + float(std::log(sum));
  }
}

// Columns of the hidden states' gradient that one task computes. Every task reads all logits of the block, so there are
// no more tasks than threads, unless their part of the weight would not fit into the L2 cache.
int64_t share_columns(const Head& h) {
  const int64_t share = (h.hidden + colora::thread_count() - 1) / colora::thread_count();
  return std::clamp<int64_t>((share + 31) / 32 * 32, 32, 512);
}

// Rows of `dx` (hidden,) for the block's tokens: sum over v of softmax[v] * weight[v] - weight[label].
void block_gradient(const Head& h, Work& w, int64_t first, int64_t count, float* dx, float* block_dx, float* buffers) {
  const int64_t stride = w.stride, used = (count + kLanes - 1) / kLanes * kLanes;
  parallel_tasks(h.chunks(), [&](int64_t c) {
    const int64_t v0 = c * kChunk, rows = std::min(kChunk, h.vocab - v0);
    for (int64_t j = 0; j < used; j += kLanes) {
      const vf share = exp(load(w.top.data() + c * stride + j) - load(w.lse.data() + j));
      for (int64_t r = v0; r < v0 + rows; ++r) {
        float* value = w.logits.data() + r * stride + j;
        store(value, load(value) * share);
      }
    }
  });
  const int64_t share = share_columns(h);
  parallel_tasks((h.hidden + share - 1) / share, [&](int64_t task) {
    const int64_t i = task * share, columns = std::min(share, h.hidden - i);
    float* buffer = buffers ? buffers + worker_index() * 2 * kChunk * share : nullptr;
    for (int64_t v = 0; v < h.vocab; v += 2 * kChunk) {
      const int64_t rows = std::min(2 * kChunk, h.vocab - v);
      int64_t row;
      const float* weight = h.rows(v, rows, i, columns, buffer, &row);
      small_gemm(count, columns, rows, w.logits.data() + v * stride, 1, stride, weight, row, block_dx + i, h.hidden,
                 v > 0);
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t token = h.active[size_t(first + j)];
      int64_t row;
      const float* weight = h.rows(h.labels[token], 1, i, columns, buffer, &row);
      for (int64_t k = 0; k < columns; k += kLanes)
        store_upto(dx + token * h.hidden + i + k,
                   load_upto(block_dx + j * h.hidden + i + k, columns - k) - load_upto(weight + k, columns - k),
                   columns - k);
    }
  });
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (hidden, labels, base) -> (loss_sum (1,), count (1,), dhidden, lse (tokens,), losses (tokens,))
// An ignored token has 0 in the last three.
COLORA_OPERATOR(linear_cross_entropy) {
  Reader reader(call, 0, 5);
  const Head h = read(reader);
  call.expect(reader.at(), 5);
  const Tensor loss_sum = call.out(0, "loss_sum"), count = call.out(1, "count"), dhidden = call.out(2, "dhidden"),
               lse = call.out(3, "lse"), losses = call.out(4, "losses");
  for (const Tensor* t : {&loss_sum, &count}) {
    t->expect_dtype("float32");
    if (t->size() != 1) t->fail("has shape %s, expected one element", t->shape_text().c_str());
  }
  dhidden.expect_dtype("float32").expect_same_shape(call.in(0, "hidden"));
  for (const Tensor* t : {&lse, &losses})
    t->expect_dtype("float32").expect_rank(1).expect_dim(0, h.tokens, "tokens, as in hidden");
  const int64_t block = h.block(true), active = int64_t(h.active.size());
  Work w(h, active ? block : 0, active > 0);
  std::vector<float> block_dx(size_t(block * h.hidden));
  std::vector<float> buffers(h.in_place() ? 0 : size_t(colora::thread_count() * 2 * kChunk * share_columns(h)));

  std::fill_n(dhidden.data<float>(), dhidden.size(), 0.0f);
  std::fill_n(lse.data<float>(), lse.size(), 0.0f);
  std::fill_n(losses.data<float>(), losses.size(), 0.0f);
  double total = 0.0;
  for (int64_t first = 0; first < active; first += block) {
    const int64_t n = std::min(block, active - first);
    block_statistics(h, w, first, n, true);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t token = h.active[size_t(first + j)];
      const float loss = w.lse[size_t(j)] - w.at_label[size_t(j)];
      lse.data<float>()[token] = w.lse[size_t(j)];
      losses.data<float>()[token] = loss;
      total += double(loss);
    }
    block_gradient(h, w, first, n, dhidden.data<float>(), block_dx.data(), buffers.empty() ? nullptr : buffers.data());
  }
  *loss_sum.data<float>() = float(total);
  *count.data<float>() = float(active);
}

// (hidden, labels, base) -> losses (tokens,); 0 for ignored tokens
COLORA_OPERATOR(linear_token_losses) {
  Reader reader(call, 0, 1);
  const Head h = read(reader);
  call.expect(reader.at(), 1);
  const Tensor losses = call.out(0, "losses");
  losses.expect_dtype("float32").expect_rank(1).expect_dim(0, h.tokens, "tokens, as in hidden");
  const int64_t block = h.block(false), active = int64_t(h.active.size());
  Work w(h, block, false);
  std::fill_n(losses.data<float>(), h.tokens, 0.0f);
  for (int64_t first = 0; first < active; first += block) {
    const int64_t n = std::min(block, active - first);
    block_statistics(h, w, first, n, false);
    for (int64_t j = 0; j < n; ++j)
      losses.data<float>()[h.active[size_t(first + j)]] = w.lse[size_t(j)] - w.at_label[size_t(j)];
  }
}

// (hidden, labels, base, lse, share (tokens,)) -> d sum(share * losses) / d weight (vocab, hidden) float32
COLORA_OPERATOR(linear_cross_entropy_weight_grad) {
  Reader reader(call, 0, 1);
  const Head h = read(reader);
  const Tensor lse = reader.next("lse"), share = reader.next("share");
  call.expect(reader.at(), 1);
  const Tensor dweight = call.out(0, "dweight");
  for (const Tensor* t : {&lse, &share})
    t->expect_dtype("float32").expect_rank(1).expect_dim(0, h.tokens, "tokens, as in hidden");
  dweight.expect_dtype("float32").expect_rank(2).expect_dim(0, h.vocab, "the rows of weight");
  dweight.expect_dim(1, h.hidden, "hidden_size, as in hidden");
  const int64_t block = h.block(false), active = int64_t(h.active.size());
  Work w(h, block, false);
  std::vector<float> x(size_t(block * h.hidden));

  std::fill_n(dweight.data<float>(), dweight.size(), 0.0f);
  for (int64_t first = 0; first < active; first += block) {
    const int64_t n = std::min(block, active - first), stride = w.stride;
    gather_transposed(h, first, n, stride, w.xt.data());
    std::fill(w.lse.begin(), w.lse.end(), 0.0f);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t token = h.active[size_t(first + j)];
      w.lse[size_t(j)] = lse.data<float>()[token];
      const float times = share.data<float>()[token];
      for (int64_t i = 0; i < h.hidden; ++i) x[size_t(j * h.hidden + i)] = times * h.x[token * h.hidden + i];
    }
    parallel_tasks(h.chunks(), [&](int64_t c) {
      const int64_t v0 = c * kChunk, rows = std::min(kChunk, h.vocab - v0);
      float* logits = w.logits.data() + worker_index() * w.logits_size;
      chunk_logits(h, w.xt.data(), stride, stride, v0, rows, w.buffer(), logits);
      for (int64_t i = 0; i < rows * stride; i += kLanes)
        store(logits + i, exp(load(logits + i) - load(w.lse.data() + i % stride)));
      for (int64_t j = 0; j < n; ++j) {
        const int64_t label = h.labels[h.active[size_t(first + j)]];
        if (label >= v0 && label < v0 + rows) logits[(label - v0) * stride + j] -= 1.0f;
      }
      small_gemm(rows, h.hidden, n, logits, stride, 1, x.data(), h.hidden, dweight.data<float>() + v0 * h.hidden,
                 h.hidden, true);
    });
  }
}
