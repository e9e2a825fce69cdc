// The options of the requests, as colora_ms/kernels/options.py lays them out: who reads a column or a tensor of them finds
// its name here (tests/kernels/test_operands.py compares both sides).
#pragma once

#include <limits>

#include "operands.h"

// The columns of `whole` (requests, columns) int32 and `real` (requests, columns) float32.
#define COLORA_WHOLE_OPTIONS(X) \
  X(top_k)                      \
  X(budget)                     \
  X(mode)                       \
  X(mixing)                     \
  X(cut)                        \
  X(logprobs)                   \
  X(voices)                     \
  X(min_tokens)                 \
  X(masked)
#define COLORA_REAL_OPTIONS(X) \
  X(alpha)                     \
  X(beta)                      \
  X(temperature)               \
  X(top_p)                     \
  X(min_p)                     \
  X(presence_penalty)          \
  X(frequency_penalty)         \
  X(repetition_penalty)

namespace COLORA_ISA_NAMESPACE {
COLORA_NAMES(Whole, COLORA_WHOLE_OPTIONS)
COLORA_NAMES(Real, COLORA_REAL_OPTIONS)

constexpr int kMostRows = 8;   // rows of a request
constexpr int kMostTop = 20;   // tokens that are listed with their log-probabilities
constexpr int kDetails = 1 + kMostTop + kMostRows;

// How a request's rows become one distribution; see mix.h.
enum class Mixing : int32_t { contrast, log, probability, count };
// Whose best token's probability, times alpha, is the least that a token needs: nobody's, the leading row's, the mixture's.
enum class Cut : int32_t { none, leading, mixture, count };

struct SelectOptions {
  int count = 0;  // rows; 0: inactive
  int64_t rows[kMostRows] = {-1, -1, -1, -1, -1, -1, -1, -1};
  float weights[kMostRows] = {};
  Mixing mixing = Mixing::contrast;
  Cut cut = Cut::leading;
  bool voices = false;
  int64_t top_k = 0, logprobs = -1;  // logprobs -1: none
  float alpha = 0, beta = 0, temperature = 0, top_p = 1, min_p = 0, uniform = 0;

  bool active() const { return count > 0; }
  bool contrast() const { return count > 1 && mixing == Mixing::contrast; }
  // Whether only tokens of the leading row's cut are looked at, so that other tokens' logits of the others are not read.
  bool leads() const { return count > 1 && cut == Cut::leading; }
  bool details() const { return logprobs >= 0 || voices; }
  void contrast_by(float strength) { beta = strength, weights[0] = 1.0f + strength, weights[1] = -strength; }
};

// The options of all requests.
class Options {
 public:
  // Refuses wrong types and shapes.
  Options(const colora::Tensor& whole, const colora::Tensor& real, const colora::Tensor& mix_rows,
          const colora::Tensor& mix_weights)
      : whole_(whole), real_(real), rows_(mix_rows), weights_(mix_weights) {
    whole.expect_dtype("int32").expect_rank(2).expect_dim(1, int64_t(Whole::count), "a column for each whole option");
    real.expect_dtype("float32").expect_rank(2).expect_dim(0, whole.dim(0), "requests, as in whole");
    real.expect_dim(1, int64_t(Real::count), "a column for each real option");
    mix_rows.expect_dtype("int32");
    mix_weights.expect_dtype("float32");
    for (const colora::Tensor* t : {&mix_rows, &mix_weights})
      t->expect_rank(2).expect_dim(0, whole.dim(0), "requests, as in whole").expect_dim(1, kMostRows, "rows of a request");
  }

  int64_t requests() const { return whole_.dim(0); }
  int32_t get(int64_t r, Whole option) const { return whole_.data<int32_t>()[r * int64_t(Whole::count) + int64_t(option)]; }
  float get(int64_t r, Real option) const { return real_.data<float>()[r * int64_t(Real::count) + int64_t(option)]; }

  // The tensor of an option, by the option's name, for messages.
  colora::Tensor named(Whole option) const { return renamed(whole_, name_of(option)); }
  colora::Tensor named(Real option) const { return renamed(real_, name_of(option)); }

  // Row k of a request, -1: `none`; refuses others than the `rows` that there are.
  int64_t row(int64_t r, int k, int64_t rows, const char* none) const {
    const int64_t value = rows_.data<int32_t>()[r * kMostRows + k];
    if (value < -1 || value >= rows)
      rows_.fail("is %lld at place %d of request %lld, expected -1 (%s) or 0 to %lld", (long long)value, k, (long long)r,
                 none, (long long)rows - 1);
    return value;
  }

