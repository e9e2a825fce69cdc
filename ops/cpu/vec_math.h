// Elementary functions on vectors that simd.h does not have.
#pragma once

#include <limits>

#include "simd.h"

namespace COLORA_ISA_NAMESPACE {

// e^x with a relative error below 2e-7. 0 below the smallest normal result, infinity above 88.37, NaN stays NaN.
// x = n ln2 + r with |r| <= ln2 / 2; the Taylor polynomial of degree 7 is off by less than 6e-9 there.
inline vf exp(vf x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf shifted = fma(x, splat(1.44269504088896341f), splat(kMagic));
  const vf n = shifted - splat(kMagic);
  vf r = fma(n, splat(-0.693145751953125f), x);  // ln2 in two parts; n times the first one is exact
  r = fma(n, splat(-1.42860682030941723e-6f), r);
  vf p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const vu exponent = ((vu)shifted + 127u) << 23;  // the low bits of `shifted` are n
  vf y = p * (vf)exponent;
  y = x < splat(-87.33f) ? vf{} : y;
  return x > splat(88.37f) ? splat(std::numeric_limits<float>::infinity()) : y;
}

// 1 / (1 + e^-x)
inline vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp(vf{} - x)); }

// tanh x, off by less than 2e-7.
inline vf tanh(vf x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }

// c * tanh(x / c): a number that does not exceed the cap.
inline vf capped(vf x, float cap) { return splat(cap) * tanh(x / splat(cap)); }

// The same e^x for one number, through the same instructions (so that a lane and a scalar agree to the bit).
inline float exp_one(float x) { return exp(splat(x))[0]; }

// First n elements, the other lanes 0; n >= kLanes loads a whole vector.
inline vf load_upto(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_partial(p, n); }
inline void store_upto(float* p, vf v, int64_t n) {
  if (n >= kLanes) store(p, v);
  else store_partial(p, v, n);
}
inline vf load_upto(const bf16* p, int64_t n) { return n >= kLanes ? load_bf16(p) : load_bf16_partial(p, n); }
inline vf load_upto(const int8_t* p, int64_t n) { return n >= kLanes ? load_int8(p) : widen_partial(p, n); }
inline void store_upto(bf16* p, vf v, int64_t n) {
  if (n >= kLanes) store_bf16(p, v);
  else store_bf16_partial(p, v, n);
}

// Sum over n products a[i] * b[i], in an order that depends on n only.
inline float dot(const float* a, const float* b, int64_t n) {
  vf s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 = fma(load(a + i), load(b + i), s0);
    s1 = fma(load(a + i + kLanes), load(b + i + kLanes), s1);
    s2 = fma(load(a + i + 2 * kLanes), load(b + i + 2 * kLanes), s2);
    s3 = fma(load(a + i + 3 * kLanes), load(b + i + 3 * kLanes), s3);
  }
  for (; i < n; i += kLanes) s0 = fma(load_upto(a + i, n - i), load_upto(b + i, n - i), s0);
  return sum((s0 + s1) + (s2 + s3));
}

}  // namespace COLORA_ISA_NAMESPACE
