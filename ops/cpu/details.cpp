// token_details: log-probabilities of chosen tokens; see details.h.
#include "details.h"

#include <new>

#include "parallel.h"

// (logits (rows, vocab), whole, real, mix_rows, mix_weights (requests, ...), token (requests,)) -> (tops, details)
COLORA_OPERATOR(token_details) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  Reader reader(call, 0, 2);
  const Tensor logits = reader.next("logits"), whole = reader.next("whole"), real = reader.next("real"),
               rows_of = reader.next("mix_rows"), weights = reader.next("mix_weights"), token = reader.next("token");
  call.expect(reader.at(), 2);
  const Tensor tops = call.out(0, "tops"), details = call.out(1, "details");
  logits.expect_dtype("float32").expect_rank(2);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  const Options given(whole, real, rows_of, weights);
  const int64_t requests = given.requests();
  token.expect_dtype("int32").expect_rank(1).expect_dim(0, requests, "requests, as in whole");
  tops.expect_dtype("int32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, kMostTop, "tokens");
  details.expect_dtype("float32").expect_rank(2).expect_dim(0, requests, "requests").expect_dim(1, kDetails, "numbers");
  std::vector<SelectOptions> options(size_t(requests), SelectOptions{});
  for (int64_t r = 0; r < requests; ++r) {
    options[size_t(r)] = given.read(r, rows);
    const int32_t value = token.data<int32_t>()[r];
    if (options[size_t(r)].active() && (value < 0 || value >= vocab))
      token.fail("is %d in request %lld, expected 0 to %lld", value, (long long)r, (long long)vocab - 1);
  }
  std::vector<char> failed(size_t(requests), 0);
  std::vector<int32_t> found_tops(size_t(requests * kMostTop), -1);
  std::vector<float> found(size_t(requests * kDetails), 0.0f);
  const bool some = std::any_of(options.begin(), options.end(), [](const SelectOptions& o) { return o.details(); });
  parallel_rows(requests, some ? vocab : 0, [&](int64_t r) {
    const SelectOptions& o = options[size_t(r)];
    if (!o.active() || !o.details()) return;
    try {
      describe(logits.data<const float>(), vocab, o, token.data<int32_t>()[r], found_tops.data() + r * kMostTop,
               found.data() + r * kDetails);
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
      failed[size_t(r)] = 1;
    }
  });
  for (int64_t r = 0; r < requests; ++r)
    if (failed[size_t(r)]) colora::refuse("token_details: no memory for a row of %lld numbers", (long long)vocab);
  std::copy(found_tops.begin(), found_tops.end(), tops.data<int32_t>());
  std::copy(found.begin(), found.end(), details.data<float>());
}
