// contrastive_select: the next token of each request; see select.h.
#include "select.h"

#include <new>

#include "parallel.h"

// (logits (rows, vocab), whole, real, mix_rows, mix_weights (requests, ...), uniform (requests,)) -> (ints, floats)
COLORA_OPERATOR(contrastive_select) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  Reader reader(call, 0, 2);
  const Tensor logits = reader.next("logits"), whole = reader.next("whole"), real = reader.next("real"),
               rows_of = reader.next("mix_rows"), weights = reader.next("mix_weights"), uniform = reader.next("uniform");
  call.expect(reader.at(), 2);
  const Tensor ints = call.out(0, "ints"), floats = call.out(1, "floats");
  logits.expect_dtype("float32").expect_rank(2);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  if (vocab < 1 || vocab > std::numeric_limits<int32_t>::max())
    logits.fail("has shape %s, expected (rows, vocab) with vocab >= 1", logits.shape_text().c_str());
  const Options given(whole, real, rows_of, weights);
  const int64_t requests = given.requests();
  uniform.expect_dtype("float32").expect_rank(1).expect_dim(0, requests, "requests, as in whole");
  ints.expect_dtype("int32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, 3, "three numbers");
  floats.expect_dtype("float32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, 4, "four numbers");

  std::vector<SelectOptions> options(size_t(requests), SelectOptions{});
  for (int64_t r = 0; r < requests; ++r) {
    SelectOptions& o = options[size_t(r)];
    o = given.read(r, rows);
    if (o.active() && o.temperature > 0.0f) o.uniform = checked_uniform(uniform, uniform.data<float>()[r], r);
  }

  std::vector<Choice> choices{size_t(requests)};
  const auto work = [&](int64_t r) {
    if (!options[size_t(r)].active()) return;
    try {
      choices[size_t(r)] = choose(logits.data<float>(), vocab, options[size_t(r)]);
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
      choices[size_t(r)].error = "no memory";
    }
  };
  parallel_rows(requests, vocab, work);
  for (int64_t r = 0; r < requests; ++r)
    if (!choices[size_t(r)].error.empty())
      colora::refuse("contrastive_select: %s (request %lld), expected finite numbers",
                     choices[size_t(r)].error.c_str(), (long long)r);
  for (int64_t r = 0; r < requests; ++r)
    choices[size_t(r)].write(ints.data<int32_t>() + r * 3, floats.data<float>() + r * 4);
}
