// y = silu(gate) * up over n elements.
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

}  // namespace COLORA_ISA_NAMESPACE
