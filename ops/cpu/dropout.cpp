// dropout: elements zeroed at random, the others scaled; the random words are a hash of key, row and column, so that
// forward and gradient need no stored mask.
#include "check.h"
#include "parallel.h"
#include "vec_math.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

constexpr int64_t kGrain = 1 << 14;       // elements that are worth a thread
constexpr uint32_t kColumn = 0x9e3779b9;  // 2^32 / golden ratio

// The finalizer of MurmurHash3; U is uint32_t or a vector of them.
template <class U>
inline U mix(U h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

// (x, key, least, scale) -> y
COLORA_OPERATOR(dropout) {
  call.expect(4, 1);
  const Tensor x = call.in(0, "x"), key = call.in(1, "key"), least = call.in(2, "least"), scale = call.in(3, "scale"),
               y = call.out(0, "y");
  x.expect_dtype("float32");
  key.expect_dtype("int32").expect_rank(1).expect_dim(0, 2, "two words");
  least.expect_dtype("int32").expect_rank(1).expect_dim(0, 1, "one number");
  scale.expect_dtype("float32").expect_rank(1).expect_dim(0, 1, "one number");
  y.expect_dtype("float32").expect_same_shape(x);
  if (x.ndim == 0) x.fail("has rank 0, expected at least 1");
  const int64_t columns = x.dim(-1), rows = columns ? x.size() / columns : 0;
  const uint32_t a = mix(uint32_t(key.data<int32_t>()[0])), b = mix(uint32_t(key.data<int32_t>()[1]));
  const vi threshold = splat_i(*least.data<int32_t>());
  const vf factor = splat(*scale.data<float>());
  vu lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
  const int64_t grain = columns ? (kGrain + columns - 1) / columns : 1;  // rows
  parallel_ranges(rows, 1, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = x.data<float>() + r * columns;
      float* to = y.data<float>() + r * columns;
      const vu row = mix(uint32_t(r) + a) - vu{};
      for (int64_t c = 0; c < columns; c += kLanes) {
        const vu word = mix(row ^ ((lane + uint32_t(c)) * kColumn + b));
        const vf kept = load_upto(from + c, columns - c) * factor;
        store_upto(to + c, (vi)(word >> 8) >= threshold ? kept : vf{}, columns - c);
      }
    }
  });
}
