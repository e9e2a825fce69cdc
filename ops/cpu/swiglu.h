// y = act(gate) * up over n elements, act: silu, or gelu by tanh (arXiv 1606.08415).
#pragma once

#include "parallel.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int64_t kSwigluGrain = 1 << 14;

// y may be gate or up.
inline void swiglu_forward(const float* gate, const float* up, int64_t n, float* y) {
  parallel_ranges(n, kLanes, kSwigluGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const vf a = load_upto(gate + i, end - i);
      store_upto(y + i, a / (splat(1.0f) + exp(vf{} - a)) * load_upto(up + i, end - i), end - i);
    }
  });
}

// With gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))); y may be gate or up.
inline void geglu_forward(const float* gate, const float* up, int64_t n, float* y) {
  parallel_ranges(n, kLanes, kSwigluGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const vf a = load_upto(gate + i, end - i);
      const vf inner = splat(0.7978845608028654f) * fma(splat(0.044715f) * a * a, a, a);
      // (1 + tanh t) / 2 = 1 / (1 + e^(-2 t))
      store_upto(y + i, a * sigmoid(inner + inner) * load_upto(up + i, end - i), end - i);
    }
  });
}

}  // namespace COLORA_ISA_NAMESPACE
