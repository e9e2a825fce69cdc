// contrast_strength: the weight beta that an adaptive contrast gives to the amateur at this step, for each request.
//
// The expert's row is read once for its maximum and once for the survivors of the cut; only the divergence reads the
// amateur's row and takes exponentials of whole rows. A fixed contrast reads nothing.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

constexpr int32_t kEntropy = 1, kDivergence = 2, kMargin = 3, kSkipCopies = 8;

struct Options {
  int64_t expert = -1, amateur = -1;
  float alpha = 0, beta = 0;
  int32_t mode = 0, previous = -1;
  const int32_t* prompt = nullptr;
  int64_t length = 0;
};

float highest_of(const float* x, int64_t n) {
  vf m = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) m = max(load(x + i), m);
  float highest = max_of(m);
  for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// p[i] = exp(x[i] - highest); returns their sum.
double exponentials(const float* x, int64_t n, float highest, float* p) {
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
float divergence(const float* e, const float* a, int64_t vocab, float highest) {
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
float share(const float* logits, int64_t vocab, const Options& o) {
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

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (logits, expert_rows, amateur_rows, alpha, beta, mode, previous, prompt, lengths) -> strength
COLORA_OPERATOR(contrast_strength) {
  call.expect(9, 1);
  const Tensor logits = call.in(0, "logits"), expert_rows = call.in(1, "expert_rows"),
               amateur_rows = call.in(2, "amateur_rows"), alpha = call.in(3, "alpha"), beta = call.in(4, "beta"),
               mode = call.in(5, "mode"), previous = call.in(6, "previous"), prompt = call.in(7, "prompt"),
               lengths = call.in(8, "lengths"), out = call.out(0, "strength");
  logits.expect_dtype("float32").expect_rank(2);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  if (vocab < 1) logits.fail("has shape %s, expected (rows, vocab) with vocab >= 1", logits.shape_text().c_str());
  expert_rows.expect_dtype("int32").expect_rank(1);
  const int64_t requests = expert_rows.dim(0);
  for (const Tensor* t : {&amateur_rows, &mode, &previous, &lengths})
    t->expect_dtype("int32").expect_rank(1).expect_dim(0, requests, "requests, as in expert_rows");
  for (const Tensor* t : {&alpha, &beta, &out})
    t->expect_dtype("float32").expect_rank(1).expect_dim(0, requests, "requests, as in expert_rows");
  prompt.expect_dtype("int32").expect_rank(2).expect_dim(0, requests, "requests, as in expert_rows");
  const int64_t width = prompt.dim(1);

  std::vector<Options> options(static_cast<size_t>(requests));
  for (int64_t r = 0; r < requests; ++r) {
    Options& o = options[size_t(r)];
    o.expert = expert_rows.data<int32_t>()[r];
    o.amateur = amateur_rows.data<int32_t>()[r];
    const auto row = [&](const Tensor& t, int64_t value) {
      if (value < -1 || value >= rows)
        t.fail("is %lld in request %lld, expected -1 (none) or 0 to %lld", (long long)value, (long long)r,
               (long long)rows - 1);
    };
    row(expert_rows, o.expert);
    if (o.expert < 0) continue;
    row(amateur_rows, o.amateur);
    if (o.amateur < 0) continue;
    o.alpha = alpha.data<float>()[r];
    o.beta = beta.data<float>()[r];
    o.mode = mode.data<int32_t>()[r];
    o.previous = previous.data<int32_t>()[r];
    o.length = lengths.data<int32_t>()[r];
    o.prompt = prompt.data<int32_t>() + r * width;
    if (!(o.alpha > 0.0f && o.alpha <= 1.0f))
      alpha.fail("is %g in request %lld, expected a number in (0, 1]", double(o.alpha), (long long)r);
    if (!(o.beta >= 0.0f && std::isfinite(o.beta)))
      beta.fail("is %g in request %lld, expected a finite number >= 0", double(o.beta), (long long)r);
    if ((o.mode & ~kSkipCopies) < 0 || (o.mode & ~kSkipCopies) > kMargin)
      mode.fail("is %lld in request %lld, expected 0 to 3, or 8 more to skip copies", (long long)o.mode, (long long)r);
    if (o.length < 0 || o.length > width)
      lengths.fail("is %lld in request %lld, expected 0 to %lld", (long long)o.length, (long long)r, (long long)width);
  }

  std::vector<float> strength(static_cast<size_t>(requests), 0.0f);
  std::vector<char> failed(static_cast<size_t>(requests), 0);
  const auto work = [&](int64_t r) {
    const Options& o = options[size_t(r)];
    if (o.expert < 0 || o.amateur < 0 || o.beta == 0.0f) return;
    try {
      strength[size_t(r)] = o.mode ? o.beta * share(logits.data<float>(), vocab, o) : o.beta;
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
      failed[size_t(r)] = 1;
    }
  };
  const bool adaptive = std::any_of(options.begin(), options.end(), [](const Options& o) { return o.mode != 0; });
  if (!adaptive || requests * vocab < (1 << 18)) {  // less than what starting threads costs
    for (int64_t r = 0; r < requests; ++r) work(r);
  } else {
    parallel_tasks(requests, work);
  }
  for (int64_t r = 0; r < requests; ++r)
    if (failed[size_t(r)]) colora::refuse("contrast_strength: no memory for two rows of %lld numbers", (long long)vocab);
  std::copy(strength.begin(), strength.end(), out.data<float>());
}
