// Threads. Every output element is computed by one thread, in an order that does not depend on the thread count, so
// results are the same for any number of threads.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>

namespace colora {
// OMP_NUM_THREADS if it is set, otherwise the number of usable cores.
int thread_count();
}  // namespace colora

namespace COLORA_ISA_NAMESPACE {

// Number of threads worth starting for `work` units when one thread should get at least `grain` of them.
inline int threads_for(int64_t work, int64_t grain) {
  const int64_t most = grain > 0 ? (work + grain - 1) / grain : work;
  const int64_t n = most < colora::thread_count() ? most : colora::thread_count();
  return n < 1 ? 1 : int(n);
}

// body(begin, end) over contiguous shares of [0, n); share borders are multiples of `align`.
template <class Body>
inline void parallel_ranges(int64_t n, int64_t align, int64_t grain, const Body& body) {
  const int threads = threads_for(n, grain);
  if (threads == 1) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t blocks = (n + align - 1) / align;
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    int64_t begin = blocks * me / all * align, end = blocks * (me + 1) / all * align;
    if (end > n) end = n;
    if (begin < end) body(begin, end);
  }
}

// body(i) for i in [0, n), handed out one at a time in ascending order (for tasks of unequal length).
template <class Body>
inline void parallel_tasks(int64_t n, const Body& body) {
  const int threads = threads_for(n, 1);
  if (threads == 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
}

}  // namespace COLORA_ISA_NAMESPACE
