// The share of beta that an adaptive contrast gives to the amateur at one step of one request: what contrast_strength
// and step share.
//
// The expert's row is read once for its maximum and once for the survivors of the cut; only the divergence reads the
// amateur's row and takes exponentials of whole rows. A fixed contrast reads nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "mix.h"

namespace COLORA_ISA_NAMESPACE {
constexpr int32_t kEntropy = 1, kDivergence = 2, kMargin = 3, kSkipCopies = 8;

struct StrengthOptions {
  int64_t expert = -1, amateur = -1;
  float alpha = 0, beta = 0;
  int32_t mode = 0, previous = -1;
  const int32_t* prompt = nullptr;
  int64_t length = 0;
};

// p[i] = exp(x[i] - highest); returns their sum.
inline double exponentials(const float* x, int64_t n, float highest, float* p) {
  double total = 0.0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = std::min<int64_t>(kLanes, n - i);
    float lanes[kLanes] = {};
    store(lanes, exp(load_upto(x + i, left) - splat(highest)));
    for (int64_t j = 0; j < left; ++j) total += p[i + j] = lanes[j];
  }
  return total;
}

// Jensen-Shannon divergence of the two softmax distributions over ln 2, in [0, 1].
inline float divergence(const float* e, const float* a, int64_t vocab, float highest) {
  std::vector<float> p(static_cast<size_t>(vocab)), q(static_cast<size_t>(vocab));
  const double p_total = exponentials(e, vocab, highest, p.data());
  const double q_total = exponentials(a, vocab, highest_of(a, vocab), q.data());
  double sum = 0.0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double x = p[size_t(i)] / p_total, y = q[size_t(i)] / q_total;
    // Each term is below (x + y) ln 2 / 2, so what is left out is below 1e-10 a token.
    if (x + y < 1e-10) continue;
    const double middle = 0.5 * (x + y);
    if (x > 0) sum += 0.5 * x * std::log(x / middle);
    if (y > 0) sum += 0.5 * y * std::log(y / middle);
  }
  return float(std::min(std::max(sum / std::log(2.0), 0.0), 1.0));
}

// Share of beta in [0, 1]. Rows without a finite maximum give 1: contrastive_select names what is wrong with them.
inline float strength_share(const float* logits, int64_t vocab, const StrengthOptions& o) {
  const float* e = logits + o.expert * vocab;
  const float highest = highest_of(e, vocab);
  if (!std::isfinite(highest)) return 1.0f;
  if (o.mode & kSkipCopies) {
    int64_t favourite = 0;
    while (e[favourite] != highest) ++favourite;
    for (int64_t j = 0; j + 1 < o.length; ++j)
      if (o.prompt[j] == o.previous && o.prompt[j + 1] == favourite) return 0.0f;
  }
  const int32_t kind = o.mode & ~kSkipCopies;
  if (kind == 0) return 1.0f;
  if (kind == kDivergence) {
    const float found = divergence(e, logits + o.amateur * vocab, vocab, highest);
    return std::isfinite(found) ? found : 1.0f;
  }
  const float limit = std::log(o.alpha), cut = limit + highest;
  int64_t valid = 0, best = 0;
  double mass = 0.0, moment = 0.0;  // sums of w and w ln w with w = exp(e - highest)
  float second = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < vocab; ++i) {
    if (!(e[i] >= cut)) continue;
    ++valid;
    if (e[i] == highest && best++ == 0) {
      mass += 1.0;
      continue;
    }
    second = std::max(second, e[i]);
    if (kind == kEntropy) {
      const double gap = double(e[i]) - double(highest), w = std::exp(gap);
      mass += w;
      moment += w * gap;
    }
  }
  if (valid < 2) return 0.0f;
  if (kind == kMargin) return limit < 0.0f ? std::max(0.0f, 1.0f - (second - highest) / limit) : 0.0f;
  return float(std::min(std::max((std::log(mass) - moment / mass) / std::log(double(valid)), 0.0), 1.0));
}

// The form of request r; refuses one that does not exist.
inline int32_t checked_mode(const Options& options, int64_t r) {
  const int32_t value = options.get(r, Whole::mode);
  if ((value & ~kSkipCopies) < 0 || (value & ~kSkipCopies) > kMargin)
    options.named(Whole::mode).fail("is %lld in request %lld, expected 0 to 3, or 8 more to skip copies", (long long)value,
                                    (long long)r);
  return value;
}

// Refuses a prompt longer than the `width` tokens that are there.
inline int32_t checked_length(const colora::Tensor& lengths, int64_t r, int64_t width) {
  const int32_t value = lengths.data<int32_t>()[r];
  if (value < 0 || value > width)
    lengths.fail("is %lld in request %lld, expected 0 to %lld", (long long)value, (long long)r, (long long)width);
  return value;
}

}  // namespace COLORA_ISA_NAMESPACE

