// Choice of the instruction set, thread count, and the text of the last refusal. Compiled once (baseline only).
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

#include "check.h"
#include "parallel.h"

namespace colora {
namespace {

enum Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kUnknown = 3 };
const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};

std::mutex error_mutex;
std::string error_text;

Isa supported_isa() {
#if defined(COLORA_HAVE_X86_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

// A wish above what the machine can do is lowered to what it can do.
Isa named_isa(const char* name) {
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(name, kIsaNames[i]) == 0) return Isa(i) < supported_isa() ? Isa(i) : supported_isa();
  return kUnknown;
}

std::atomic<int> active_isa{[] {
  const char* wish = std::getenv("COLORA_CPU_ISA");
  return int(wish && *wish ? named_isa(wish) : supported_isa());
}()};

std::atomic<int> threads{[] {
  // Not OMP_NUM_THREADS: MindSpore sets that to 1 in the running process. The package copies the user's value.
  const char* wish = std::getenv("COLORA_NUM_THREADS");
  int n = wish ? std::atoi(wish) : 0;
  if (n > 0) return n;
#if defined(__linux__)
  cpu_set_t allowed;  // fewer than the machine has inside a container or under taskset
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) n = CPU_COUNT(&allowed);
#endif
  return n > 0 ? n : std::max(1, int(std::thread::hardware_concurrency()));
}()};

void keep_error(const char* text) {
  std::lock_guard<std::mutex> lock(error_mutex);
  error_text = text;
}

std::string format_text(const char* format, va_list arguments) {
  char buffer[1024];
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}

}  // namespace

int thread_count() { return threads.load(std::memory_order_relaxed); }

void refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_text(format, arguments);
  va_end(arguments);
  throw Refused(std::move(text));
}

bool Tensor::is(const char* wanted_dtype) const { return std::strcmp(dtype, wanted_dtype) == 0; }

std::string Tensor::shape_text() const {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

void Tensor::fail(const char* format, ...) const {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_text(format, arguments);
  va_end(arguments);
  refuse("%s: argument '%s' %s", op, name, text.c_str());
}

const Tensor& Tensor::expect_dtype(const char* a, const char* b, const char* c, const char* d) const {
  std::string wanted;
  for (const char* option : {a, b, c, d}) {
    if (!option) continue;
    if (is(option)) return *this;
    wanted += (wanted.empty() ? "" : " or ") + std::string(option);
  }
  fail("has dtype %s, expected %s", dtype, wanted.c_str());
}

const Tensor& Tensor::expect_rank(int low, int high) const {
  if (high < 0) high = low;
  if (ndim >= low && ndim <= high) return *this;
  if (low == high) fail("has shape %s of rank %d, expected rank %d", shape_text().c_str(), ndim, low);
  fail("has shape %s of rank %d, expected rank %d to %d", shape_text().c_str(), ndim, low, high);
}

const Tensor& Tensor::expect_dim(int i, int64_t wanted, const char* because) const {
  if (dim(i) != wanted)
    fail("has shape %s, expected %lld in dimension %d (%s)", shape_text().c_str(), (long long)wanted,
         i < 0 ? ndim + i : i, because);
  return *this;
}

const Tensor& Tensor::expect_same_shape(const Tensor& other) const {
  bool same = ndim == other.ndim;
  for (int i = 0; same && i < ndim; ++i) same = shape[i] == other.shape[i];
  if (!same) fail("has shape %s, expected %s like '%s'", shape_text().c_str(), other.shape_text().c_str(), other.name);
  return *this;
}

void Call::expect(int inputs, int outputs) {
  if (count_ != inputs + outputs)
    refuse("%s: got %d tensors, expected %d inputs and %d outputs", op_, count_, inputs, outputs);
  inputs_ = inputs;
}

Tensor Call::tensor(int i, const char* name) const {
  if (i < 0 || i >= count_) refuse("%s: argument '%s' is missing (%d tensors given)", op_, name, count_);
  Tensor t;
  t.op = op_;
  t.name = name;
  t.raw = params_[i];
  t.ndim = ndims_[i];
  t.shape = shapes_[i];
  t.dtype = dtypes_[i];
  return t;
}

void check_slots(const Tensor& numbers, int64_t slots) {
  numbers.expect_dtype("int32");
  const int32_t* value = numbers.data<int32_t>();
  const int64_t n = numbers.size();
  for (int64_t i = 0; i < n; ++i)
    if (value[i] < -1 || value[i] >= slots)
      numbers.fail("holds slot %d at index %lld, expected -1 (no adapter) or 0 to %lld", int(value[i]), (long long)i,
                   (long long)slots - 1);
}

int run(const char* op, const Operator* table, int nparam, void** params, int* ndims, int64_t** shapes,
        const char** dtypes) {
  const int isa = active_isa.load(std::memory_order_relaxed);
  try {
    if (isa == kUnknown)
      refuse("%s: COLORA_CPU_ISA is '%s', expected avx512, avx2 or baseline", op, std::getenv("COLORA_CPU_ISA"));
    Call call(op, nparam, params, ndims, shapes, dtypes);
    table[isa](call);
    return 0;
  } catch (const Refused& refused) {
    keep_error(refused.what());
    return 1;
  } catch (const std::bad_alloc&) {
    keep_error((std::string(op) + ": out of memory for scratch buffers").c_str());
    return 2;
  } catch (const std::exception& error) {
    keep_error((std::string(op) + ": " + error.what()).c_str());
    return 3;
  }
}

}  // namespace colora

#define COLORA_PUBLIC extern "C" __attribute__((visibility("default")))

// Text of the last refusal of any thread; the pointer stays valid in the calling thread until its next call.
COLORA_PUBLIC const char* colora_last_error() {
  thread_local std::string copy;
  std::lock_guard<std::mutex> lock(colora::error_mutex);
  copy = colora::error_text;
  return copy.c_str();
}

// Name of the instruction set in use.
COLORA_PUBLIC const char* colora_isa() {
  const int isa = colora::active_isa.load();
  return isa == colora::kUnknown ? "unknown" : colora::kIsaNames[isa];
}

// For tests: switches the instruction set ("avx512", "avx2", "baseline"); returns 0, or 1 for an unknown name.
COLORA_PUBLIC int colora_set_isa(const char* name) {
  const colora::Isa isa = colora::named_isa(name);
  if (isa == colora::kUnknown) return 1;
  colora::active_isa.store(isa);
  return 0;
}

COLORA_PUBLIC int colora_thread_count() { return colora::thread_count(); }

// For tests and benchmarks: number of threads from now on; returns 0, or 1 if n < 1.
COLORA_PUBLIC int colora_set_threads(int n) {
  if (n < 1) return 1;
  colora::threads.store(n);
  return 0;
}
