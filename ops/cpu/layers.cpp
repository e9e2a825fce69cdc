// decoder_layers: consecutive decoder layers (pre-norm attention over a key/value cache, then a gated MLP) in one call.
//
// A step of a small model is some 250 operators of 20 to 200 µs; each costs the framework more than 10 µs and leaves
// the memory idle meanwhile. Here they follow one another directly. The parts are those of multi_lora_linear,
// cached_attention, rms_norm and swiglu, so the numbers are theirs to the last bit.
//
// Inputs: those of COLORA_LAYERS_ARGUMENTS, x and residual (rows, tokens, hidden), then the layers; see operands.h.
// Outputs: the last layer's MLP output and the residual stream before it, both of x's shape.
#include "layers.h"

COLORA_OPERATOR(decoder_layers) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  using A = LayersArgument;
  constexpr int kOutputs = 2;
  Reader reader(call, int(A::count), kOutputs);
  const Tensor x = in(call, A::x), residual = in(call, A::residual), slots = in(call, A::slots),
               cache_rows = in(call, A::cache_rows), start = in(call, A::start), length = in(call, A::length);
  x.expect_dtype("float32").expect_rank(3);
  residual.expect_dtype("float32").expect_same_shape(x);
  const int64_t rows = x.dim(0), tokens = x.dim(1), hidden = x.dim(2);
  if (hidden < 1) x.fail("has shape %s, expected at least one column", x.shape_text().c_str());
  if (!slots.absent()) slots.expect_dtype("int32").expect_rank(1).expect_dim(0, rows, "one slot per row of 'x'");
  LayerStack stack(reader, {slots, in(call, A::cos), in(call, A::sin), hidden});
  call.expect(reader.at(), kOutputs);
  const Tensor y = call.out(0, "y"), total = call.out(1, "total");
  for (const Tensor* t : {&y, &total}) t->expect_dtype("float32").expect_same_shape(x);
  stack.check_rows(cache_rows, start, length, rows, tokens);
  if (rows * tokens == 0) return;
  RowSlots row_slots;
  row_slots.set(rows * tokens, tokens, slots.absent() ? nullptr : slots.data<const int32_t>());
  stack.run({rows, tokens, row_slots, cache_rows.data<int32_t>(), start.data<int32_t>(), length.data<int32_t>()},
            x.data<float>(), residual.data<float>(), y.data<float>(), total.data<float>());  // (rows, tokens, hidden)
}
