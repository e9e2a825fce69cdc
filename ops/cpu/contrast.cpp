// contrast_strength: the weight beta that an adaptive contrast gives to the amateur at this step, for each request.
#include "contrast.h"

#include <new>

#include "parallel.h"

// (logits (rows, vocab), options (options.h), previous (requests,), prompt (requests, width), lengths (requests,))
// -> strength (requests,)
COLORA_OPERATOR(contrast_strength) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  Reader reader(call, 0, 1);
  const Tensor logits = reader.next("logits"), whole = reader.next("whole"), real = reader.next("real"),
               rows_of = reader.next("mix_rows"), weights = reader.next("mix_weights"),
               previous = reader.next("previous"), prompt = reader.next("prompt"), lengths = reader.next("lengths");
  call.expect(reader.at(), 1);
  const Tensor out = call.out(0, "strength");
  logits.expect_dtype("float32").expect_rank(2);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  if (vocab < 1) logits.fail("has shape %s, expected (rows, vocab) with vocab >= 1", logits.shape_text().c_str());
  const Options given(whole, real, rows_of, weights);
  const int64_t requests = given.requests();
  for (const Tensor* t : {&previous, &lengths})
    t->expect_dtype("int32").expect_rank(1).expect_dim(0, requests, "requests, as in whole");
  out.expect_dtype("float32").expect_rank(1).expect_dim(0, requests, "requests, as in whole");
  prompt.expect_dtype("int32").expect_rank(2).expect_dim(0, requests, "requests, as in whole");
  const int64_t width = prompt.dim(1);

  std::vector<StrengthOptions> options(static_cast<size_t>(requests));
  for (int64_t r = 0; r < requests; ++r) {
    StrengthOptions& o = options[size_t(r)];
    o.expert = given.row(r, 0, rows, "none");
    if (o.expert < 0) continue;
    o.amateur = given.row(r, 1, rows, "none");
    if (given.get(r, Whole::mixing) != int32_t(Mixing::contrast)) o.amateur = -1;
    if (o.amateur < 0) continue;
    o.mode = checked_mode(given, r);
    o.previous = previous.data<int32_t>()[r];
    o.length = checked_length(lengths, r, width);
    o.prompt = prompt.data<int32_t>() + r * width;
    o.alpha = given.alpha(r);
    o.beta = given.beta(r);
  }

  std::vector<float> strength(static_cast<size_t>(requests), 0.0f);
  std::vector<char> failed(static_cast<size_t>(requests), 0);
  const auto work = [&](int64_t r) {
    const StrengthOptions& o = options[size_t(r)];
    if (o.expert < 0 || o.amateur < 0 || o.beta == 0.0f) return;
    try {
      strength[size_t(r)] = o.mode ? o.beta * strength_share(logits.data<float>(), vocab, o) : o.beta;
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
      failed[size_t(r)] = 1;
    }
  };
  const bool adaptive = std::any_of(options.begin(), options.end(), [](const StrengthOptions& o) { return o.mode != 0; });
  parallel_rows(requests, adaptive ? vocab : 0, work);
  for (int64_t r = 0; r < requests; ++r)
    if (failed[size_t(r)]) colora::refuse("contrast_strength: no memory for two rows of %lld numbers", (long long)vocab);
  std::copy(strength.begin(), strength.end(), out.data<float>());
}
