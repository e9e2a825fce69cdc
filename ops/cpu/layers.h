// Consecutive decoder layers of the Llama family over a key/value cache, for decoder_layers and decode_steps.
#pragma once

#include "attention_cached.h"
#include "linear.h"
#include "norm.h"
#include "swiglu.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int kPerLayer = 52;  // tensors of one layer

struct Norm {
  const float* weight = nullptr;
  float eps = 0;
  std::vector<float> buffer;  // of a bfloat16 weight
};

inline void read_norm(const colora::Call& call, int at, const char* name, int64_t n, Norm& norm) {
  const colora::Tensor weight = call.in(at, name);
  if (weight.absent()) return;
  weight.expect_dtype("float32", "bfloat16").expect_rank(1).expect_dim(0, n, "the normed axis");
  norm.eps = read_eps(call.in(at + 1, "eps"));
  norm.weight = widened(weight, norm.buffer);
}

struct Layer {
  Norm before_attention, q_norm, k_norm, before_mlp;
  std::vector<Linear> qkv, o, gate_up, down;
  CachedSizes sizes;  // rows and tokens are those of the running call
  int64_t cache_total;
  void *k_cache, *v_cache;
  bool half_width;
};

struct StackInputs {
  colora::Tensor slots, cos, sin;
  int64_t hidden;
};

// A linear of a layer: the six operands of read_linear, or in the place of a weight a product of small matrices, which are
// then inner (r, in), outer (out, r) and core (r, r) or nothing, and take no adapters.
inline Linear read_product(const colora::Call& call, int at, const char* name, int64_t in, const colora::Tensor& slots) {
  const colora::Tensor inner = call.in(at + 3, "inner"), outer = call.in(at + 4, "outer"), core = call.in(at + 5, "core");
  if (!call.in(at, name).absent() || inner.absent() || outer.absent()) return read_linear(call, at, in, slots);
  Linear l;
  const auto add = [&](const colora::Tensor& factor, int64_t columns) {
    l.factors.emplace_back();
    l.factors.back().weight = weight_of(factor, call.in(at + 1, "weight_scale"), columns);
    return l.factors.back().weight.out;
  };
  const int64_t rank = add(inner, in);
  add(outer, core.absent() ? rank : add(core, rank));
  l.weight = l.factors.back().weight;
  l.factors.back().bias = read_bias(call.in(at + 2, "bias"), l.weight.out);
  return l;
}

inline void expect_outputs(const colora::Call& call, int at, const char* name, const Linear& l, int64_t n,
                           const char* what) {
  if (l.weight.out != n)
    call.in(at, name).fail("has %lld outputs, expected %lld, %s", (long long)l.weight.out, (long long)n, what);
}

// All checks of one layer; nothing is computed before every layer has passed.
inline void read_layer(const colora::Call& call, int at, const StackInputs& s, Layer& layer) {
  read_norm(call, at, "input_layernorm", s.hidden, layer.before_attention);
  if (!layer.before_attention.weight) call.in(at, "input_layernorm").fail("is absent");
  const char* const qkv[] = {"q_proj", "k_proj", "v_proj"};
  for (int i = 0; i < 3; ++i) layer.qkv.push_back(read_product(call, at + 2 + 6 * i, qkv[i], s.hidden, s.slots));
  const colora::Tensor k_cache = call.in(at + 24, "k_cache"), v_cache = call.in(at + 25, "v_cache"),
               q_weight = call.in(at + 2, "q_proj"), k_weight = call.in(at + 8, "k_proj");
  const int64_t width = layer.qkv[0].weight.out;
  layer.sizes = cached_sizes(k_cache, v_cache, s.cos, s.sin, 0, 0, width, q_weight);
  layer.cache_total = k_cache.dim(0);
  for (int i = 1; i < 3; ++i)
    if (layer.qkv[size_t(i)].weight.out != layer.sizes.kv_heads * layer.sizes.dim)
      k_weight.fail("(or v_proj) has %lld outputs, expected kv_heads * head_dim = %lld as in k_cache",
                    (long long)layer.qkv[size_t(i)].weight.out, (long long)(layer.sizes.kv_heads * layer.sizes.dim));
  read_norm(call, at + 20, "q_norm", layer.sizes.dim, layer.q_norm);
  read_norm(call, at + 22, "k_norm", layer.sizes.dim, layer.k_norm);
  layer.k_cache = k_cache.raw, layer.v_cache = v_cache.raw, layer.half_width = k_cache.is("bfloat16");
  layer.o.push_back(read_product(call, at + 26, "o_proj", width, s.slots));
  expect_outputs(call, at + 26, "o_proj", layer.o[0], s.hidden, "the last axis of x");
  read_norm(call, at + 32, "post_attention_layernorm", s.hidden, layer.before_mlp);
  if (!layer.before_mlp.weight) call.in(at + 32, "post_attention_layernorm").fail("is absent");
  const char* const gate_up[] = {"gate_proj", "up_proj"};
  for (int i = 0; i < 2; ++i)
    layer.gate_up.push_back(read_product(call, at + 34 + 6 * i, gate_up[i], s.hidden, s.slots));
  const int64_t inner = layer.gate_up[0].weight.out;
  expect_outputs(call, at + 40, "up_proj", layer.gate_up[1], inner, "the outputs of gate_proj");
  layer.down.push_back(read_product(call, at + 46, "down_proj", inner, s.slots));
  expect_outputs(call, at + 46, "down_proj", layer.down[0], s.hidden, "the last axis of x");
}

