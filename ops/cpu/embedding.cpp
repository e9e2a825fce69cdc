// embedding: rows of a table by token ids.
#include "embedding.h"

// (ids, weight, weight_scale or absent) -> y
COLORA_OPERATOR(embedding) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  call.expect(3, 1);
  const Tensor ids = call.in(0, "ids"), weight = call.in(1, "weight"), scale = call.in(2, "weight_scale"),
               y = call.out(0, "y");
  ids.expect_dtype("int32");
  const Weight table = weight_of(weight, scale, -1);
  y.expect_dtype("float32").expect_rank(ids.ndim + 1).expect_dim(-1, table.in, "the width of weight");
  for (int i = 0; i < ids.ndim; ++i) y.expect_dim(i, ids.dim(i), "as in ids");
  check_ids(ids, table.out);
  embed_rows(table, ids.data<int32_t>(), ids.size(), y.data<float>());
}
