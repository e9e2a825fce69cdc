// Consecutive decoder layers of the Llama family over the paged cache, for step.
#pragma once

#include "linear.h"
#include "norm.h"
#include "paged.h"
#include "swiglu.h"

namespace COLORA_ISA_NAMESPACE {

struct Norm {
  const float* weight = nullptr;
  float eps = 0;
  std::vector<float> buffer;  // of a bfloat16 weight
};

// A norm of n columns from its weight and its eps.
inline void read_norm(const colora::Tensor& weight, const colora::Tensor& eps, int64_t n, Norm& norm) {
  if (weight.absent()) weight.fail("is absent");
  weight.expect_dtype("float32", "bfloat16").expect_rank(1).expect_dim(0, n, "the normed axis");
  norm.eps = read_eps(eps);
  norm.weight = widened(weight, norm.buffer);
}

struct Layer {
  Norm before_attention, q_norm, k_norm, before_mlp;
  std::vector<Linear> qkv, o, gate_up, down;
  PagedSizes sizes;
  void *k_cache, *v_cache;
};

struct StackInputs {
  colora::Tensor slots, cos, sin;
  int64_t hidden;
};

inline colora::Tensor named(colora::Tensor tensor, LayerPart part) {
  tensor.name = name_of(part);
  return tensor;
}

inline void expect_outputs(LayerPart part, const Linear& l, int64_t n, const char* what) {
  if (l.out() != n)
    named(l.base.last, part).fail("has %lld outputs, expected %lld, %s", (long long)l.out(), (long long)n, what);
}

// All checks of one layer; nothing is computed before every layer has passed.
inline void read_layer(Reader& reader, const StackInputs& s, Layer& layer) {
  const LayerTensors tensors = read_layer_places(reader);
  const auto norm = [&](LayerPart part, int64_t n, Norm& to) {
    if (!tensors.has(part)) return;
    Reader r = tensors.at(part);
    const colora::Tensor weight = r.next(name_of(part));
    read_norm(weight, r.next("eps"), n, to);
  };
  const auto linear = [&](LayerPart part, int64_t in) {
    Reader r = tensors.at(part);
    return read_linear(r, in, s.slots);
  };
  norm(LayerPart::input_layernorm, s.hidden, layer.before_attention);
  for (const LayerPart part : {LayerPart::q_proj, LayerPart::k_proj, LayerPart::v_proj})
    layer.qkv.push_back(linear(part, s.hidden));
  const colora::Tensor k_cache = tensors.at(LayerPart::k_cache).next("k_cache"),
                       v_cache = tensors.at(LayerPart::v_cache).next("v_cache");
  const int64_t width = layer.qkv[0].out();
  layer.sizes = paged_sizes(k_cache, v_cache, s.cos, s.sin, width, named(layer.qkv[0].base.last, LayerPart::q_proj));
  for (int i = 1; i < 3; ++i)
    if (layer.qkv[size_t(i)].out() != layer.sizes.kv_heads * layer.sizes.dim)
      named(layer.qkv[1].base.last, LayerPart::k_proj)
          .fail("(or v_proj) has %lld outputs, expected kv_heads * head_dim = %lld as in k_cache",
                (long long)layer.qkv[size_t(i)].out(), (long long)(layer.sizes.kv_heads * layer.sizes.dim));
  norm(LayerPart::q_norm, layer.sizes.dim, layer.q_norm);
  norm(LayerPart::k_norm, layer.sizes.dim, layer.k_norm);
  layer.k_cache = k_cache.raw, layer.v_cache = v_cache.raw;
  layer.o.push_back(linear(LayerPart::o_proj, width));
  expect_outputs(LayerPart::o_proj, layer.o[0], s.hidden, "the last axis of x");
  norm(LayerPart::post_attention_layernorm, s.hidden, layer.before_mlp);
  for (const LayerPart part : {LayerPart::gate_proj, LayerPart::up_proj}) layer.gate_up.push_back(linear(part, s.hidden));
  const int64_t inner = layer.gate_up[0].out();
  expect_outputs(LayerPart::up_proj, layer.gate_up[1], inner, "the outputs of gate_proj");
  layer.down.push_back(linear(LayerPart::down_proj, inner));
  expect_outputs(LayerPart::down_proj, layer.down[0], s.hidden, "the last axis of x");
}

// RMS norm of every head, in place.
inline void norm_heads(const Norm& norm, int64_t heads, int64_t dim, float* x) {
  if (!norm.weight) return;
  parallel_ranges(heads, 1, kNormGrain / (dim + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) norm_row(x + h * dim, norm.weight, x + h * dim, dim, norm.eps);
  });
}

