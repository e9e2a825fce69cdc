// Tables of weights: the tensors of a model, put there once from outside of graphs, so that an operator gets one number for
// hundreds of inputs (a graph's compilation costs 30 ms and a MiB for each two of these).
//
// Who makes a table owns the memory and keeps it alive; colora_ms/kernels/weight_table.py does. Every change of an address
// gives the table a new version, and an operator that comes with an older one is refused.
#pragma once

#include <memory>
#include <vector>

#include "check.h"

namespace colora {

struct TableEntry {
  void* data = nullptr;
  std::string dtype;
  std::vector<int64_t> shape;
};

struct WeightTable {
  int64_t version = 0;
  std::vector<TableEntry> entries;
  int64_t count() const { return int64_t(entries.size()); }
  Tensor tensor(int64_t i, const char* op, const char* name) const;
};

// The table that `handle` (2,) int64 names: its number and its version. Refuses one that is not there or was changed.
std::shared_ptr<const WeightTable> weight_table(const Tensor& handle);

}  // namespace colora
