// Consecutive decoder layers over the paged cache, for step. What a layer looks like stands in its form (form.h).
#pragma once

#include "layer.h"

namespace COLORA_ISA_NAMESPACE {

// Consecutive layers, read once a call and run any number of times.
class LayerStack {
 public:
  // Reads all layers that are left.
  LayerStack(Reader& reader, const StackInputs& inputs) : hidden_(inputs.hidden) {
    do {
      layers_.emplace_back();
      LayerReader(reader, inputs, layers_.back());
      const Layer &first = layers_[0], &last = layers_.back();
      if (last.sizes.blocks != first.sizes.blocks)
        refuse_blocks(int64_t(layers_.size()) - 1, last.sizes.blocks, first.sizes.blocks);
    } while (reader.more());
    for (const Layer& l : layers_) {
      widths_[1] = widths_[4] = std::max(widths_[1], l.qkv[0].out());
      widths_[2] = widths_[3] = std::max(widths_[2], l.qkv[1].out());
      if (!l.mlp.empty()) widths_[5] = widths_[6] = std::max(widths_[5], l.mlp[0].inner());
      if (l.parallel || (!l.experts.empty() && !l.mlp.empty())) widths_[7] = hidden_;
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
    for (Layer& l : layers_) {
      float *h = memory_[0].data(), *more = memory_[7].data();
      const float* read = enter(l.before_attention, x, residual, tokens, hidden_, sum, h);
      attend(l, slots, attention, read, out);  // out (tokens, hidden)
      leave(l.after_attention, l.branch_factor, tokens, hidden_, out);
      if (l.parallel) {
        second_half(l, slots, read, more);
        leave(l.after_mlp, l.branch_factor, tokens, hidden_, more);
        enter(Norm(), out, more, tokens, hidden_, out, nullptr);
      } else {
        read = enter(l.before_mlp, out, sum, tokens, hidden_, sum, h);
        second_half(l, slots, read, out);
        leave(l.after_mlp, l.branch_factor, tokens, hidden_, out);
      }
      x = out, residual = sum;
    }
  }

 private:
  void attend(Layer& l, RowSlots& slots, PagedAttention& attention, const float* x, float* out) {
    const int64_t tokens = slots.tokens(), n = l.qkv[0].out();
    float *q = memory_[1].data(), *k = memory_[2].data(), *v = memory_[3].data(), *attended = memory_[4].data();
    l.qkv[0].y = q, l.qkv[1].y = k, l.qkv[2].y = v;
    run_linears(l.qkv, x, hidden_, slots);  // q (tokens, heads * dim), k and v (tokens, kv_heads * dim)
    const bool whole = l.whole_qk_norm;
    norm_pieces(l.q_norm, whole ? tokens : tokens * l.sizes.heads, whole ? n : l.sizes.dim, q);
    norm_pieces(l.k_norm, whole ? tokens : tokens * l.sizes.kv_heads, whole ? l.qkv[1].out() : l.sizes.dim, k);
    attention.run(l.sizes, q, k, v, l.cos, l.sin, l.k_cache, l.v_cache, attended);  // (tokens, heads * dim)
    l.o[0].y = out;
    run_linears(l.o, attended, n, slots);
  }

  // x may not be out.
  void second_half(Layer& l, RowSlots& slots, const float* x, float* out) {
    float *gate = memory_[5].data(), *up = memory_[6].data(), *shared = memory_[7].data();
    if (l.experts.empty()) return run_gated(l.mlp[0], l.activation, x, hidden_, slots, gate, up, out);
    Experts& e = l.experts[0];
    experts_.run(e, l.activation, x, hidden_, slots, out);
    if (l.mlp.empty()) return;
    run_gated(l.mlp[0], l.activation, x, hidden_, slots, gate, up, shared);
    if (!e.shared_gate.empty()) {
      shares_.resize(slots.tokens());
      e.shared_gate[0].y = shares_.data();
      run_linears(e.shared_gate, x, hidden_, slots);  // (tokens, 1)
    }
    add_shared(shared, e.shared_gate.empty() ? nullptr : shares_.data(), slots.tokens(), hidden_, out);
  }

  [[noreturn]] static void refuse_blocks(int64_t layer, int64_t blocks, int64_t wanted) {
    colora::refuse("step: layer %lld has a cache of %lld blocks, expected %lld as in the first layer", (long long)layer,
                   (long long)blocks, (long long)wanted);
  }
  static constexpr int kBuffers = 8;
  std::vector<Layer> layers_;
  int64_t hidden_, widths_[kBuffers] = {}, reserved_ = 0;
  AlignedFloats memory_[kBuffers], shares_;
  ExpertRun experts_;
};

}  // namespace COLORA_ISA_NAMESPACE
