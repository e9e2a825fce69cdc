// adjust_logits: logits with their requests' penalties, bias and masks; see adjust.h.
#include "adjust.h"

#include "parallel.h"

// (logits (rows, vocab), whole, real, mix_rows, mix_weights, entries, bias, offsets, mask) -> adjusted (rows, vocab)
COLORA_OPERATOR(adjust_logits) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  Reader reader(call, 0, 1);
  const Tensor logits = reader.next("logits"), whole = reader.next("whole"), real = reader.next("real"),
               rows_of = reader.next("mix_rows"), weights = reader.next("mix_weights"), entries = reader.next("entries"),
               bias = reader.next("bias"), offsets = reader.next("offsets"), mask = reader.next("mask");
  call.expect(reader.at(), 1);
  const Tensor out = call.out(0, "adjusted");
  logits.expect_dtype("float32").expect_rank(2);
  out.expect_dtype("float32").expect_same_shape(logits);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  const Options given(whole, real, rows_of, weights);
  const Adjustments all(given, entries, bias, offsets, mask, vocab);
  std::vector<Adjustment> adjustments(size_t(given.requests()));
  std::vector<int64_t> user(size_t(rows), -1);
  for (int64_t r = 0; r < given.requests(); ++r) {
    const SelectOptions o = given.read(r, rows);
    if (!o.active()) continue;
    adjustments[size_t(r)] = all.read(r);
    for (int k = 0; k < o.count; ++k) {
      int64_t& mine = user[size_t(o.rows[k])];
      if (mine >= 0 && mine != r && (adjustments[size_t(r)].any() || adjustments[size_t(mine)].any()))
        rows_of.fail("is %lld in requests %lld and %lld, expected a row of its own for what adjusts its logits",
                     (long long)o.rows[k], (long long)mine, (long long)r);
      mine = r;
    }
  }
  const float* from = logits.data<const float>();
  float* to = out.data<float>();
  parallel_rows(rows, vocab, [&](int64_t row) {
    std::copy(from + row * vocab, from + (row + 1) * vocab, to + row * vocab);
    if (user[size_t(row)] >= 0) adjustments[size_t(user[size_t(row)])].apply(to + row * vocab, vocab);
  });
}
