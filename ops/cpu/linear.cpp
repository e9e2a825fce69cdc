// multi_lora_linear: y = x·Wᵀ + b + scale[slot]·(x·down[slot]ᵀ)·up[slot]ᵀ for 1 to 4 linears that share x.
//
// Inputs: x (rows, tokens, in) or (rows, in) float32; slots (rows,) int32 or absent; then six tensors per linear:
// weight, weight_scale, bias, down, up, scale. Outputs: one y per linear.
#include "linear.h"

COLORA_OPERATOR(multi_lora_linear) {
  using namespace COLORA_ISA_NAMESPACE;
  // 2 inputs, then 6 operands and 1 output per linear
  const int n = (call.count() - 2) / 7;
  if (call.count() < 9 || call.count() != 2 + 7 * n)
    colora::refuse("%s: got %d tensors, expected x, slots, six operands and one output per linear", call.op(),
                   call.count());
  call.expect(2 + 6 * n, n);
  const colora::Tensor x = call.in(0, "x"), slots = call.in(1, "slots");
  x.expect_dtype("float32").expect_rank(2, 3);
  const int64_t in = x.dim(-1), rows = x.dim(0), per_row = x.ndim == 3 ? x.dim(1) : 1, tokens = rows * per_row;
  if (in < 1) x.fail("has shape %s, expected at least one column", x.shape_text().c_str());
  if (!slots.absent()) slots.expect_dtype("int32").expect_rank(1).expect_dim(0, rows, "one slot per row of 'x'");

  std::vector<Linear> linears;
  for (int i = 0; i < n; ++i) {
    linears.push_back(read_linear(call, 2 + 6 * i, in, slots));
    const colora::Tensor y = call.out(i, "y");
    y.expect_dtype("float32").expect_rank(x.ndim).expect_dim(0, rows, "the rows of 'x'");
    if (x.ndim == 3) y.expect_dim(1, per_row, "the tokens of 'x'");
    y.expect_dim(-1, linears.back().weight.out, "the output rows of the weight");
    linears.back().y = y.data<float>();
  }
  if (tokens > 0)
    run_linears(linears, x.data<const float>(), tokens, per_row, in, slots.absent() ? nullptr : slots.data<const int32_t>());
}