// RMS norm of every head, in place.
inline void norm_heads(const Norm& norm, int64_t heads, int64_t dim, float* x) {
  if (!norm.weight) return;
  parallel_ranges(heads, 1, kNormGrain / (dim + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) norm_row(x + h * dim, norm.weight, x + h * dim, dim, norm.eps);
  });
}

// What differs from call to call: rows of tokens, each an array entry a row. slots null: no adapters.
struct StackStep {
  int64_t rows, tokens;
  const int32_t *slots, *cache_rows, *start, *length;
};

// Consecutive layers, read from a call once and run any number of times.
class LayerStack {
 public:
  LayerStack(const colora::Call& call, int first, int count, const StackInputs& inputs)
      : cos_(inputs.cos.data<float>()), sin_(inputs.sin.data<float>()), hidden_(inputs.hidden) {
    layers_.resize(size_t(count));
    for (int i = 0; i < count; ++i) read_layer(call, first + i * kPerLayer, inputs, layers_[size_t(i)]);
    for (const Layer& l : layers_) {
      widths_[1] = widths_[4] = std::max(widths_[1], l.qkv[0].weight.out);
      widths_[2] = widths_[3] = std::max(widths_[2], l.qkv[1].weight.out);
      widths_[5] = widths_[6] = std::max(widths_[5], l.gate_up[0].weight.out);
    }
    widths_[0] = hidden_;
  }

  // Refuses rows and positions that a layer's cache does not have; see check_cache_rows.
  void check_rows(const colora::Tensor& cache_rows, const colora::Tensor& start, const colora::Tensor& length,
                  int64_t rows, int64_t tokens) const {
    int64_t total = -1, longest = -1;
    for (const Layer& l : layers_) {
      if (l.cache_total == total && l.sizes.max_len == longest) continue;
      total = l.cache_total, longest = l.sizes.max_len;
      check_cache_rows(cache_rows, start, length, rows, tokens, total, longest);
    }
  }

  // x, residual (rows, tokens, hidden) -> out, the last layer's MLP, and sum, the residual stream before it. out and sum
  // may be x and residual.
  void run(const StackStep& step, const float* x, const float* residual, float* out, float* sum) {
    const int64_t tokens = step.rows * step.tokens;
    if (tokens > reserved_) {
      for (int i = 0; i < kBuffers; ++i) memory_[i].resize(tokens * widths_[i]);
      reserved_ = tokens;
    }
    float *h = memory_[0].data(), *q = memory_[1].data(), *k = memory_[2].data(), *v = memory_[3].data(),
          *attended = memory_[4].data(), *gate = memory_[5].data(), *up = memory_[6].data();
    for (Layer& l : layers_) {
      const int64_t n = l.qkv[0].weight.out, mlp = l.gate_up[0].weight.out, dim = l.sizes.dim;
      l.sizes.rows = step.rows, l.sizes.tokens = step.tokens;
      add_norm_rows(x, residual, l.before_attention.weight, l.before_attention.eps, tokens, hidden_, sum, h, nullptr);
      l.qkv[0].y = q, l.qkv[1].y = k, l.qkv[2].y = v;
      run_linears(l.qkv, h, tokens, step.tokens, hidden_, step.slots);
      norm_heads(l.q_norm, tokens * l.sizes.heads, dim, q);
      norm_heads(l.k_norm, tokens * l.sizes.kv_heads, dim, k);
      attend_cached({l.sizes, q, k, v, cos_, sin_, step.cache_rows, step.start, step.length, attended}, l.k_cache,
                    l.v_cache, l.half_width);
      l.o[0].y = out;
      run_linears(l.o, attended, tokens, step.tokens, n, step.slots);
      add_norm_rows(out, sum, l.before_mlp.weight, l.before_mlp.eps, tokens, hidden_, sum, h, nullptr);
      l.gate_up[0].y = gate, l.gate_up[1].y = up;
      run_linears(l.gate_up, h, tokens, step.tokens, hidden_, step.slots);
      swiglu_forward(gate, up, tokens * mlp, gate);
      l.down[0].y = out;
      run_linears(l.down, gate, tokens, step.tokens, mlp, step.slots);
      x = out, residual = sum;
    }
  }

 private:
  static constexpr int kBuffers = 7;
  std::vector<Layer> layers_;
  const float *cos_, *sin_;
  int64_t hidden_, widths_[kBuffers] = {}, reserved_ = 0;
  AlignedFloats memory_[kBuffers];
};

}  // namespace COLORA_ISA_NAMESPACE
