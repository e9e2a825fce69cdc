// Rows of a table by token ids, widened to float32 from any format of a weight.
#pragma once

#include "check.h"
#include "parallel.h"
#include "products.h"

namespace COLORA_ISA_NAMESPACE {

// y (count, table.in) = the rows `ids` of the table.
inline void embed_rows(const Weight& table, const int32_t* ids, int64_t count, float* y) {
  const int64_t hidden = table.in;
  parallel_ranges(count, 1, 32768 / (hidden + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) read_columns(table, ids[i], 0, hidden, y + i * hidden);
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
