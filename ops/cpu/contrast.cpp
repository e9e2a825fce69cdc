// contrast_strength: the weight beta that an adaptive contrast gives to the amateur at this step, for each request.
#include "contrast.h"

#include <new>

#include "parallel.h"

// (logits, expert_rows, amateur_rows, alpha, beta, mode, previous, prompt, lengths) -> strength
COLORA_OPERATOR(contrast_strength) {
  using namespace COLORA_ISA_NAMESPACE;
  using colora::Tensor;
  call.expect(9, 1);
  const Tensor logits = call.in(0, "logits"), expert_rows = call.in(1, "expert_rows"),
               amateur_rows = call.in(2, "amateur_rows"), alpha = call.in(3, "alpha"), beta = call.in(4, "beta"),
               mode = call.in(5, "mode"), previous = call.in(6, "previous"), prompt = call.in(7, "prompt"),
               lengths = call.in(8, "lengths"), out = call.out(0, "strength");
  logits.expect_dtype("float32").expect_rank(2);
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  if (vocab < 1) logits.fail("has shape %s, expected (rows, vocab) with vocab >= 1", logits.shape_text().c_str());
  expert_rows.expect_dtype("int32").expect_rank(1);
  const int64_t requests = expert_rows.dim(0);
  for (const Tensor* t : {&amateur_rows, &mode, &previous, &lengths})
    t->expect_dtype("int32").expect_rank(1).expect_dim(0, requests, "requests, as in expert_rows");
  for (const Tensor* t : {&alpha, &beta, &out})
    t->expect_dtype("float32").expect_rank(1).expect_dim(0, requests, "requests, as in expert_rows");
  prompt.expect_dtype("int32").expect_rank(2).expect_dim(0, requests, "requests, as in expert_rows");
  const int64_t width = prompt.dim(1);

  std::vector<StrengthOptions> options(static_cast<size_t>(requests));
  for (int64_t r = 0; r < requests; ++r) {
    StrengthOptions& o = options[size_t(r)];
    o.expert = expert_rows.data<int32_t>()[r];
    o.amateur = amateur_rows.data<int32_t>()[r];
    const auto row = [&](const Tensor& t, int64_t value) {
      if (value < -1 || value >= rows)
        t.fail("is %lld in request %lld, expected -1 (none) or 0 to %lld", (long long)value, (long long)r,
               (long long)rows - 1);
    };
    row(expert_rows, o.expert);
    if (o.expert < 0) continue;
    row(amateur_rows, o.amateur);
    if (o.amateur < 0) continue;
    o.alpha = alpha.data<float>()[r];
    o.beta = beta.data<float>()[r];
    o.mode = checked_mode(mode, r);
    o.previous = previous.data<int32_t>()[r];
    o.length = checked_length(lengths, r, width);
    o.prompt = prompt.data<int32_t>() + r * width;
    if (!(o.alpha > 0.0f && o.alpha <= 1.0f))
      alpha.fail("is %g in request %lld, expected a number in (0, 1]", double(o.alpha), (long long)r);
    if (!(o.beta >= 0.0f && std::isfinite(o.beta)))
      beta.fail("is %g in request %lld, expected a finite number >= 0", double(o.beta), (long long)r);
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
