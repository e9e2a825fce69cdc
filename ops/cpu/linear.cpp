// multi_lora_linear: y = x·Wᵀ + b + scale[slot]·(x·down[slot]ᵀ)·up[slot]ᵀ for 1 to 4 linears that share x.
//
// Inputs: x (rows, tokens, in) or (rows, in) float32; slots (rows,) int32 or absent; then the tensors of each linear, see
// operands.h. Outputs: one y per linear.
#include "linear.h"

COLORA_OPERATOR(multi_lora_linear) {
  using namespace COLORA_ISA_NAMESPACE;
  Reader reader(call, 0, 1);
  const colora::Tensor x = reader.next("x"), slots = reader.next("slots");
  x.expect_dtype("float32").expect_rank(2, 3);
  const int64_t in = x.dim(-1), rows = x.dim(0), per_row = x.ndim == 3 ? x.dim(1) : 1, tokens = rows * per_row;
  if (in < 1) x.fail("has shape %s, expected at least one column", x.shape_text().c_str());
  if (!slots.absent()) slots.expect_dtype("int32").expect_rank(1).expect_dim(0, rows, "one slot per row of 'x'");

  std::vector<Linear> linears;
  // Behind the last linear stand as many outputs as there are linears.
  do linears.push_back(read_linear(reader, in, slots));
  while (reader.at() + int(linears.size()) < call.count());
  const int n = int(linears.size());
  call.expect(reader.at(), n);
  for (int i = 0; i < n; ++i) {
    Linear& l = linears[size_t(i)];
    const colora::Tensor y = call.out(i, "y");
    y.expect_dtype("float32").expect_rank(x.ndim).expect_dim(0, rows, "the rows of 'x'");
    if (x.ndim == 3) y.expect_dim(1, per_row, "the tokens of 'x'");
    y.expect_dim(-1, l.out(), "the output rows of the weight");
    l.y = y.data<float>();  // (rows, tokens, out)
  }
  if (tokens == 0) return;
  RowSlots row_slots;
  row_slots.set(tokens, per_row, slots.absent() ? nullptr : slots.data<const int32_t>());
  run_linears(linears, x.data<const float>(), in, row_slots);
}
