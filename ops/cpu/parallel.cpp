// The worker threads behind parallel.h: one set for the process, started at the first call that wants them.
#include "parallel.h"

#if defined(COLORA_ISA_BASELINE)  // one copy is enough

#include <pthread.h>
#include <sched.h>

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace colora {
namespace {

thread_local int this_worker = 0;

inline void pause_a_little() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// A worker polls this often (some 300 µs) before it sleeps. The gap between two operators of a decoding step is shorter, and
// waking a sleeper costs more than most of them: with a tenth of it a second thread made a step slower.
constexpr int kPolls = 20000;

class Pool {
 public:
  void run(int64_t tasks, int threads, void (*call)(void*, int64_t), void* context) {
    start_workers(threads - 1);
    // Close the old call before its fields change: a worker that still looks at it cannot claim anything any more.
    const uint64_t generation = (state_.load(std::memory_order_relaxed) >> kIndexBits) + 1;
    state_.store(generation << kIndexBits | kClosed, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_release);
    call_.store(call, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    tasks_.store(tasks, std::memory_order_relaxed);
    threads_.store(threads, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    state_.store((generation + 1) << kIndexBits, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    while (work_once(0)) {
    }
    wait_for(finished_, tasks);
  }

  std::atomic<bool> busy{false};

 private:
  static constexpr int kIndexBits = 32;
  static constexpr uint64_t kClosed = 0xffffffffu;

  // Claims and runs one task of the present call; false if there is none for this worker.
  bool work_once(int worker) {
    uint64_t seen = state_.load(std::memory_order_seq_cst);
    for (;;) {
      const uint64_t index = seen & kClosed;
      if (index == kClosed) return false;
      // These may belong to a later call; then `state_` has changed too and the claim below fails.
      const auto call = call_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      if (int64_t(index) >= tasks_.load(std::memory_order_relaxed) || worker >= threads_.load(std::memory_order_relaxed))
        return false;
      std::atomic_thread_fence(std::memory_order_acquire);
      if (!state_.compare_exchange_weak(seen, seen + 1, std::memory_order_seq_cst)) continue;
      call(context, int64_t(index));
      finished_.fetch_add(1, std::memory_order_release);
      return true;
    }
  }

  void start_workers(int wanted) {
    for (; started_ < wanted; ++started_) std::thread(&Pool::serve, this, started_ + 1).detach();
  }

  void serve(int worker) {
    this_worker = worker;
    uint64_t last = 0;
    for (int polls = 0;;) {
      if (work_once(worker)) {
        polls = 0;
        continue;
      }
      const uint64_t now = state_.load(std::memory_order_relaxed) >> kIndexBits;
      if (now != last) {
        last = now;
        polls = 0;
      }
      if (++polls < kPolls) {
        pause_a_little();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return state_.load(std::memory_order_seq_cst) >> kIndexBits != last; });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      polls = 0;
    }
  }

  alignas(64) std::atomic<uint64_t> state_{kClosed};  // number of the call, next task
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<void (*)(void*, int64_t)> call_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> tasks_{0};
  std::atomic<int> threads_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  int started_ = 0;
};

// Never destroyed: workers may outlive the end of main. A forked child has no workers and starts its own.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  Pool* present = pool.load(std::memory_order_acquire);
  if (present) return present;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(present, fresh)) return fresh;
  delete fresh;
  return present;
}

}  // namespace

int worker_index() { return this_worker; }

void wait_for(const std::atomic<int64_t>& counter, int64_t wanted) {
  for (int polls = 0; counter.load(std::memory_order_acquire) < wanted; ++polls) {
    if (polls < 3000)
      pause_a_little();
    else
      sched_yield();  // the thread that holds the last task may be waiting for this core
  }
}

void run_tasks(int64_t tasks, int threads, void (*call)(void*, int64_t), void* context) {
  constexpr int64_t kMost = 0xfffffffe;
  Pool* workers = threads > 1 && tasks > 1 && tasks < kMost && this_worker == 0 ? the_pool() : nullptr;
  if (!workers || workers->busy.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < tasks; ++i) call(context, i);
    return;
  }
  workers->run(tasks, threads, call, context);
  workers->busy.store(false, std::memory_order_release);
}

}  // namespace colora

#endif
