// Arguments of an operator, and the refusal of bad ones.
//
// An operator is written once and compiled once per instruction set:
//
//     COLORA_OPERATOR(rms_norm) {                     // defines the C function colora_rms_norm
//       Tensor x = call.in(0, "x"), y = call.out(0, "y");
//       x.expect_dtype("float32");
//       ...                                           // check everything first, then compute
//     }
//
// A check that fails throws Refused; the entry point turns it into a non-zero return value and keeps the text for
// colora_last_error(). Never throw inside a parallel region, and never after something has been written.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <exception>
#include <string>

namespace colora {

class Refused : public std::exception {
 public:
  explicit Refused(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Throws Refused with a printf-style text.
[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// One input or output. An absent optional input has rank 0.
struct Tensor {
  const char* op = "";
  const char* name = "";
  void* raw = nullptr;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const char* dtype = "";

  bool absent() const { return ndim == 0; }
  int64_t dim(int i) const { return shape[i < 0 ? ndim + i : i]; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool is(const char* wanted_dtype) const;
  std::string shape_text() const;  // "(2, 3)"
  template <class T>
  T* data() const { return static_cast<T*>(raw); }

  // Each of these refuses with operator, argument, value and expectation.
  [[noreturn]] void fail(const char* format, ...) const __attribute__((format(printf, 2, 3)));
  const Tensor& expect_dtype(const char* a, const char* b = nullptr, const char* c = nullptr,
                             const char* d = nullptr) const;
  const Tensor& expect_rank(int low, int high = -1) const;
  const Tensor& expect_dim(int i, int64_t wanted, const char* because) const;  // i < 0 counts from the end
  const Tensor& expect_same_shape(const Tensor& other) const;
};

class Call {
 public:
  Call(const char* op, int nparam, void** params, int* ndims, int64_t** shapes, const char** dtypes)
      : op_(op), count_(nparam), params_(params), ndims_(ndims), shapes_(shapes), dtypes_(dtypes) {}

  const char* op() const { return op_; }
  int count() const { return count_; }
  // Refuses any number of tensors but inputs + outputs; call it before in() and out().
  void expect(int inputs, int outputs);
  Tensor in(int i, const char* name) const { return tensor(i, name); }
  Tensor out(int i, const char* name) const { return tensor(inputs_ + i, name); }

 private:
  Tensor tensor(int i, const char* name) const;
  const char* op_;
  int count_, inputs_ = 0;
  void** params_;
  int* ndims_;
  int64_t** shapes_;
  const char** dtypes_;
};

// Slot (adapter) numbers: int32, each -1 ("no adapter") or below `slots`.
void check_slots(const Tensor& numbers, int64_t slots);

using Operator = void (*)(Call&);
// Runs the implementation for the active instruction set; table is {baseline, avx2, avx512}, null = not compiled.
int run(const char* op, const Operator* table, int nparam, void** params, int* ndims, int64_t** shapes,
        const char** dtypes);

}  // namespace colora

#if defined(COLORA_HAVE_X86_VARIANTS)
#define COLORA_DECLARE_VARIANTS(name)                       \
  namespace colora_avx2 { void op_##name(colora::Call&); }  \
  namespace colora_avx512 { void op_##name(colora::Call&); }
#define COLORA_TABLE(name) {&colora_baseline::op_##name, &colora_avx2::op_##name, &colora_avx512::op_##name}
#else
#define COLORA_DECLARE_VARIANTS(name)
#define COLORA_TABLE(name) {&colora_baseline::op_##name, nullptr, nullptr}
#endif

// The C entry point exists once; the baseline compilation emits it.
#if defined(COLORA_ISA_BASELINE)
#define COLORA_ENTRY(name)                                                                                        \
  COLORA_DECLARE_VARIANTS(name)                                                                                   \
  extern "C" __attribute__((visibility("default"))) int colora_##name(                                           \
      int nparam, void** params, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {               \
    static const colora::Operator table[3] = COLORA_TABLE(name);                                                  \
    return colora::run(#name, table, nparam, params, ndims, shapes, dtypes);                                      \
  }
#else
#define COLORA_ENTRY(name)
#endif

#define COLORA_OPERATOR(name)                                         \
  namespace COLORA_ISA_NAMESPACE { void op_##name(colora::Call& call); } \
  COLORA_ENTRY(name)                                                  \
  void COLORA_ISA_NAMESPACE::op_##name([[maybe_unused]] colora::Call& call)
