// rms_norm, rms_norm_residual and their gradients. One thread computes a row, so a row's result is the same in any
// batch; the weight's gradient is summed by columns, over the rows in ascending order.
#include "norm.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

constexpr int64_t kGrain = kNormGrain;

void check_rows(const Tensor& x, const Tensor& weight) {
  x.expect_dtype("float32");
  if (x.ndim < 1) x.fail("has rank 0, expected (..., hidden)");
  weight.expect_dtype("float32", "bfloat16").expect_rank(1).expect_dim(0, x.dim(-1), "the last axis of x");
}

void check_inverse(const Tensor& inverse, const Tensor& x) {
  inverse.expect_dtype("float32");
  if (inverse.ndim != x.ndim - 1)
    inverse.fail("has shape %s, expected that of x without its last axis", inverse.shape_text().c_str());
  for (int i = 0; i < inverse.ndim; ++i) inverse.expect_dim(i, x.dim(i), "as in x");
}

int64_t rows_of(const Tensor& x) { return x.dim(-1) == 0 ? 0 : x.size() / x.dim(-1); }

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (x, weight, eps) -> (y, inverse root mean square of each row)
COLORA_OPERATOR(rms_norm) {
  call.expect(3, 2);
  const Tensor x = call.in(0, "x"), weight = call.in(1, "weight"), y = call.out(0, "y"),
               inverse = call.out(1, "inverse");
  check_rows(x, weight);
  const float eps = read_eps(call.in(2, "eps"));
  y.expect_dtype("float32").expect_same_shape(x);
  check_inverse(inverse, x);
  std::vector<float> buffer;
  const float* w = widened(weight, buffer);
  const int64_t n = x.dim(-1), rows = rows_of(x);
  parallel_ranges(rows, 1, kGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      inverse.data<float>()[r] = norm_row(x.data<float>() + r * n, w, y.data<float>() + r * n, n, eps);
  });
}

// (x, residual, weight, eps) -> (y, x + residual, inverse)
COLORA_OPERATOR(rms_norm_residual) {
  call.expect(4, 3);
  const Tensor x = call.in(0, "x"), residual = call.in(1, "residual"), weight = call.in(2, "weight"),
               y = call.out(0, "y"), total = call.out(1, "total"), inverse = call.out(2, "inverse");
  check_rows(x, weight);
  residual.expect_dtype("float32").expect_same_shape(x);
  const float eps = read_eps(call.in(3, "eps"));
  y.expect_dtype("float32").expect_same_shape(x);
  total.expect_dtype("float32").expect_same_shape(x);
  check_inverse(inverse, x);
  std::vector<float> buffer;
  const float* w = widened(weight, buffer);
  const int64_t n = x.dim(-1), rows = rows_of(x);
  add_norm_rows(x.data<float>(), residual.data<float>(), w, eps, rows, n, total.data<float>(), y.data<float>(),
                inverse.data<float>());
}

// (x, weight, inverse, dy, more or absent) -> dx (+ more):
// dx = inverse * (g - x * inverse^2 * mean(g * x)), g = dy * weight
COLORA_OPERATOR(rms_norm_grad) {
  call.expect(5, 1);
  const Tensor x = call.in(0, "x"), weight = call.in(1, "weight"), inverse = call.in(2, "inverse"),
               dy = call.in(3, "dy"), more = call.in(4, "more"), dx = call.out(0, "dx");
  check_rows(x, weight);
  check_inverse(inverse, x);
  dy.expect_dtype("float32").expect_same_shape(x);
  dx.expect_dtype("float32").expect_same_shape(x);
  if (!more.absent()) more.expect_dtype("float32").expect_same_shape(x);
  std::vector<float> buffer;
  const float* w = widened(weight, buffer);
  const int64_t n = x.dim(-1), rows = rows_of(x);
  parallel_ranges(rows, 1, kGrain / (n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *a = x.data<float>() + r * n, *d = dy.data<float>() + r * n;
      const float inv = inverse.data<float>()[r];
      vf s0{}, s1{};
      for (int64_t i = 0; i < n; i += 2 * kLanes) {
        s0 = fma(load_upto(d + i, n - i) * load_upto(w + i, n - i), load_upto(a + i, n - i), s0);
        const int64_t j = i + kLanes;
        if (j < n) s1 = fma(load_upto(d + j, n - j) * load_upto(w + j, n - j), load_upto(a + j, n - j), s1);
      }
      const vf scale = splat(inv), back = splat(-inv * inv * inv * (sum(s0 + s1) / float(n)));
      for (int64_t i = 0; i < n; i += kLanes) {
        vf value = fma(load_upto(a + i, n - i), back, load_upto(d + i, n - i) * load_upto(w + i, n - i) * scale);
        if (!more.absent()) value = value + load_upto(more.data<float>() + r * n + i, n - i);
        store_upto(dx.data<float>() + r * n + i, value, n - i);
      }
    }
  });
}

// (x, weight, inverse, dy) -> dweight (hidden,) float32 = sum over rows of dy * x * inverse
COLORA_OPERATOR(rms_norm_weight_grad) {
  call.expect(4, 1);
  const Tensor x = call.in(0, "x"), weight = call.in(1, "weight"), inverse = call.in(2, "inverse"),
               dy = call.in(3, "dy"), dweight = call.out(0, "dweight");
  check_rows(x, weight);
  check_inverse(inverse, x);
  dy.expect_dtype("float32").expect_same_shape(x);
  dweight.expect_dtype("float32").expect_rank(1).expect_dim(0, x.dim(-1), "the last axis of x");
  const int64_t n = x.dim(-1), rows = rows_of(x);
  constexpr int64_t kBlock = 64;  // rows summed before they join the total: keeps float32 sums of many rows accurate
  parallel_ranges(n, kLanes, kGrain / (rows + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
      vf total{};
      for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
        vf part{};
        for (int64_t r = r0; r < rows && r < r0 + kBlock; ++r)
          part = fma(load_upto(dy.data<float>() + r * n + i, n - i) * splat(inverse.data<float>()[r]),
                     load_upto(x.data<float>() + r * n + i, n - i), part);
        total = total + part;
      }
      store_upto(dweight.data<float>() + i, total, n - i);
    }
  });
}
