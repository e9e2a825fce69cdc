// Rows of a table by token ids, widened to float32 from float32, bfloat16, int8 or packed int4.
#pragma once

#include "check.h"
#include "parallel.h"
#include "vec_math.h"
#include "weights.h"

namespace COLORA_ISA_NAMESPACE {

template <class Value>
inline void widen_groups(float* y, const Weight& table, const float* scale, const Value& value) {
  for (int64_t g = 0; g < table.groups; ++g)
    for (int64_t i = g * table.group; i < (g + 1) * table.group; ++i) y[i] = value(i) * scale[g];
}

// y (count, table.in) = the rows `ids` of the table.
inline void embed_rows(const Weight& table, const int32_t* ids, int64_t count, float* y) {
  const int64_t hidden = table.in;
  parallel_ranges(count, 1, 32768 / (hidden + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = y + i * hidden;
      const int64_t row = ids[i];
      const float* scale = table.scale ? table.scale + row * table.groups : nullptr;
      switch (table.format) {
        case Format::kFloat32:
          std::memcpy(out, table.f32() + row * hidden, size_t(hidden) * sizeof(float));
          break;
        case Format::kBfloat16: {
          const bf16* w = table.bf() + row * hidden;
          for (int64_t j = 0; j < hidden; j += kLanes) store_upto(out + j, load_upto(w + j, hidden - j), hidden - j);
          break;
        }
        case Format::kInt8: {
          const int8_t* w = table.i8() + row * hidden;
          widen_groups(out, table, scale, [&](int64_t j) { return float(w[j]); });
          break;
        }
        case Format::kInt4: {
          const uint8_t* w = table.i4() + row * (hidden / 2);
          widen_groups(out, table, scale, [&](int64_t j) { return float(int(w[j >> 1] >> (j & 1 ? 4 : 0) & 15) - 8); });
          break;
        }
      }
    }
  });
}

// Refuses ids outside the table.
inline void check_ids(const colora::Tensor& ids, int64_t vocab) {
  const int32_t* id = ids.data<int32_t>();
  for (int64_t i = 0; i < ids.size(); ++i)
    if (id[i] < 0 || id[i] >= vocab)
      ids.fail("holds %d at index %lld, expected 0 to %lld", int(id[i]), (long long)i, (long long)vocab - 1);
}

}  // namespace COLORA_ISA_NAMESPACE
