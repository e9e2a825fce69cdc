// The second half of a layer: a gated MLP, or routed experts (arXiv 2101.03961, 2401.04088) with or without a shared one.
//
// Tokens are grouped by expert, so that each expert's weights are read once a step; a token's sum goes over its experts in
// ascending order, whoever its neighbours are.
#pragma once

#include "linear.h"
#include "norms.h"
#include "swiglu.h"

namespace COLORA_ISA_NAMESPACE {

// act(gate(x)) * up(x), then down.
struct GatedMlp {
  std::vector<Linear> gate_up, down;
  int64_t inner() const { return gate_up[0].out(); }
};

// x (tokens, in) -> out (tokens, in); gate and up: (tokens, inner) of scratch.
inline void run_gated(GatedMlp& mlp, Activation activation, const float* x, int64_t in, RowSlots& slots, float* gate,
                      float* up, float* out) {
  mlp.gate_up[0].y = gate, mlp.gate_up[1].y = up;
  run_linears(mlp.gate_up, x, in, slots);  // gate, up (tokens, inner)
  const int64_t numbers = slots.tokens() * mlp.inner();
  if (activation == Activation::silu)
    swiglu_forward(gate, up, numbers, gate);
  else
    geglu_forward(gate, up, numbers, gate);
  mlp.down[0].y = out;
  run_linears(mlp.down, gate, mlp.inner(), slots);
}

struct Experts {
  std::vector<Linear> router, shared_gate;  // (experts, hidden), (1, hidden)
  std::vector<GatedMlp> all;
  int64_t per_token = 0;
  bool normalised = false;
  int64_t widest() const {
    int64_t most = 0;
    for (const GatedMlp& one : all) most = std::max(most, one.inner());
    return most;
  }
};

// The choice of a step's tokens and the scratch for it.
class ExpertRun {
 public:
  // x (tokens, in) -> out (tokens, in), the weighted sum of each token's experts.
  void run(Experts& e, Activation activation, const float* x, int64_t in, RowSlots& slots, float* out) {
    const int64_t tokens = slots.tokens();
    choose(e, x, in, slots);
    std::fill(out, out + tokens * in, 0.0f);
    for (size_t number = 0; number < e.all.size(); ++number) {
      const std::vector<Share>& mine = shares_[number];
      if (mine.empty()) continue;
      const int64_t rows = int64_t(mine.size()), inner = e.all[number].inner();
      x_.resize(rows * in), y_.resize(rows * in), gate_.resize(rows * inner), up_.resize(rows * inner);
      row_slots_.resize(size_t(rows)), strengths_.resize(size_t(rows));
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t t = mine[size_t(i)].token;
        std::memcpy(x_.data() + i * in, x + t * in, size_t(in) * sizeof(float));
        if (slots.given()) row_slots_[size_t(i)] = slots.slot(t);
        strengths_[size_t(i)] = slots.strengths() ? slots.strengths()[t / slots.per_row()] : 1.0f;
      }
      own_.set(rows, 1, slots.given() ? row_slots_.data() : nullptr, slots.strengths() ? strengths_.data() : nullptr);
      run_gated(e.all[number], activation, x_.data(), in, own_, gate_.data(), up_.data(), y_.data());
      for (int64_t i = 0; i < rows; ++i) {
        float* to = out + mine[size_t(i)].token * in;
        const vf share = splat(mine[size_t(i)].share);
        for (int64_t d = 0; d < in; d += kLanes)
          store_upto(to + d, fma(load_upto(y_.data() + i * in + d, in - d), share, load_upto(to + d, in - d)), in - d);
      }
    }
  }

 private:
  struct Share {
    int64_t token;
    float share;
  };

  // softmax over all experts, the largest `per_token` of them, divided by their sum if that is asked for; of equal ones the
  // first.
  void choose(Experts& e, const float* x, int64_t in, RowSlots& slots) {
    const int64_t tokens = slots.tokens(), count = int64_t(e.all.size());
    scores_.resize(tokens * count);
    e.router[0].y = scores_.data();
    run_linears(e.router, x, in, slots);  // (tokens, experts)
    shares_.assign(size_t(count), {});
    std::vector<int64_t> order(static_cast<size_t>(count));
    for (int64_t t = 0; t < tokens; ++t) {
      float* p = scores_.data() + t * count;
      float highest = p[0], total = 0.0f, kept = 0.0f;
      for (int64_t i = 1; i < count; ++i) highest = std::max(highest, p[i]);
      for (int64_t i = 0; i < count; ++i) total += p[i] = std::exp(p[i] - highest);
      for (int64_t i = 0; i < count; ++i) order[size_t(i)] = i, p[i] /= total;
      std::partial_sort(order.begin(), order.begin() + e.per_token, order.end(),
                        [&](int64_t a, int64_t b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
      for (int64_t i = 0; i < e.per_token; ++i) kept += p[order[size_t(i)]];
      for (int64_t i = 0; i < e.per_token; ++i) {
        const int64_t expert = order[size_t(i)];
        shares_[size_t(expert)].push_back({t, e.normalised ? p[expert] / kept : p[expert]});
      }
    }
  }

  std::vector<std::vector<Share>> shares_;  // by expert, tokens ascending
  std::vector<int32_t> row_slots_;
  std::vector<float> strengths_;
  RowSlots own_;
  AlignedFloats scores_, x_, y_, gate_, up_;
};

// out += sigmoid(gate) * shared by rows; gate (rows,) logits, or null: 1.
inline void add_shared(const float* shared, const float* gate, int64_t rows, int64_t n, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const vf share = gate ? sigmoid(splat(gate[r])) : splat(1.0f);
    for (int64_t d = 0; d < n; d += kLanes) {
      const int64_t at = r * n + d;
      store_upto(out + at, fma(load_upto(shared + at, n - d), share, load_upto(out + at, n - d)), n - d);
    }
  }
}

}  // namespace COLORA_ISA_NAMESPACE
