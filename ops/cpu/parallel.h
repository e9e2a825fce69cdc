// Threads. Every output element is computed by one thread, in an order that does not depend on the thread count, so
// results are the same for any number of threads.
//
// A call is cut into tasks that the calling thread and the workers claim one by one. The caller never waits for a
// worker that has not claimed anything: if the machine is busy and a worker does not get a core, the caller does the
// work alone. (OpenMP's regions end with a barrier of all threads; with other processes on the cores a call of 50 µs
// was seen to take 10 ms there.)
#pragma once

#include <atomic>
#include <cstdint>

namespace colora {

// COLORA_NUM_THREADS if it is set, otherwise the number of usable cores.
int thread_count();

// Which of the threads of the running call this is: 0 (the caller) to threads - 1.
int worker_index();

// call(context, i) for i in [0, tasks), by up to `threads` threads, claimed in ascending order. Returns when all are
// done. Inside a task, or while another thread's call has the workers, the tasks run in the calling thread.
void run_tasks(int64_t tasks, int threads, void (*call)(void* context, int64_t i), void* context);

// Returns when `counter` has reached `wanted`, which tasks of the same call that were claimed earlier count up.
void wait_for(const std::atomic<int64_t>& counter, int64_t wanted);

}  // namespace colora

namespace COLORA_ISA_NAMESPACE {

using colora::worker_index;

// Number of threads worth starting for `work` units when one thread should get at least `grain` of them.
inline int threads_for(int64_t work, int64_t grain) {
  const int64_t most = grain > 0 ? (work + grain - 1) / grain : work;
  const int64_t n = most < colora::thread_count() ? most : colora::thread_count();
  return n < 1 ? 1 : int(n);
}

// body(i) for i in [0, n) by up to `threads` threads.
template <class Body>
inline void parallel_tasks(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  colora::run_tasks(
      n, threads, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <class Body>
inline void parallel_tasks(int64_t n, const Body& body) {
  parallel_tasks(n, threads_for(n, 1), body);
}

// body(r) for r in [0, rows) where each looks through `size` elements; little work stays in the calling thread.
template <class Body>
inline void parallel_rows(int64_t rows, int64_t size, const Body& body) {
  constexpr int64_t kLeast = 1 << 18;  // elements that are worth starting threads
  parallel_tasks(rows, rows * size < kLeast ? 1 : threads_for(rows, 1), body);
}

// body(begin, end) over contiguous shares of [0, n), a few per thread; share borders are multiples of `align`.
template <class Body>
inline void parallel_ranges(int64_t n, int64_t align, int64_t grain, const Body& body) {
  const int threads = threads_for(n, grain);
  if (threads == 1) {
    if (n > 0) body(int64_t(0), n);
    return;
  }
  const int64_t blocks = (n + align - 1) / align;
  int64_t shares = grain > 0 ? n / grain : n;
  if (shares > 4 * threads) shares = 4 * threads;
  if (shares < threads) shares = threads;
  parallel_tasks(shares, threads, [&](int64_t i) {
    const int64_t begin = blocks * i / shares * align;
    int64_t end = blocks * (i + 1) / shares * align;
    if (end > n) end = n;
    if (begin < end) body(begin, end);
  });
}

}  // namespace COLORA_ISA_NAMESPACE
