// The scores of a request's rows together: what choose (select.h) and describe (details.h) share.
//
// With l_k the logits of row k, p_k = softmax(l_k) and w_k its weight, a token's score is
//
//   contrast      (1 + beta) l_0 - beta l_1            Contrastive LoRA Decoding, arXiv 2505.14620
//   log           sum of w_k l_k                       = sum of w_k log p_k but for a constant, which changes no choice
//   probability   log of the sum of w_k p_k
//
// A row of weight 0 is not read. A token that row 0 gives -infinity is out.
#pragma once

#include <cmath>
#include <string>

#include "sample.h"

namespace COLORA_ISA_NAMESPACE {

inline float highest_of(const float* x, int64_t n) {
  vf m = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) m = max(load(x + i), m);
  float highest = max_of(m);
  for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// log of the sum of exp(x); NaN where x holds NaN or no finite maximum.
inline double log_sum(const float* x, int64_t n) {
  const float highest = highest_of(x, n);
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, n - i);
    vf weight = exp(load_upto(x + i, left) - splat(highest));
    if (left < kLanes) {
      float lanes[kLanes];
      store(lanes, weight);
      std::fill(lanes + left, lanes + kLanes, 0.0f);
      weight = load(lanes);
    }
    total += sum(weight);
  }
  return double(highest) + std::log(total);
}

class Mixture {
 public:
  // logits: (rows, vocab).
  Mixture(const float* logits, int64_t vocab, const SelectOptions& o)
      : probability_(o.mixing == Mixing::probability), vocab_(vocab) {
    for (int k = 0; k < o.count; ++k) {
      const float weight = o.count == 1 ? 1.0f : o.weights[k];
      if (weight == 0.0f) continue;
      const float* row = logits + o.rows[k] * vocab;
      parts_[count_++] = {row, o.rows[k], weight, probability_ ? float(log_sum(row, vocab)) : 0.0f};
    }
    first_ = logits + o.rows[0] * vocab;
  }

  float operator()(int64_t i) const {
    if (!probability_) {
      float score = parts_[0].weight * parts_[0].row[i];
      for (int k = 1; k < count_; ++k) score = score + parts_[k].weight * parts_[k].row[i];
      return score;
    }
    float share = 0.0f;
    for (int k = 0; k < count_; ++k) share = share + parts_[k].weight * exp_one(parts_[k].row[i] - parts_[k].normaliser);
    return std::log(share);
  }

  // All scores (vocab,), -infinity for what row 0 rules out. Returns the place of one that is no number, or -1.
  int64_t all(float* scores) const {
    if (probability_) shares(scores);
    int64_t bad = -1;
    for (int64_t i = 0; i < vocab_; ++i) {
      const float score = probability_ ? std::log(scores[i]) : (*this)(i);
      scores[i] = first_[i] == -kInfinity ? -kInfinity : score;
      if (!(scores[i] < kInfinity)) bad = bad < 0 ? i : bad;
    }
    return bad;
  }

  // The row to blame for a score at token i that is not finite: the first one behind row 0 that is not finite there.
  int64_t culprit(int64_t i) const {
    for (int k = 0; k < count_; ++k)
      if (!std::isfinite(parts_[k].row[i])) return parts_[k].number;
    return parts_[count_ - 1].number;
  }

 private:
  // The sums of w_k p_k of all tokens, each by the operations of operator().
  void shares(float* to) const {
    for (int64_t i = 0; i < vocab_; i += kLanes) {
      vf share{};
      for (int k = 0; k < count_; ++k)
        share = share + splat(parts_[k].weight) * exp(load_upto(parts_[k].row + i, vocab_ - i) - splat(parts_[k].normaliser));
      store_upto(to + i, share, vocab_ - i);
    }
  }

  struct Part {
    const float* row;
    int64_t number;
    float weight, normaliser;
  };
  bool probability_;
  int64_t vocab_;
  int count_ = 0;
  const float* first_;
  Part parts_[kMostRows] = {};
};

inline std::string place_text(const char* what, int64_t row, int64_t token) {
  return std::string(what) + " in row " + std::to_string(row) +
         (token >= 0 ? " at token " + std::to_string(token) : "");
}

inline std::string overflow_text(const Mixture& mixture, int64_t token) {
  return place_text("argument 'logits' holds NaN or infinity (or their mixture overflows)", mixture.culprit(token), token);
}

}  // namespace COLORA_ISA_NAMESPACE
