// The next token of one request from the logits rows of its voices, by argmax or sampling: what contrastive_select and
// step share. The order is: cut, mixture (mix.h), temperature, top-k, top-p, min-p (sample.h); penalties, bias and
// masks were put into the logits before (adjust.h).
//
// The leading row is read once for its maximum, in blocks whose maxima are kept; where it leads, the second pass visits
// only the blocks that hold a survivor of its cut, and the other rows are read at the survivors alone. Argmax sorts
// nothing.
#pragma once

#include "mix.h"

namespace COLORA_ISA_NAMESPACE {

struct Choice {
  int64_t token = 0, favourite = 0, valid = 0;
  float expert = 0, amateur = 0, score = 0, highest = 0;
  std::string error;

  // ints: token, favourite, number of valid tokens; floats: the token's logits in the first two rows, its score, the
  // highest logit of the first row.
  void write(int32_t* ints, float* floats) const {
    ints[0] = int32_t(token), ints[1] = int32_t(favourite), ints[2] = int32_t(valid);
    floats[0] = expert, floats[1] = amateur, floats[2] = score, floats[3] = highest;
  }
};

// The best of all scores, or a draw among those of at least `cut` (-infinity: no cut).
inline Candidate pick(const float* scores, int64_t vocab, const std::vector<float>& maxima, float highest, float cut,
                      const SelectOptions& o) {
  if (!(o.temperature > 0.0f)) {
    int64_t best = (std::find(maxima.begin(), maxima.end(), highest) - maxima.begin()) * kSelectBlock;
    while (scores[best] != highest) ++best;
    return {highest, int32_t(best), 0.0f};
  }
  if (cut == -kInfinity) return sample_plain(scores, vocab, maxima, highest, o);
  std::vector<Candidate> candidates;
  for (int64_t i = 0; i < vocab; ++i)
    if (scores[i] >= cut) candidates.push_back({scores[i], int32_t(i), 0.0f});
  return sample(candidates, o);
}

// A choice by the scores of all tokens: of a mixture that cuts by itself, or not at all.
inline Candidate choose_by_all(const Mixture& mixture, int64_t vocab, const SelectOptions& o, Choice& choice) {
  std::vector<float> scores(static_cast<size_t>(vocab)), maxima(size_t((vocab + kSelectBlock - 1) / kSelectBlock));
  const int64_t bad = mixture.all(scores.data());
  if (bad >= 0) {
    choice.error = overflow_text(mixture, bad);
    return {};
  }
  block_maxima(scores.data(), vocab, maxima.data());
  const float highest = *std::max_element(maxima.begin(), maxima.end());
  if (!std::isfinite(highest)) {
    choice.error = "argument 'logits' leaves no token that its rows together allow";
    return {};
  }
  const float cut = o.cut == Cut::mixture ? std::log(o.alpha) + highest : -kInfinity;
  for (const float score : scores) choice.valid += score > -kInfinity && score >= cut;
  return pick(scores.data(), vocab, maxima, highest, cut, o);
}

inline Choice choose(const float* logits, int64_t vocab, const SelectOptions& o) {
  Choice choice;
  const float* e = logits + o.rows[0] * vocab;
  std::vector<float> maxima(size_t((vocab + kSelectBlock - 1) / kSelectBlock));
  if (!block_maxima(e, vocab, maxima.data())) {
    choice.error = place_text("argument 'logits' holds NaN", o.rows[0], -1);
    return choice;
  }
  const size_t block = size_t(std::max_element(maxima.begin(), maxima.end()) - maxima.begin());
  const float highest = maxima[block];
  if (!std::isfinite(highest)) {
    choice.error = place_text(highest > 0 ? "argument 'logits' holds infinity" : "argument 'logits' holds only -infinity",
                        o.rows[0], -1);
    return choice;
  }
  int64_t favourite = int64_t(block) * kSelectBlock;
  while (e[favourite] != highest) ++favourite;
  choice.favourite = favourite;
  choice.highest = highest;

  Candidate best{-kInfinity, -1, 0.0f};
  if (o.count == 1) {
    choice.valid = vocab;
    best = o.temperature > 0.0f ? sample_plain(e, vocab, maxima, highest, o) : Candidate{highest, int32_t(favourite), 0.0f};
  } else if (const Mixture mixture(logits, vocab, o); !o.leads()) {
    best = choose_by_all(mixture, vocab, o, choice);
    if (!choice.error.empty()) return choice;
  } else {
    const bool sampling = o.temperature > 0.0f;
    std::vector<Candidate> candidates;
    const float cut = std::log(o.alpha) + highest;
    for (size_t b = 0; b < maxima.size(); ++b) {
      if (maxima[b] < cut) continue;
      const int64_t end = std::min(vocab, int64_t(b + 1) * kSelectBlock);
      for (int64_t i = int64_t(b) * kSelectBlock; i < end; ++i) {
        if (!(e[i] >= cut) || e[i] == -kInfinity) continue;
        ++choice.valid;
        const float score = mixture(i);
        if (!std::isfinite(score)) {
          choice.error = overflow_text(mixture, i);
          return choice;
        }
        const Candidate candidate{score, int32_t(i), 0.0f};
        if (sampling) candidates.push_back(candidate);
        else if (score > best.score) best = candidate;
      }
    }
    if (sampling) best = sample(candidates, o);
  }
  choice.token = best.token;
  choice.score = best.score;
  choice.expert = e[best.token];
  choice.amateur = o.count > 1 ? logits[o.rows[1] * vocab + best.token] : 0.0f;
  return choice;
}

}  // namespace COLORA_ISA_NAMESPACE
