// The next token of one request from the logits rows of its expert and its amateur (Contrastive LoRA Decoding, arXiv
// 2505.14620), by argmax or sampling: what contrastive_select and step share.
//
// The expert's row is read once for its maximum, in blocks whose maxima are kept; the second pass visits only the
// blocks that hold a survivor of the cut, and the amateur's row is read at the survivors alone. Argmax sorts nothing;
// sampling takes tokens from a heap until the drawn mass is reached.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "operands.h"
#include "vec_math.h"

// The columns of the requests' options: `whole` (requests, columns) int32 and `real` (requests, columns) float32, as in
// colora_ms/kernels/options.py (tests/kernels/test_operands.py compares them).
#define COLORA_WHOLE_OPTIONS(X) \
  X(expert_rows)                \
  X(amateur_rows)               \
  X(top_k)                      \
  X(budget)                     \
  X(mode)
#define COLORA_REAL_OPTIONS(X) \
  X(alpha)                     \
  X(beta)                      \
  X(temperature)               \
  X(top_p)                     \
  X(min_p)

namespace COLORA_ISA_NAMESPACE {
COLORA_NAMES(Whole, COLORA_WHOLE_OPTIONS)
COLORA_NAMES(Real, COLORA_REAL_OPTIONS)

constexpr int64_t kSelectBlock = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct SelectOptions {
  int64_t expert, amateur, top_k;
  float alpha, beta, temperature, top_p, min_p, uniform;
};

struct Choice {
  int64_t token = 0, favourite = 0, valid = 0;
  float expert = 0, amateur = 0, score = 0, highest = 0;
  std::string error;

  // ints: token, favourite, number of valid tokens; floats: the token's two logits and score, the highest logit.
  void write(int32_t* ints, float* floats) const {
    ints[0] = int32_t(token), ints[1] = int32_t(favourite), ints[2] = int32_t(valid);
    floats[0] = expert, floats[1] = amateur, floats[2] = score, floats[3] = highest;
  }
};

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

// A draw among the whole vocabulary by plain scores. The tail of tiny weights is only looked at if the draw gets there.
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
    collect(complete ? -kInfinity : highest - 9.0f * o.temperature);
    if (o.top_k > 0) {
      if (!complete && int64_t(candidates.size()) < std::min(o.top_k, vocab)) continue;
      return sample(candidates, o);
    }
    weigh(candidates, highest, o.temperature);
    if (draw(candidates, o, mass, complete, &picked)) break;
  }
  return picked;
}

inline std::string place_text(const char* what, int64_t row, int64_t token) {
  return std::string(what) + " in row " + std::to_string(row) +
         (token >= 0 ? " at token " + std::to_string(token) : "");
}

