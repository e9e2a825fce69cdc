#include "scratch.h"

#if defined(COLORA_ISA_BASELINE)  // one copy is enough

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace colora {
namespace {

constexpr size_t kLine = 64, kShelfBytes = size_t(64) << 20;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeep = false;  // the sanitizer shall see every block's own end
#else
constexpr bool kKeep = true;
#endif

// Sizes come in steps of an eighth, so that a block fits the next request of about its size.
size_t rounded(size_t bytes) {
  size_t step = kLine;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

struct Shelf {
  std::mutex mutex;
  std::multimap<size_t, void*> blocks;
  size_t bytes = 0;
};

Shelf& shelf() {
  static Shelf* one = new Shelf;  // never destroyed: threads may outlive the library's destructors
  return *one;
}

}  // namespace

void* borrow(size_t bytes, size_t* size) {
  *size = kKeep ? rounded(bytes) : (bytes + kLine - 1) / kLine * kLine;
  if (kKeep) {
    Shelf& s = shelf();
    std::lock_guard<std::mutex> lock(s.mutex);
    const auto found = s.blocks.find(*size);
    if (found != s.blocks.end()) {
      void* block = found->second;
      s.blocks.erase(found);
      s.bytes -= *size;
      return block;
    }
  }
  void* block = std::aligned_alloc(kLine, *size);
  if (!block) throw std::bad_alloc();
  return block;
}

void give_back(void* block, size_t size) {
  if (kKeep) {
    Shelf& s = shelf();
    std::lock_guard<std::mutex> lock(s.mutex);
    if (s.bytes + size <= kShelfBytes) {
      s.blocks.emplace(size, block);
      s.bytes += size;
      return;
    }
  }
  std::free(block);
}

}  // namespace colora

#endif
