#include "pages.h"

#if defined(COLORA_ISA_BASELINE)  // one copy is enough

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace colora {

void prefer_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, missing in older headers
  static const bool enabled = [] {
    const char* wish = std::getenv("COLORA_HUGE_PAGES");
    return !(wish && std::strcmp(wish, "0") == 0);
  }();
  if (!enabled || bytes < kHuge / 8) return;
  static std::mutex mutex;
  static std::unordered_map<const void*, size_t> seen;
  {
    std::lock_guard<std::mutex> lock(mutex);
    size_t& known = seen[data];
    if (known >= bytes) return;
    known = bytes;
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kHuge * kHuge;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  // One block at a time: a block that reaches outside its mapping is refused and must not stop the others.
  for (uintptr_t block = begin; block < end; block += kHuge) madvise(reinterpret_cast<void*>(block), kHuge, kCollapse);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace colora

#endif
