// decoder_layers: consecutive decoder layers (pre-norm attention over a key/value cache, then a gated MLP) in one call.
//
// A step of a small model is some 250 operators of 20 to 200 µs; each costs the framework more than 10 µs and leaves
// the memory idle meanwhile. Here they follow one another directly. The parts are those of multi_lora_linear,
// cached_attention, rms_norm and swiglu, so the numbers are theirs to the last bit.
//
// Inputs: x, residual (rows, tokens, hidden); slots; cos, sin; cache_rows, start, length; then kPerLayer of each layer:
//   weight and eps of the norm before attention; q, k, v (six operands each); weight and eps of the q and of the k norm
//   (or absent); k_cache, v_cache; o (six); weight and eps of the norm before the MLP; gate, up, down (six each).
//   Six operands of a linear may stand for a product of small matrices, see read_product.
// Outputs: the last layer's MLP output and the residual stream before it, both of x's shape.
#include "layers.h"

COLORA_OPERATOR(decoder_layers) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  constexpr int kFixed = 8;
  const int count = (call.count() - kFixed - 2) / kPerLayer;
  if (count < 1 || call.count() != kFixed + 2 + count * kPerLayer)
    colora::refuse("%s: got %d tensors, expected %d, %d a layer, and two outputs", call.op(), call.count(), kFixed,
                   kPerLayer);
  call.expect(kFixed + count * kPerLayer, 2);
  const Tensor x = call.in(0, "x"), residual = call.in(1, "residual"), slots = call.in(2, "slots"),
               cache_rows = call.in(5, "cache_rows"), start = call.in(6, "start"), length = call.in(7, "length"),
               y = call.out(0, "y"), total = call.out(1, "total");
  x.expect_dtype("float32").expect_rank(3);
  for (const Tensor* t : {&residual, &y, &total}) t->expect_dtype("float32").expect_same_shape(x);
  const int64_t rows = x.dim(0), tokens = x.dim(1), hidden = x.dim(2);
  if (hidden < 1) x.fail("has shape %s, expected at least one column", x.shape_text().c_str());
  if (!slots.absent()) slots.expect_dtype("int32").expect_rank(1).expect_dim(0, rows, "one slot per row of 'x'");
  LayerStack stack(call, kFixed, count, {slots, call.in(3, "cos"), call.in(4, "sin"), hidden});
  stack.check_rows(cache_rows, start, length, rows, tokens);
  if (rows * tokens == 0) return;
  stack.run({rows, tokens, slots.absent() ? nullptr : slots.data<const int32_t>(), cache_rows.data<int32_t>(),
             start.data<int32_t>(), length.data<int32_t>()},
            x.data<float>(), residual.data<float>(), y.data<float>(), total.data<float>());
}
