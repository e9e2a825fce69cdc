// Log-probabilities of a choice, for requests that ask: of the chosen token in the mixture, of the best tokens there, and
// of the chosen token in each row. They are those before temperature, top-k, top-p and min-p: log softmax over the tokens
// that the cut leaves; a row's are over all tokens.
#pragma once

#include "mix.h"

namespace COLORA_ISA_NAMESPACE {

// tops: (kMostTop,) tokens, -1 behind the last; values: (kDetails,) the token's, those of `tops`, those of the rows (0 where
// there is nothing).
inline void describe(const float* logits, int64_t vocab, const SelectOptions& o, int64_t token, int32_t* tops, float* values) {
  std::fill(tops, tops + kMostTop, -1);
  std::fill(values, values + kDetails, 0.0f);
  const float* e = logits + o.rows[0] * vocab;
  std::vector<float> made;
  const float* scores = e;
  if (o.count > 1) {
    const Mixture mixture(logits, vocab, o);
    made.assign(size_t(vocab), -kInfinity);
    if (o.leads()) {
      const float cut = std::log(o.alpha) + highest_of(e, vocab);
      for (int64_t i = 0; i < vocab; ++i)
        if (e[i] >= cut && e[i] > -kInfinity) made[size_t(i)] = mixture(i);
    } else {
      mixture.all(made.data());
      if (o.cut == Cut::mixture) {
        const float cut = std::log(o.alpha) + highest_of(made.data(), vocab);
        for (float& score : made) score = score >= cut ? score : -kInfinity;
      }
    }
    scores = made.data();
  }
  const double normaliser = log_sum(scores, vocab);
  values[0] = float(double(scores[token]) - normaliser);
  const int64_t wanted = std::max<int64_t>(o.logprobs, 0);
  Candidate kept[kMostTop + 1];
  int64_t count = 0;
  for (int64_t i = 0; wanted > 0 && i < vocab; ++i) {
    const Candidate candidate{scores[i], int32_t(i), 0.0f};
    if (scores[i] == -kInfinity || (count == wanted && !better(candidate, kept[count - 1]))) continue;
    int64_t at = count < wanted ? count++ : count - 1;
    for (; at > 0 && better(candidate, kept[at - 1]); --at) kept[at] = kept[at - 1];
    kept[at] = candidate;
  }
  for (int64_t i = 0; i < count; ++i) {
    tops[i] = kept[i].token;
    values[1 + i] = float(double(kept[i].score) - normaliser);
  }
  for (int k = 0; o.voices && k < o.count; ++k) {
    const float* row = logits + o.rows[k] * vocab;
    values[1 + kMostTop + k] = float(double(row[token]) - log_sum(row, vocab));
  }
}

}  // namespace COLORA_ISA_NAMESPACE
