// What the machine can do, for the benchmarks: reading memory and multiply-adds with the threads of the operators.
//
// measure_read: input x (n,) float32; output (1,): the sum. Reads x once, in contiguous shares per thread.
// measure_fma:  input rounds (1,) int32; output (1,) float32: floating-point operations done, in units of 1e6.
#include "check.h"
#include "parallel.h"
#include "simd.h"

COLORA_OPERATOR(measure_read) {
  using namespace COLORA_ISA_NAMESPACE;
  call.expect(1, 1);
  const colora::Tensor x = call.in(0, "x"), result = call.out(0, "result");
  x.expect_dtype("float32").expect_rank(1);
  result.expect_dtype("float32").expect_rank(1).expect_dim(0, 1, "one number");
  const float* from = x.data<const float>();
  std::atomic<float> total{0};
  constexpr int kStreams = 8;
  parallel_ranges(x.size(), kStreams * kLanes, 1 << 14, [&](int64_t begin, int64_t end) {
    vf sums[kStreams] = {};
    int64_t i = begin;
    for (; i + kStreams * kLanes <= end; i += kStreams * kLanes)
      for (int s = 0; s < kStreams; ++s) {
        prefetch(from + i + s * kLanes + 1024);
        sums[s] += load(from + i + s * kLanes);
      }
    float mine = 0;
    for (int s = 0; s < kStreams; ++s) mine += sum(sums[s]);
    for (; i < end; ++i) mine += from[i];
    float before = total.load();
    while (!total.compare_exchange_weak(before, before + mine)) {
    }
  });
  result.data<float>()[0] = total.load();
}

COLORA_OPERATOR(measure_fma) {
  using namespace COLORA_ISA_NAMESPACE;
  call.expect(1, 1);
  const colora::Tensor rounds = call.in(0, "rounds"), result = call.out(0, "result");
  rounds.expect_dtype("int32").expect_rank(1).expect_dim(0, 1, "one number");
  result.expect_dtype("float32").expect_rank(1).expect_dim(0, 1, "one number");
  const int64_t n = rounds.data<const int32_t>()[0];
  constexpr int kSums = 12;
  std::atomic<int> kept{0};
  const int threads = colora::thread_count();
  parallel_tasks(threads, threads, [&](int64_t) {
    vf sums[kSums];
    for (int s = 0; s < kSums; ++s) sums[s] = splat(float(s) * 1e-3f);
    vf a = splat(0.999f), b = splat(1e-3f);
    for (int64_t i = 0; i < n; ++i) {
      // Hides the values from the compiler, so that the chain of multiply-adds stays.
      asm volatile("" : "+m"(a), "+m"(b));
      for (int k = 0; k < 8; ++k)
        for (int s = 0; s < kSums; ++s) sums[s] = fma(sums[s], a, b);
    }
    float mine = 0;
    for (int s = 0; s < kSums; ++s) mine += sum(sums[s]);
    if (mine > 0) kept.fetch_add(1);
  });
  result.data<float>()[0] = kept.load() ? float(2.0 * 8 * kSums * kLanes * double(n) * threads / 1e6) : 0.f;
}