inline Choice choose(const float* logits, int64_t vocab, const SelectOptions& o) {
  Choice choice;
  const float* e = logits + o.expert * vocab;
  const float* a = o.amateur >= 0 ? logits + o.amateur * vocab : nullptr;
  std::vector<float> maxima(size_t((vocab + kSelectBlock - 1) / kSelectBlock));
  if (!block_maxima(e, vocab, maxima.data())) {
    choice.error = place_text("argument 'logits' holds NaN", o.expert, -1);
    return choice;
  }
  const size_t block = size_t(std::max_element(maxima.begin(), maxima.end()) - maxima.begin());
  const float highest = maxima[block];
  if (!std::isfinite(highest)) {
    choice.error = place_text(highest > 0 ? "argument 'logits' holds infinity" : "argument 'logits' holds only -infinity",
                        o.expert, -1);
    return choice;
  }
  int64_t favourite = int64_t(block) * kSelectBlock;
  while (e[favourite] != highest) ++favourite;
  choice.favourite = favourite;
  choice.highest = highest;

  const bool sampling = o.temperature > 0.0f;
  Candidate best{-kInfinity, -1, 0.0f};
  std::vector<Candidate> candidates;
  if (!a && !sampling) {
    choice.valid = vocab;
    best = {highest, int32_t(favourite), 0.0f};
  } else if (!a) {
    choice.valid = vocab;
    best = sample_plain(e, vocab, maxima, highest, o);
  } else {
    const float cut = std::log(o.alpha) + highest;
    const float gain = 1.0f + o.beta;
    for (size_t b = 0; b < maxima.size(); ++b) {
      if (maxima[b] < cut) continue;
      const int64_t end = std::min(vocab, int64_t(b + 1) * kSelectBlock);
      for (int64_t i = int64_t(b) * kSelectBlock; i < end; ++i) {
        if (!(e[i] >= cut)) continue;
        ++choice.valid;
        float score = e[i];
        if (o.beta != 0.0f) {
          score = gain * e[i] - o.beta * a[i];
          if (!std::isfinite(score)) {
            choice.error = place_text("argument 'logits' holds NaN or infinity (or their contrast overflows)", o.amateur, i);
            return choice;
          }
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
  choice.amateur = a ? a[best.token] : 0.0f;
  return choice;
}

// The options of all requests.
class Options {
 public:
  // Refuses wrong types and shapes.
  Options(const colora::Tensor& whole, const colora::Tensor& real) : whole_(whole), real_(real) {
    whole.expect_dtype("int32").expect_rank(2).expect_dim(1, int64_t(Whole::count), "a column for each whole option");
    real.expect_dtype("float32").expect_rank(2).expect_dim(0, whole.dim(0), "requests, as in whole");
    real.expect_dim(1, int64_t(Real::count), "a column for each real option");
  }

  int64_t requests() const { return whole_.dim(0); }
  int32_t get(int64_t r, Whole option) const { return whole_.data<int32_t>()[r * int64_t(Whole::count) + int64_t(option)]; }
  float get(int64_t r, Real option) const { return real_.data<float>()[r * int64_t(Real::count) + int64_t(option)]; }

  // The tensor of an option, by the option's name, for messages.
  colora::Tensor named(Whole option) const { return renamed(whole_, name_of(option)); }
  colora::Tensor named(Real option) const { return renamed(real_, name_of(option)); }

  // A row of the logits, -1: `none`; refuses others than those of `rows`.
  int64_t row(int64_t r, Whole option, int64_t rows, const char* none) const {
    const int64_t value = get(r, option);
    if (value < -1 || value >= rows)
      named(option).fail("is %lld in request %lld, expected -1 (%s) or 0 to %lld", (long long)value, (long long)r, none,
                         (long long)rows - 1);
    return value;
  }

  float number(int64_t r, Real option, float low, float high, const char* expected) const {
    const float value = get(r, option);
    if (!(value >= low && value <= high))
      named(option).fail("is %g in request %lld, expected %s", double(value), (long long)r, expected);
    return value;
  }
  float alpha(int64_t r) const { return number(r, Real::alpha, kLeast, 1.0f, "a number in (0, 1]"); }
  float beta(int64_t r) const { return number(r, Real::beta, 0.0f, kMost, "a finite number >= 0"); }

  // What the selection takes of request r but its random number; refuses what is out of range. expert -1: inactive,
  // nothing else is read.
  SelectOptions read(int64_t r, int64_t rows) const {
    SelectOptions o{};
    o.amateur = get(r, Whole::amateur_rows);
    o.expert = row(r, Whole::expert_rows, rows, "inactive");
    if (o.expert < 0) return o;
    row(r, Whole::amateur_rows, rows, "no contrast");
    if (o.amateur >= 0) o.alpha = alpha(r), o.beta = beta(r);
    o.temperature = number(r, Real::temperature, 0.0f, kMost, "a finite number >= 0 (0: argmax)");
    if (!(o.temperature > 0.0f)) return o;
    o.top_p = number(r, Real::top_p, kLeast, 1.0f, "a number in (0, 1]");
    o.min_p = number(r, Real::min_p, 0.0f, 1.0f, "a number in [0, 1]");
    o.top_k = get(r, Whole::top_k);
    if (o.top_k < 0)
      named(Whole::top_k).fail("is %lld in request %lld, expected 0 (off) or more", (long long)o.top_k, (long long)r);
    return o;
  }

 private:
  static constexpr float kMost = std::numeric_limits<float>::max(), kLeast = std::numeric_limits<float>::denorm_min();

  static colora::Tensor renamed(colora::Tensor t, const char* name) {
    t.name = name;
    return t;
  }

  colora::Tensor whole_, real_;
};

// Refuses a random number outside [0, 1).
inline float checked_uniform(const colora::Tensor& uniform, float value, int64_t r) {
  if (!(value >= 0.0f && value < 1.0f))
    uniform.fail("is %g in request %lld, expected a number in [0, 1)", double(value), (long long)r);
  return value;
}

}  // namespace COLORA_ISA_NAMESPACE

