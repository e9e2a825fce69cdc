// The operator paged_attention: one layer's attention over the paged cache, see paged.h.
#include "paged.h"

// (q, k, v, cos, sin, k_cache, v_cache, rows, positions, tables[, form]) -> out. form (3,) float32: window, cap and factor
// of the scores, as in PagedSizes; a factor of 0: the usual one.
COLORA_OPERATOR(paged_attention) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  const bool formed = call.count() == 12;
  call.expect(formed ? 11 : 10, 1);
  const Tensor q = call.in(0, "q"), k = call.in(1, "k"), v = call.in(2, "v"), cos = call.in(3, "cos"),
               sin = call.in(4, "sin"), k_cache = call.in(5, "k_cache"), v_cache = call.in(6, "v_cache"),
               rows = call.in(7, "rows"), positions = call.in(8, "positions"), tables = call.in(9, "tables"),
               out = call.out(0, "out");
  for (const Tensor* t : {&q, &k, &v}) t->expect_dtype("float32").expect_rank(2);
  PagedSizes n = paged_sizes(k_cache, v_cache, cos, sin, q.dim(1), q);
  if (formed) {
    const Tensor form = call.in(10, "form");
    form.expect_dtype("float32").expect_rank(1).expect_dim(0, 3, "window, cap and factor");
    for (int i = 0; i < 3; ++i)
      if (!(form.data<float>()[i] >= 0.0f) || form.data<float>()[i] > float(1 << 30))
        form.fail("is %g at %d, expected a number >= 0", double(form.data<float>()[i]), i);
    n.window = int64_t(form.data<float>()[0]), n.cap = form.data<float>()[1];
    if (form.data<float>()[2] > 0.0f) n.factor = form.data<float>()[2];
  }
  k.expect_dim(0, q.dim(0), "tokens, as in q").expect_dim(1, n.kv_heads * n.dim, "kv_heads * head_dim");
  v.expect_same_shape(k);
  out.expect_dtype("float32").expect_same_shape(q);
  for (const Tensor* t : {&rows, &positions})
    t->expect_dtype("int32").expect_rank(1).expect_dim(0, q.dim(0), "tokens, as in q");
  tables.expect_dtype("int32").expect_rank(2);
  const FlatBatch batch{rows.data<int32_t>(), positions.data<int32_t>(), tables.data<int32_t>(), q.dim(0), tables.dim(0),
                        tables.dim(1)};
  std::vector<Segment> segments = segments_of(batch, rows, positions, cos.dim(0));
  std::vector<int64_t> first(size_t(batch.table_rows), 0), last(size_t(batch.table_rows), -1);
  for (const Segment& s : segments) first[size_t(s.row)] = s.start, last[size_t(s.row)] = s.start + s.count - 1;
  check_blocks(batch, tables, first, last, n.blocks);
  std::fill(out.data<float>(), out.data<float>() + out.size(), 0.0f);
  PagedAttention attention;
  attention.begin(batch, std::move(segments));
  attention.run(n, q.data<float>(), k.data<float>(), v.data<float>(), cos.data<float>(), sin.data<float>(), k_cache.raw,
                v_cache.raw, out.data<float>());
}
