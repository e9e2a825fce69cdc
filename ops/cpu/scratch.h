// Aligned memory for the length of a call. Blocks go back to a shelf, not to the heap: a process with a long history
// has a heap in which finding a place for 20 to 50 KB took longer than the product that needed it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace colora {

// A block of at least `bytes` bytes, aligned to 64; *size is what it holds. Throws std::bad_alloc.
void* borrow(size_t bytes, size_t* size);
void give_back(void* block, size_t size);

}  // namespace colora

namespace COLORA_ISA_NAMESPACE {

// Floats whose first one is aligned to a cache line (vectors that cross lines cost up to a third).
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(int64_t n) { resize(n); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  ~AlignedFloats() { release(); }

  // n zeros; what was there before is lost.
  void resize(int64_t n) {
    const size_t bytes = size_t(n) * sizeof(float);
    if (bytes > size_) {
      release();
      data_ = static_cast<float*>(colora::borrow(bytes, &size_));
    }
    if (bytes > 0) std::memset(data_, 0, bytes);
  }
  float* data() { return data_; }

 private:
  void release() {
    if (data_) colora::give_back(data_, size_);
    data_ = nullptr;
    size_ = 0;
  }
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace COLORA_ISA_NAMESPACE
