// One decoder layer as step reads it from the table of weights: all checks are here, before anything is computed.
#pragma once

#include "feed_forward.h"
#include "paged.h"

namespace COLORA_ISA_NAMESPACE {

struct Layer {
  Norm before_attention, after_attention, q_norm, k_norm, before_mlp, after_mlp;
  bool whole_qk_norm = false, parallel = false;
  Activation activation = Activation::silu;
  float branch_factor = 1.0f;
  std::vector<Linear> qkv, o;
  std::vector<GatedMlp> mlp;  // the MLP, or beside routed experts the shared one; may be empty there
  std::vector<Experts> experts;
  PagedSizes sizes;
  std::vector<int32_t> order;  // of a head's channels, see channel_order
  const float *cos = nullptr, *sin = nullptr;  // null: no rotary
  void *k_cache, *v_cache;
};

struct StackInputs {
  colora::Tensor slots;
  std::vector<colora::Tensor> cos, sin;  // the model's pairs of tables, at least one
  int64_t hidden;
};

inline colora::Tensor named(colora::Tensor tensor, const char* name) {
  tensor.name = name;
  return tensor;
}
inline colora::Tensor named(colora::Tensor tensor, LayerPart part) { return named(tensor, name_of(part)); }

inline void expect_outputs(const char* name, const Linear& l, int64_t n, const char* what) {
  if (l.out() != n)
    named(l.base.last, name).fail("has %lld outputs, expected %lld, %s", (long long)l.out(), (long long)n, what);
}
inline void expect_outputs(LayerPart part, const Linear& l, int64_t n, const char* what) {
  expect_outputs(name_of(part), l, n, what);
}

class LayerReader {
 public:
  LayerReader(Reader& reader, const StackInputs& inputs, Layer& layer)
      : tensors_(read_layer_places(reader)), form_(tensors_.form), s_(inputs), layer_(layer) {
    kind_ = NormKind(form_.within(LayerWhole::norm, "norm", 0, int(NormKind::count) - 1));
    layer.whole_qk_norm = form_.within(LayerWhole::whole_qk_norm, "whole_qk_norm", 0, 1);
    layer.parallel = form_.within(LayerWhole::parallel, "parallel", 0, 1);
    layer.activation = Activation(form_.within(LayerWhole::activation, "activation", 0, int(Activation::count) - 1));
    layer.branch_factor = form_.positive(LayerReal::branch_factor, "branch_factor", false);
    norm(LayerPart::before_attention, s_.hidden, layer.before_attention);
    attention();
    norm(LayerPart::after_attention, s_.hidden, layer.after_attention);
    norm(LayerPart::before_mlp, s_.hidden, layer.before_mlp);
    norm(LayerPart::after_mlp, s_.hidden, layer.after_mlp);
    second_half();
  }

 private:
  using P = LayerPart;

  void norm(P part, int64_t n, Norm& to) const {
    if (!tensors_.has(part)) return;
    Reader r = tensors_.at(part);
    const colora::Tensor weight = r.next(name_of(part));
    read_norm(weight, r.next("eps"), n, kind_, to);
  }

  Linear linear(P part, int64_t in) const {
    if (!tensors_.has(part)) colora::refuse("step: a layer has no %s", name_of(part));
    Reader r = tensors_.at(part);
    return read_linear(r, in, s_.slots);
  }

