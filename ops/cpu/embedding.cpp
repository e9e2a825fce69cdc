// Rows of a table by token ids, widened to float32 from float32, bfloat16, int8 or packed int4.
#include "check.h"
#include "parallel.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

template <class Value>
void widen_groups(float* y, int64_t hidden, int64_t groups, const float* scale, const Value& value) {
  const int64_t size = hidden / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = g * size; i < (g + 1) * size; ++i) y[i] = value(i) * scale[g];
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (ids, weight, weight_scale or absent) -> y
COLORA_OPERATOR(embedding) {
  call.expect(3, 1);
  const Tensor ids = call.in(0, "ids"), weight = call.in(1, "weight"), scale = call.in(2, "weight_scale"),
               y = call.out(0, "y");
  ids.expect_dtype("int32");
  weight.expect_dtype("float32", "bfloat16", "int8", "uint8").expect_rank(2);
  const bool packed = weight.is("uint8"), scaled = packed || weight.is("int8");
  const int64_t vocab = weight.dim(0), hidden = weight.dim(1) * (packed ? 2 : 1), count = ids.size();
  int64_t groups = 1;
  if (scaled) {
    if (scale.absent()) scale.fail("is absent, expected (%lld,) or (%lld, groups) float32 for %s weights",
                                   (long long)vocab, (long long)vocab, weight.dtype);
    scale.expect_dtype("float32").expect_rank(1, 2).expect_dim(0, vocab, "one row a token, as in weight");
    if (scale.ndim == 2) groups = scale.dim(1);
    if (groups < 1 || hidden % groups)
      scale.fail("has %lld groups, expected a divisor of hidden=%lld", (long long)groups, (long long)hidden);
  } else if (!scale.absent()) {
    scale.fail("has shape %s, expected none for %s weights", scale.shape_text().c_str(), weight.dtype);
  }
  y.expect_dtype("float32").expect_rank(ids.ndim + 1).expect_dim(-1, hidden, "the width of weight");
  for (int i = 0; i < ids.ndim; ++i) y.expect_dim(i, ids.dim(i), "as in ids");
  const int32_t* id = ids.data<int32_t>();
  for (int64_t i = 0; i < count; ++i)
    if (id[i] < 0 || id[i] >= vocab)
      ids.fail("holds %d at index %lld, expected 0 to %lld", int(id[i]), (long long)i, (long long)vocab - 1);

  parallel_ranges(count, 1, 32768 / (hidden + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = y.data<float>() + i * hidden;
      const int64_t row = id[i];
      if (weight.is("float32")) {
        std::memcpy(out, weight.data<float>() + row * hidden, size_t(hidden) * sizeof(float));
      } else if (weight.is("bfloat16")) {
        const bf16* w = weight.data<bf16>() + row * hidden;
        for (int64_t j = 0; j < hidden; j += kLanes) store_upto(out + j, load_upto(w + j, hidden - j), hidden - j);
      } else if (packed) {
        const uint8_t* w = weight.data<uint8_t>() + row * (hidden / 2);
        widen_groups(out, hidden, groups, scale.data<float>() + row * groups,
                     [&](int64_t j) { return float(int(w[j >> 1] >> (j & 1 ? 4 : 0) & 15) - 8); });
      } else {
        const int8_t* w = weight.data<int8_t>() + row * hidden;
        widen_groups(out, hidden, groups, scale.data<float>() + row * groups, [&](int64_t j) { return float(w[j]); });
      }
    }
  });
}
