// A draw among scored tokens: temperature, top-k, top-p and min-p. Tokens come from a heap until the drawn mass is reached.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "options.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int64_t kSelectBlock = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  float score;
  int32_t token;
  float weight;
};

// Higher score first, the smaller token first among equals.
inline bool better(const Candidate& x, const Candidate& y) {
  return x.score > y.score || (x.score == y.score && x.token < y.token);
}

// Maximum of each block; returns false if the row holds a NaN.
inline bool block_maxima(const float* e, int64_t vocab, float* maxima) {
  vi nan{};
  for (int64_t b = 0; b * kSelectBlock < vocab; ++b) {
    const int64_t end = std::min(vocab, (b + 1) * kSelectBlock);
    vf m0 = splat(-kInfinity), m1 = m0;
    int64_t i = b * kSelectBlock;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const vf x = load(e + i), y = load(e + i + kLanes);
      nan |= (x != x) | (y != y);
      m0 = max(x, m0);
      m1 = max(y, m1);
    }
    float highest = max_of(max(m0, m1));
    for (; i < end; ++i) {
      if (e[i] != e[i]) return false;
      highest = e[i] > highest ? e[i] : highest;
    }
    maxima[b] = highest;
  }
  for (int i = 0; i < kLanes; ++i)
    if (nan[i]) return false;
  return true;
}

// Candidates in descending order until the drawn mass is reached (top_k has been applied). `mass` is that of all
// candidates, `complete` tells whether all of them are here. Returns false if those that are here do not suffice.
inline bool draw(std::vector<Candidate>& candidates, const SelectOptions& o, double mass, bool complete, Candidate* picked) {
  const auto worse = [](const Candidate& x, const Candidate& y) { return better(y, x); };
  std::make_heap(candidates.begin(), candidates.end(), worse);
  // Taken candidates gather at the end of the vector, the best one last.
  auto heap_end = candidates.end();
  double taken = 0.0;
  const auto take = [&] {
    std::pop_heap(candidates.begin(), heap_end, worse);
    --heap_end;
    taken += heap_end->weight;
  };
  if (o.top_p >= 1.0f && o.min_p <= 0.0f) {
    const double wanted = double(o.uniform) * mass;
    do take(); while (taken <= wanted && heap_end != candidates.begin());
    *picked = *heap_end;
    return complete || taken > wanted;
  }
  const double kept = o.top_p >= 1.0f ? double(kInfinity) : double(o.top_p) * mass;
  // The best candidate's weight is 1, so that a weight is a share of it.
  const auto more = [&] { return heap_end != candidates.begin() && candidates.front().weight >= o.min_p; };
  do take(); while (taken < kept && more());
  if (!complete && taken < kept && heap_end == candidates.begin()) return false;
  const double wanted = double(o.uniform) * taken;
  double sum = 0.0;
  auto c = candidates.end();
  do sum += (--c)->weight; while (sum <= wanted && c != heap_end);
  *picked = *c;
  return true;
}

// Sets the candidates' weights exp((score - highest) / temperature) and returns their sum.
inline double weigh(std::vector<Candidate>& candidates, float highest, float temperature) {
  double mass = 0.0;
  for (size_t i = 0; i < candidates.size(); i += kLanes) {
    const size_t count = std::min<size_t>(kLanes, candidates.size() - i);
    float scaled[kLanes] = {};
    for (size_t j = 0; j < count; ++j) scaled[j] = (candidates[i + j].score - highest) / temperature;
    store(scaled, exp(load(scaled)));
    for (size_t j = 0; j < count; ++j) mass += candidates[i + j].weight = scaled[j];
  }
  return mass;
}

inline void cut_to_top_k(std::vector<Candidate>& candidates, int64_t top_k) {
  if (top_k <= 0 || top_k >= int64_t(candidates.size())) return;
  std::nth_element(candidates.begin(), candidates.begin() + top_k, candidates.end(), better);
  candidates.resize(size_t(top_k));
}

// A draw among given candidates.
inline Candidate sample(std::vector<Candidate>& candidates, const SelectOptions& o) {
  cut_to_top_k(candidates, o.top_k);
  float highest = -kInfinity;
  for (const Candidate& c : candidates) highest = c.score > highest ? c.score : highest;
  const double mass = weigh(candidates, highest, o.temperature);
  Candidate picked{};
  draw(candidates, o, mass, true, &picked);
  return picked;
}

// A draw among the whole vocabulary by scores, -infinity for what is not allowed. The tail of tiny weights is only looked
// at if the draw gets there.
inline Candidate sample_plain(const float* e, int64_t vocab, const std::vector<float>& maxima, float highest,
                       const SelectOptions& o) {
  std::vector<Candidate> candidates;
  const auto collect = [&](float least) {
    candidates.clear();
    for (size_t b = 0; b < maxima.size(); ++b) {
      if (maxima[b] < least) continue;
      const int64_t end = std::min(vocab, int64_t(b + 1) * kSelectBlock);
      for (int64_t i = int64_t(b) * kSelectBlock; i < end; ++i)
        if (e[i] >= least) candidates.push_back({e[i], int32_t(i), 0.0f});
    }
  };
  double mass = 0.0;
  if (o.top_k == 0)
    for (int64_t b = 0; b < vocab; b += kSelectBlock) {
      vf sum_of_block{};
      const int64_t end = std::min(vocab, b + kSelectBlock);
      for (int64_t i = b; i < end; i += kLanes) {
        const int64_t left = end - i;
        vf weight = exp((load_upto(e + i, left) - splat(highest)) / splat(o.temperature));
        if (left < kLanes) {
          float lanes[kLanes];
          store(lanes, weight);
          std::fill(lanes + left, lanes + kLanes, 0.0f);
          weight = load(lanes);
        }
        sum_of_block = sum_of_block + weight;
      }
      mass += sum(sum_of_block);
    }
  Candidate picked{};
  for (const bool complete : {false, true}) {
    collect(complete ? std::numeric_limits<float>::lowest() : highest - 9.0f * o.temperature);
    if (o.top_k > 0) {
      if (!complete && int64_t(candidates.size()) < std::min(o.top_k, vocab)) continue;
      return sample(candidates, o);
    }
    weigh(candidates, highest, o.temperature);
    if (draw(candidates, o, mass, complete, &picked)) break;
  }
  return picked;
}

}  // namespace COLORA_ISA_NAMESPACE