  void attention() {
    for (const P part : {P::q_proj, P::k_proj, P::v_proj}) layer_.qkv.push_back(linear(part, s_.hidden));
    const colora::Tensor k_cache = tensors_.at(P::k_cache).next("k_cache"),
                         v_cache = tensors_.at(P::v_cache).next("v_cache");
    const int64_t width = layer_.qkv[0].out();
    const int64_t table = form_.within(LayerWhole::rotary_table, "rotary_table", -1, int64_t(s_.cos.size()) - 1);
    const size_t which = size_t(std::max<int64_t>(table, 0));
    PagedSizes& sizes = layer_.sizes;
    sizes = paged_sizes(k_cache, v_cache, s_.cos[which], s_.sin[which], width, named(layer_.qkv[0].base.last, P::q_proj));
    sizes.window = form_.within(LayerWhole::window, "window", 0, int64_t(1) << 30);
    sizes.cap = form_.positive(LayerReal::score_cap, "score_cap", true);
    const float factor = form_.positive(LayerReal::query_factor, "query_factor", true);
    if (factor > 0.0f) sizes.factor = factor;
    const int64_t turning = form_.within(LayerWhole::rotary_width, "rotary_width", 0, sizes.dim);
    if (turning % 2) colora::refuse("step: a layer's rotary_width is %lld, expected an even number", (long long)turning);
    if (table >= 0) {
      layer_.cos = s_.cos[which].data<float>(), layer_.sin = s_.sin[which].data<float>();
      layer_.order = channel_order(sizes.dim, turning, form_.within(LayerWhole::rotary_pairs, "rotary_pairs", 0, 1));
      sizes.order = layer_.order.empty() ? nullptr : layer_.order.data();
    }
    for (size_t i = 1; i < 3; ++i)
      if (layer_.qkv[i].out() != sizes.kv_heads * sizes.dim)
        named(layer_.qkv[1].base.last, P::k_proj)
            .fail("(or v_proj) has %lld outputs, expected kv_heads * head_dim = %lld as in k_cache",
                  (long long)layer_.qkv[i].out(), (long long)(sizes.kv_heads * sizes.dim));
    norm(P::q_norm, layer_.whole_qk_norm ? width : sizes.dim, layer_.q_norm);
    norm(P::k_norm, layer_.whole_qk_norm ? sizes.kv_heads * sizes.dim : sizes.dim, layer_.k_norm);
    layer_.k_cache = k_cache.raw, layer_.v_cache = v_cache.raw;
    layer_.o.push_back(linear(P::o_proj, width));
    expect_outputs(P::o_proj, layer_.o[0], s_.hidden, "the last axis of x");
  }

  void gate_and_up(GatedMlp& mlp, const Linear& gate, const Linear& up) const {
    mlp.gate_up = {gate, up};
    expect_outputs(P::up_proj, up, gate.out(), "the outputs of gate_proj");
  }

  void second_half() {
    const bool routed = tensors_.has(P::experts), dense = tensors_.has(P::gate_proj);
    if (tensors_.has(P::router) != routed)
      colora::refuse("step: a layer has %s, expected both or none", routed ? "experts and no router" : "a router and no experts");
    if (dense || !routed) {
      layer_.mlp.emplace_back();
      gate_and_up(layer_.mlp[0], linear(P::gate_proj, s_.hidden), linear(P::up_proj, s_.hidden));
      layer_.mlp[0].down.push_back(linear(P::down_proj, layer_.mlp[0].inner()));
      expect_outputs(P::down_proj, layer_.mlp[0].down[0], s_.hidden, "the last axis of x");
    }
    if (!routed) return;
    layer_.experts.emplace_back();
    Experts& e = layer_.experts[0];
    const int64_t count = form_[LayerWhole::experts];
    e.per_token = form_.within(LayerWhole::experts_per_token, "experts_per_token", 1, count);
    e.normalised = form_.within(LayerWhole::normalised, "normalised", 0, 1);
    e.router.push_back(linear(P::router, s_.hidden));
    expect_outputs(P::router, e.router[0], count, "one for each expert");
    if (tensors_.has(P::shared_gate)) {
      e.shared_gate.push_back(linear(P::shared_gate, s_.hidden));
      expect_outputs(P::shared_gate, e.shared_gate[0], 1, "the share of the shared expert");
    }
    Reader r = tensors_.at(P::experts);
    for (int64_t i = 0; i < count; ++i) {
      e.all.emplace_back();
      GatedMlp& one = e.all.back();
      const Linear gate = read_linear(r, s_.hidden, s_.slots);
      gate_and_up(one, gate, read_linear(r, s_.hidden, s_.slots));
      one.down.push_back(read_linear(r, one.inner(), s_.slots));
      expect_outputs("an expert's down_proj", one.down[0], s_.hidden, "the last axis of x");
    }
  }

  const LayerTensors tensors_;
  const LayerForm& form_;
  const StackInputs& s_;
  Layer& layer_;
  NormKind kind_;
};

}  // namespace COLORA_ISA_NAMESPACE