// Consecutive layers, read once a call and run any number of times.
class LayerStack {
 public:
  // Reads all layers that are left.
  LayerStack(Reader& reader, const StackInputs& inputs)
      : cos_(inputs.cos.data<float>()), sin_(inputs.sin.data<float>()), hidden_(inputs.hidden) {
    do {
      layers_.emplace_back();
      read_layer(reader, inputs, layers_.back());
      const Layer &first = layers_[0], &last = layers_.back();
      if (last.sizes.blocks != first.sizes.blocks)
        refuse_blocks(int64_t(layers_.size()) - 1, last.sizes.blocks, first.sizes.blocks);
    } while (reader.more());
    for (const Layer& l : layers_) {
      widths_[1] = widths_[4] = std::max(widths_[1], l.qkv[0].out());
      widths_[2] = widths_[3] = std::max(widths_[2], l.qkv[1].out());
      widths_[5] = widths_[6] = std::max(widths_[5], l.gate_up[0].out());
    }
    widths_[0] = hidden_;
  }

  int64_t blocks() const { return layers_[0].sizes.blocks; }

  // Copies a block of every layer's keys and values.
  void copy_block(int64_t source, int64_t target) const {
    for (const Layer& l : layers_)
      for (void* cache : {l.k_cache, l.v_cache}) {
        const size_t bytes = size_t(l.sizes.block_bytes());
        char* base = static_cast<char*>(cache);
        std::memcpy(base + size_t(target) * bytes, base + size_t(source) * bytes, bytes);
      }
  }

  // x, residual (tokens, hidden) -> out, the last layer's MLP, and sum, the residual stream before it. out and sum may be x
  // and residual. slots: those of the tokens.
  void run(RowSlots& slots, PagedAttention& attention, const float* x, const float* residual, float* out, float* sum) {
    const int64_t tokens = slots.tokens();
    if (tokens > reserved_) {
      for (int i = 0; i < kBuffers; ++i) memory_[i].resize(tokens * widths_[i]);
      reserved_ = tokens;
    }
    float *h = memory_[0].data(), *q = memory_[1].data(), *k = memory_[2].data(), *v = memory_[3].data(),
          *attended = memory_[4].data(), *gate = memory_[5].data(), *up = memory_[6].data();
    for (Layer& l : layers_) {
      const int64_t n = l.qkv[0].out(), mlp = l.gate_up[0].out(), dim = l.sizes.dim;
      add_norm_rows(x, residual, l.before_attention.weight, l.before_attention.eps, tokens, hidden_, sum, h, nullptr);
      l.qkv[0].y = q, l.qkv[1].y = k, l.qkv[2].y = v;
      run_linears(l.qkv, h, hidden_, slots);  // q (tokens, heads * dim), k and v (tokens, kv_heads * dim)
      norm_heads(l.q_norm, tokens * l.sizes.heads, dim, q);
      norm_heads(l.k_norm, tokens * l.sizes.kv_heads, dim, k);
      attention.run(l.sizes, q, k, v, cos_, sin_, l.k_cache, l.v_cache, attended);  // (tokens, heads * dim)
      l.o[0].y = out;
      run_linears(l.o, attended, n, slots);  // out (tokens, hidden)
      add_norm_rows(out, sum, l.before_mlp.weight, l.before_mlp.eps, tokens, hidden_, sum, h, nullptr);
      l.gate_up[0].y = gate, l.gate_up[1].y = up;
      run_linears(l.gate_up, h, hidden_, slots);  // gate, up (tokens, inner)
      swiglu_forward(gate, up, tokens * mlp, gate);
      l.down[0].y = out;
      run_linears(l.down, gate, mlp, slots);  // out (tokens, hidden)
      x = out, residual = sum;
    }
  }

 private:
  [[noreturn]] static void refuse_blocks(int64_t layer, int64_t blocks, int64_t wanted) {
    colora::refuse("step: layer %lld has a cache of %lld blocks, expected %lld as in the first layer", (long long)layer,
                   (long long)blocks, (long long)wanted);
  }
  static constexpr int kBuffers = 7;
  std::vector<Layer> layers_;
  const float *cos_, *sin_;
  int64_t hidden_, widths_[kBuffers] = {}, reserved_ = 0;
  AlignedFloats memory_[kBuffers];
};

}  // namespace COLORA_ISA_NAMESPACE
