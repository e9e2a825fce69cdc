// The tables of weights of this process, and the C functions that fill them.
#include "weight_table.h"

#if defined(COLORA_ISA_BASELINE)
#include <map>
#include <mutex>
#include <new>

namespace colora {
namespace {

std::mutex tables_mutex;

std::map<int64_t, std::shared_ptr<const WeightTable>>& tables() {
  static std::map<int64_t, std::shared_ptr<const WeightTable>> all;
  return all;
}

}  // namespace

Tensor WeightTable::tensor(int64_t i, const char* op, const char* name) const {
  const TableEntry& entry = entries[size_t(i)];
  Tensor t;
  t.op = op, t.name = name, t.raw = entry.data, t.dtype = entry.dtype.c_str();
  t.ndim = int(entry.shape.size()), t.shape = entry.shape.data();
  return t;
}

std::shared_ptr<const WeightTable> weight_table(const Tensor& handle) {
  handle.expect_dtype("int64").expect_rank(1).expect_dim(0, 2, "a table's number and version");
  const int64_t number = handle.data<int64_t>()[0], version = handle.data<int64_t>()[1];
  std::lock_guard<std::mutex> lock(tables_mutex);
  const auto found = tables().find(number);
  if (found == tables().end()) handle.fail("names table %lld, which is not there (any more)", (long long)number);
  if (found->second->version != version)
    handle.fail("is stale: version %lld of table %lld, which has version %lld now", (long long)version,
                (long long)number, (long long)found->second->version);
  return found->second;
}

}  // namespace colora

// Sets a table's tensors and returns its version, 0: no memory. number: chosen by the caller; dims: the shapes one behind
// another.
extern "C" __attribute__((visibility("default"))) int64_t colora_table_set(int64_t number, int64_t count, void** data,
                                                                            const char** dtypes, const int* ndims,
                                                                            const int64_t* dims) {
  using namespace colora;
  static int64_t versions = 0;
  try {
    auto table = std::make_shared<WeightTable>();
    table->entries.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) {
      TableEntry& entry = table->entries[size_t(i)];
      entry.data = data[i], entry.dtype = dtypes[i];
      entry.shape.assign(dims, dims + ndims[i]);
      dims += ndims[i];
    }
    std::lock_guard<std::mutex> lock(tables_mutex);
    table->version = ++versions;
    tables()[number] = table;
    return table->version;
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

extern "C" __attribute__((visibility("default"))) void colora_table_drop(int64_t number) {
  std::lock_guard<std::mutex> lock(colora::tables_mutex);
  colora::tables().erase(number);
}
#endif
