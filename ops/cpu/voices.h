// What a request's rows do at one iteration of step, from the logits of the first one on: adjustments, the logits
// of the others where only survivors of the cut are needed, the contrast's strength, the choice and its details.
#pragma once

#include "adjust.h"
#include "contrast.h"
#include "details.h"
#include "linear.h"
#include "norms.h"
#include "select.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int64_t kFewBlocks = 8;  // the head of rows behind a leading one is multiplied as a whole beyond this share

struct Voices {
  SelectOptions select;
  StrengthOptions strength;
  Adjustment adjustment;
  int64_t at[kMostRows] = {};  // rows of this step's logits
  bool whole = false;          // the logits of rows behind the first one are computed for every token
  int32_t previous = -1;
  float logit_cap = 0;  // 0, or c of c * tanh(logit / c)

  // Whether rows behind the first one need all logits; `head` adds adapters, slots: of the batch's rows.
  void settle(const Linear& head, const int32_t* slots) {
    whole = head.base.product() || !regular_groups(head.base.matrix()) || !select.leads() ||
            select.mixing == Mixing::probability || select.voices;
    for (int k = 1; k < select.count; ++k) whole |= head.adapters.present() && slots[select.rows[k]] >= 0;
  }
  // The strength of a contrast; the prompt is set behind.
  void adapt(const Options& options, int64_t r) {
    strength.alpha = select.alpha, strength.beta = select.beta, strength.mode = checked_mode(options, r);
    whole |= (strength.mode & ~kSkipCopies) == kDivergence;
  }
};

inline Weight rows_of(Weight w, int64_t begin, int64_t end) {
  w.data = w.row(begin);
  if (w.scale) w.scale += begin * w.groups * w.layout().scale_numbers;
  w.out = end - begin;
  return w;
}

// The logits of the rows behind a leading one at the survivors of its cut, in whole blocks of outputs.
inline void survivors_logits(const Voices& q, const Base& head, const float* h, float* logits) {
  const Weight& w = head.matrix();
  const float* e = logits + q.at[0] * w.out;
  const float cut = std::log(q.select.alpha) + highest_of(e, w.out);
  std::vector<int64_t> blocks;
  for (int64_t o = 0; o < w.out; ++o) {
    if (!(e[o] >= cut)) continue;
    blocks.push_back(o / kOuts * kOuts);
    o = blocks.back() + kOuts - 1;
  }
  if (int64_t(blocks.size()) * kOuts * kFewBlocks > w.out) blocks.assign(1, -1);
  const float* bias = head.bias;
  RowSlots alone;
  alone.set(1, 1, nullptr);
  std::vector<float> gathered(size_t(head.order ? w.in : 0));
  for (int k = 1; k < q.select.count; ++k) {
    const float* x = h + q.at[k] * w.in;
    if (head.order) {
      gather_columns(x, 1, w.in, head.order, gathered.data());
      x = gathered.data();
    }
    for (const int64_t o : blocks) {
      Product part;
      part.weight = o < 0 ? w : rows_of(w, o, std::min(w.out, o + kOuts));
      part.bias = bias ? bias + std::max<int64_t>(o, 0) : nullptr;
      part.y = logits + q.at[k] * w.out + std::max<int64_t>(o, 0);
      run_group({&part}, x, w.in, x, w.in, alone);
      if (q.logit_cap > 0.0f) cap_range(part.y, part.weight.out, q.logit_cap);
    }
  }
}

// h: (rows, in), what the head reads; logits: (rows, vocab), changed in place. tops, details: see details.h.
inline Choice choose_one(const Voices& q, const Base& head, const float* h, float* logits, int32_t* tops, float* details) {
  const int64_t vocab = head.out();
  SelectOptions o = q.select;
  std::copy(q.at, q.at + o.count, o.rows);
  const auto adjust = [&](int k) {
    if (q.adjustment.any()) q.adjustment.apply(logits + q.at[k] * vocab, vocab);
  };
  adjust(0);
  if (o.count > 1 && !q.whole) survivors_logits(q, head, h, logits);
  for (int k = 1; k < o.count; ++k) adjust(k);
  StrengthOptions s = q.strength;
  if (o.contrast() && s.mode && s.beta > 0.0f) {
    s.expert = q.at[0], s.amateur = q.at[1], s.previous = q.previous;
    o.contrast_by(s.beta * strength_share(logits, vocab, s));
  }
  const Choice choice = choose(logits, vocab, o);
  if (o.details() && choice.error.empty()) describe(logits, vocab, o, choice.token, tops, details);
  return choice;
}

}  // namespace COLORA_ISA_NAMESPACE
