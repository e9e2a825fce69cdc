// swiglu = silu(gate) * up, and its gradient.
#include "check.h"
#include "swiglu.h"

namespace COLORA_ISA_NAMESPACE {
namespace {
using colora::Tensor;
constexpr int64_t kGrain = kSwigluGrain;
}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (gate, up) -> y
COLORA_OPERATOR(swiglu) {
  call.expect(2, 1);
  const Tensor gate = call.in(0, "gate"), up = call.in(1, "up"), y = call.out(0, "y");
  gate.expect_dtype("float32");
  up.expect_dtype("float32").expect_same_shape(gate);
  y.expect_dtype("float32").expect_same_shape(gate);
  swiglu_forward(gate.data<float>(), up.data<float>(), gate.size(), y.data<float>());
}

// (gate, up, dy) -> (dgate, dup): with s = sigmoid(gate), d silu / d gate = s * (1 + gate * (1 - s))
COLORA_OPERATOR(swiglu_grad) {
  call.expect(3, 2);
  const Tensor gate = call.in(0, "gate"), up = call.in(1, "up"), dy = call.in(2, "dy"), dgate = call.out(0, "dgate"),
               dup = call.out(1, "dup");
  gate.expect_dtype("float32");
  for (const Tensor* t : {&up, &dy, &dgate, &dup}) t->expect_dtype("float32").expect_same_shape(gate);
  const float *g = gate.data<float>(), *u = up.data<float>(), *d = dy.data<float>();
  parallel_ranges(gate.size(), kLanes, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t left = end - i;
      const vf a = load_upto(g + i, left), b = load_upto(u + i, left), c = load_upto(d + i, left), s = sigmoid(a);
      store_upto(dup.data<float>() + i, c * a * s, left);
      store_upto(dgate.data<float>() + i, c * b * s * (splat(1.0f) + a * (splat(1.0f) - s)), left);
    }
  });
}