  float number(int64_t r, Real option, float low, float high, const char* expected) const {
    const float value = get(r, option);
    if (!(value >= low && value <= high))
      named(option).fail("is %g in request %lld, expected %s", double(value), (long long)r, expected);
    return value;
  }
  int32_t whole(int64_t r, Whole option, int32_t low, int32_t high) const {
    const int32_t value = get(r, option);
    if (value < low || value > high) named(option).fail("is %d in request %lld, expected %d to %d", value, (long long)r, low, high);
    return value;
  }
  float alpha(int64_t r) const { return number(r, Real::alpha, kLeast, 1.0f, "a number in (0, 1]"); }
  float beta(int64_t r) const { return number(r, Real::beta, 0.0f, kMost, "a finite number >= 0"); }

  // What the selection takes of request r but its random number; refuses what is out of range. An inactive one: nothing
  // else is read.
  SelectOptions read(int64_t r, int64_t rows) const {
    SelectOptions o;
    o.rows[0] = row(r, 0, rows, "inactive");
    if (o.rows[0] < 0) return o;
    for (o.count = 1; o.count < kMostRows; ++o.count)
      if ((o.rows[o.count] = row(r, o.count, rows, "no further row")) < 0) break;
    for (int k = o.count + 1; k < kMostRows; ++k)
      if (row(r, k, rows, "no further row") >= 0)
        rows_.fail("has a row behind a -1 at place %d of request %lld, expected the rows first", o.count, (long long)r);
    if (o.count > 1) read_mix(r, o);
    o.logprobs = whole(r, Whole::logprobs, -1, kMostTop);
    o.voices = whole(r, Whole::voices, 0, 1) != 0;
    o.temperature = number(r, Real::temperature, 0.0f, kMost, "a finite number >= 0 (0: argmax)");
    if (!(o.temperature > 0.0f)) return o;
    o.top_p = number(r, Real::top_p, kLeast, 1.0f, "a number in (0, 1]");
    o.min_p = number(r, Real::min_p, 0.0f, 1.0f, "a number in [0, 1]");
    o.top_k = get(r, Whole::top_k);
    if (o.top_k < 0)
      named(Whole::top_k).fail("is %lld in request %lld, expected 0 (off) or more", (long long)o.top_k, (long long)r);
    return o;
  }

  static constexpr float kMost = std::numeric_limits<float>::max(), kLeast = std::numeric_limits<float>::denorm_min();

 private:
  static colora::Tensor renamed(colora::Tensor t, const char* name) {
    t.name = name;
    return t;
  }

  void read_mix(int64_t r, SelectOptions& o) const {
    o.mixing = Mixing(whole(r, Whole::mixing, 0, int32_t(Mixing::count) - 1));
    if (o.mixing == Mixing::contrast) {
      if (o.count > 2) rows_.fail("has %d rows in request %lld, expected 2 for a contrast", o.count, (long long)r);
      o.alpha = alpha(r);
      o.contrast_by(beta(r));
      return;
    }
    o.cut = Cut(whole(r, Whole::cut, 0, int32_t(Cut::count) - 1));
    if (o.cut != Cut::none) o.alpha = alpha(r);
    bool some = false;
    for (int k = 0; k < o.count; ++k) {
      const float w = o.weights[k] = weights_.data<float>()[r * kMostRows + k];
      const bool mean = o.mixing == Mixing::probability;
      if (!(w >= (mean ? 0.0f : -kMost) && w <= kMost))
        weights_.fail("is %g at place %d of request %lld, expected a finite number%s", double(w), k, (long long)r,
                      mean ? " >= 0 for a mean of probabilities" : "");
      some |= w != 0.0f;
    }
    if (!some) weights_.fail("is 0 in every row of request %lld, expected one that counts", (long long)r);
  }

  colora::Tensor whole_, real_, rows_, weights_;
};

// Refuses a random number outside [0, 1).
inline float checked_uniform(const colora::Tensor& uniform, float value, int64_t r) {
  if (!(value >= 0.0f && value < 1.0f))
    uniform.fail("is %g in request %lld, expected a number in [0, 1)", double(value), (long long)r);
  return value;
}

}  // namespace COLORA_ISA_NAMESPACE
