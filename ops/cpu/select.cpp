// contrastive_select: the next token of each request; see select.h.
#include "select.h"

#include <new>

#include "parallel.h"

// (logits, expert_rows, amateur_rows, alpha, beta, temperature, top_k, top_p, uniform) -> (ints, floats)
COLORA_OPERATOR(contrastive_select) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  call.expect(9, 2);
  const Tensor logits = call.in(0, "logits"), uniform = call.in(8, "uniform"), ints = call.out(0, "ints"),
               floats = call.out(1, "floats");
  const SelectTensors tensors{call.in(1, "expert_rows"), call.in(2, "amateur_rows"), call.in(3, "alpha"),
                              call.in(4, "beta"),        call.in(5, "temperature"),  call.in(6, "top_k"),
                              call.in(7, "top_p")};
  logits.expect_dtype("float32").expect_rank(2);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  if (vocab < 1 || vocab > std::numeric_limits<int32_t>::max())
    logits.fail("has shape %s, expected (rows, vocab) with vocab >= 1", logits.shape_text().c_str());
  const int64_t requests = tensors.check();
  uniform.expect_dtype("float32").expect_rank(1).expect_dim(0, requests, "requests, as in expert_rows");
  ints.expect_dtype("int32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, 3, "three numbers");
  floats.expect_dtype("float32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, 4, "four numbers");

  std::vector<SelectOptions> options(size_t(requests), SelectOptions{});
  for (int64_t r = 0; r < requests; ++r) {
    SelectOptions& o = options[size_t(r)];
    o = tensors.read(r, rows);
    if (o.expert >= 0 && o.temperature > 0.0f) o.uniform = checked_uniform(uniform, uniform.data<float>()[r], r);
  }

  std::vector<Choice> choices{size_t(requests)};
  const auto work = [&](int64_t r) {
    if (options[size_t(r)].expert < 0) return;
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
