// embedding: rows of a table by token ids.
#include "embedding.h"

#include "operands.h"

// (ids, the tensors of a linear's base, its tag first) -> y
COLORA_OPERATOR(embedding) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  Reader reader(call, 0, 1);
  const Tensor ids = reader.next("ids");
  ids.expect_dtype("int32");
  const Base base = read_base(reader, Tag::of(reader.next("embedding")), -1);
  if (base.product() || base.bias) base.last.fail("is a factor of a product or has a bias, expected one matrix");
  if (base.order) base.last.fail("has columns in an order of its own, which a linear can have, a table not");
  call.expect(reader.at(), 1);
  const Weight& table = base.matrix();
  const Tensor y = call.out(0, "y");
  y.expect_dtype("float32").expect_rank(ids.ndim + 1).expect_dim(-1, table.in, "the width of weight");
  for (int i = 0; i < ids.ndim; ++i) y.expect_dim(i, ids.dim(i), "as in ids");
  check_ids(ids, table.out);
  embed_rows(table, ids.data<int32_t>(), ids.size(), y.data<float>());
}
