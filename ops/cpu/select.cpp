// contrastive_select: the next token of each request from the logits rows of its expert and its amateur
// (Contrastive LoRA Decoding, arXiv 2505.14620), by argmax or sampling.
//
// The expert's row is read once for its maximum, in blocks whose maxima are kept; the second pass visits only the
// blocks that hold a survivor of the cut, and the amateur's row is read at the survivors alone. Argmax sorts nothing;
// sampling takes tokens from a heap until the drawn mass is reached.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

constexpr int64_t kBlock = 256;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Options {
  int64_t expert, amateur, top_k;
  float alpha, beta, temperature, top_p, uniform;
};

struct Choice {
  int64_t token = 0, favourite = 0, valid = 0;
  float expert = 0, amateur = 0, score = 0, highest = 0;
  std::string error;
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
bool block_maxima(const float* e, int64_t vocab, float* maxima) {
  vi nan{};
  for (int64_t b = 0; b * kBlock < vocab; ++b) {
    const int64_t end = std::min(vocab, (b + 1) * kBlock);
    vf m0 = splat(-kInfinity), m1 = m0;
    int64_t i = b * kBlock;
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

// Inverse of the distribution over candidates in descending order, after top_k and top_p.
Candidate draw(std::vector<Candidate>& candidates, const Options& o) {
  if (o.top_k > 0 && o.top_k < int64_t(candidates.size())) {
    std::nth_element(candidates.begin(), candidates.begin() + o.top_k, candidates.end(), better);
    candidates.resize(size_t(o.top_k));
  }
  float highest = -kInfinity;
  for (const Candidate& c : candidates) highest = c.score > highest ? c.score : highest;
  double mass = 0.0;
  for (size_t i = 0; i < candidates.size(); i += kLanes) {
    const size_t count = std::min<size_t>(kLanes, candidates.size() - i);
    float scaled[kLanes] = {};
    for (size_t j = 0; j < count; ++j) scaled[j] = (candidates[i + j].score - highest) / o.temperature;
    store(scaled, exp(load(scaled)));
    for (size_t j = 0; j < count; ++j) mass += candidates[i + j].weight = scaled[j];
  }
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
  if (o.top_p >= 1.0f) {
    do take(); while (taken <= double(o.uniform) * mass && heap_end != candidates.begin());
    return *heap_end;
  }
  do take(); while (taken < double(o.top_p) * mass && heap_end != candidates.begin());
  const double wanted = double(o.uniform) * taken;
  double sum = 0.0;
  for (auto c = candidates.end(); c-- != heap_end;)
    if ((sum += c->weight) > wanted || c == heap_end) return *c;
  return *heap_end;
}

std::string text(const char* what, int64_t row, int64_t token) {
  return std::string(what) + " in row " + std::to_string(row) +
         (token >= 0 ? " at token " + std::to_string(token) : "");
}

Choice choose(const float* logits, int64_t vocab, const Options& o) {
  Choice choice;
  const float* e = logits + o.expert * vocab;
  const float* a = o.amateur >= 0 ? logits + o.amateur * vocab : nullptr;
  std::vector<float> maxima(size_t((vocab + kBlock - 1) / kBlock));
  if (!block_maxima(e, vocab, maxima.data())) {
    choice.error = text("argument 'logits' holds NaN", o.expert, -1);
    return choice;
  }
  const size_t block = size_t(std::max_element(maxima.begin(), maxima.end()) - maxima.begin());
  const float highest = maxima[block];
  if (!std::isfinite(highest)) {
    choice.error = text(highest > 0 ? "argument 'logits' holds infinity" : "argument 'logits' holds only -infinity",
                        o.expert, -1);
    return choice;
  }
  int64_t favourite = int64_t(block) * kBlock;
  while (e[favourite] != highest) ++favourite;
  choice.favourite = favourite;
  choice.highest = highest;

  const bool sampling = o.temperature > 0.0f;
  Candidate best{-kInfinity, -1, 0.0f};
  std::vector<Candidate> candidates;
  if (!a && !sampling) {
    choice.valid = vocab;
    best = {highest, int32_t(favourite), 0.0f};
  } else {
    const float cut = a ? std::log(o.alpha) + highest : -kInfinity;
    const float gain = 1.0f + o.beta;
    if (sampling && !a) candidates.reserve(size_t(vocab));
    for (size_t b = 0; b < maxima.size(); ++b) {
      if (maxima[b] < cut) continue;
      const int64_t end = std::min(vocab, int64_t(b + 1) * kBlock);
      for (int64_t i = int64_t(b) * kBlock; i < end; ++i) {
        if (!(e[i] >= cut)) continue;
        ++choice.valid;
        float score = e[i];
        if (a && o.beta != 0.0f) {
          score = gain * e[i] - o.beta * a[i];
          if (!std::isfinite(score)) {
            choice.error = text("argument 'logits' holds NaN or infinity (or their contrast overflows)", o.amateur, i);
            return choice;
          }
        }
        const Candidate candidate{score, int32_t(i), 0.0f};
        if (sampling) candidates.push_back(candidate);
        else if (score > best.score) best = candidate;
      }
    }
    if (sampling) best = draw(candidates, o);
  }
  choice.token = best.token;
  choice.score = best.score;
  choice.expert = e[best.token];
  choice.amateur = a ? a[best.token] : 0.0f;
  return choice;
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (logits, expert_rows, amateur_rows, alpha, beta, temperature, top_k, top_p, uniform) -> (ints, floats)
COLORA_OPERATOR(contrastive_select) {
  call.expect(9, 2);
  const Tensor logits = call.in(0, "logits"), expert_rows = call.in(1, "expert_rows"),
               amateur_rows = call.in(2, "amateur_rows"), alpha = call.in(3, "alpha"), beta = call.in(4, "beta"),
               temperature = call.in(5, "temperature"), top_k = call.in(6, "top_k"), top_p = call.in(7, "top_p"),
               uniform = call.in(8, "uniform"), ints = call.out(0, "ints"), floats = call.out(1, "floats");
  logits.expect_dtype("float32").expect_rank(2);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  if (vocab < 1 || vocab > std::numeric_limits<int32_t>::max())
    logits.fail("has shape %s, expected (rows, vocab) with vocab >= 1", logits.shape_text().c_str());
  expert_rows.expect_dtype("int32").expect_rank(1);
  const int64_t requests = expert_rows.dim(0);
  for (const Tensor* t : {&amateur_rows, &top_k})
    t->expect_dtype("int32").expect_rank(1).expect_dim(0, requests, "requests, as in expert_rows");
  for (const Tensor* t : {&alpha, &beta, &temperature, &top_p, &uniform})
    t->expect_dtype("float32").expect_rank(1).expect_dim(0, requests, "requests, as in expert_rows");
  ints.expect_dtype("int32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, 3, "three numbers");
  floats.expect_dtype("float32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, 4, "four numbers");

  std::vector<Options> options(size_t(requests), Options{});
  for (int64_t r = 0; r < requests; ++r) {
    Options& o = options[size_t(r)];
    o.expert = expert_rows.data<int32_t>()[r];
    o.amateur = amateur_rows.data<int32_t>()[r];
    if (o.expert < -1 || o.expert >= rows)
      expert_rows.fail("is %lld in request %lld, expected -1 (inactive) or 0 to %lld", (long long)o.expert,
                       (long long)r, (long long)rows - 1);
    if (o.expert < 0) continue;
    if (o.amateur < -1 || o.amateur >= rows)
      amateur_rows.fail("is %lld in request %lld, expected -1 (no contrast) or 0 to %lld", (long long)o.amateur,
                        (long long)r, (long long)rows - 1);
    const auto number = [&](const Tensor& t, float low, float high, const char* expected) {
      const float value = t.data<float>()[r];
      if (!(value >= low && value <= high)) t.fail("is %g in request %lld, expected %s", double(value), (long long)r,
                                                  expected);
      return value;
    };
    constexpr float kMost = std::numeric_limits<float>::max(), kLeast = std::numeric_limits<float>::denorm_min();
    if (o.amateur >= 0) {
      o.alpha = number(alpha, kLeast, 1.0f, "a number in (0, 1]");
      o.beta = number(beta, 0.0f, kMost, "a finite number >= 0");
    }
    o.temperature = number(temperature, 0.0f, kMost, "a finite number >= 0 (0: argmax)");
    if (!(o.temperature > 0.0f)) continue;
    o.top_p = number(top_p, kLeast, 1.0f, "a number in (0, 1]");
    o.uniform = number(uniform, 0.0f, std::nextafterf(1.0f, 0.0f), "a number in [0, 1)");
    o.top_k = top_k.data<int32_t>()[r];
    if (o.top_k < 0)
      top_k.fail("is %lld in request %lld, expected 0 (off) or more", (long long)o.top_k, (long long)r);
  }

  std::vector<Choice> choices{size_t(requests)};
  const auto work = [&](int64_t r) {
    if (options[size_t(r)].expert < 0) return;
    try {
      choices[size_t(r)] = choose(logits.data<float>(), vocab, options[size_t(r)]);
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
      choices[size_t(r)].error = "no memory";
    }
  };
  if (vocab < (1 << 12)) {
    for (int64_t r = 0; r < requests; ++r) work(r);
  } else {
    parallel_tasks(requests, work);
  }
  for (int64_t r = 0; r < requests; ++r)
    if (!choices[size_t(r)].error.empty())
      colora::refuse("contrastive_select: %s (request %lld), expected finite numbers",
                     choices[size_t(r)].error.c_str(), (long long)r);
  for (int64_t r = 0; r < requests; ++r) {
    const Choice& c = choices[size_t(r)];
    int32_t* i = ints.data<int32_t>() + r * 3;
    float* f = floats.data<float>() + r * 4;
    i[0] = int32_t(c.token), i[1] = int32_t(c.favourite), i[2] = int32_t(c.valid);
    f[0] = c.expert, f[1] = c.amateur, f[2] = c.score, f[3] = c.highest;
  }
}
