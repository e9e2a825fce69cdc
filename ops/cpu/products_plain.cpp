// Floats and integers with a scale tensor; what is blocks of a GGUF file goes on to products_blocks.cpp.
#include "products.h"

#include "few_rows.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

constexpr int64_t kAhead = 8192;  // bytes that unpacking prefetches ahead

template <class Reader>
void unpack_panel(const Reader& reader, const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t vectors) {
  for (int64_t o = o0; o < o1; ++o) {
    const int64_t at = o - o0;
    float* to = panel + (at / kOuts * kOuts * vectors + at % kOuts) * kLanes;
    int64_t g = 0;
    for (int64_t k = 0; k < w.in; ++g) {
      const int64_t end = std::min(w.in, (g + 1) * w.group);
      const auto scale = reader.scale(o, g);
      vf part[Reader::kUnits];
      for (; k + Reader::kStep <= end; k += Reader::kStep) {
        prefetch(static_cast<const char*>(reader.address(o, k)) + kAhead);
        reader.read(o, k, scale, part);
        for (int u = 0; u < Reader::kUnits; ++u, to += kOuts * kLanes) store(to, part[u]);
      }
      if (k < end) {
        reader.read_tail(o, k, end - k, scale, part);
        for (int u = 0; u < Reader::kUnits; ++u, to += kOuts * kLanes) store(to, part[u]);
        k = end;
      }
    }
  }
}

template <class Reader>
void unpack_columns(const Reader& reader, int64_t o, int64_t k0, int64_t k1, float* to) {
  vf part[1];
  int64_t k = k0;
  for (; k + kLanes <= k1; k += kLanes) {
    reader.read(o, k, {}, part);
    store(to + k - k0, part[0]);
  }
  if (k == k1) return;
  reader.read_tail(o, k, k1 - k, {}, part);
  store_partial(to + k - k0, part[0], k1 - k);
}

}  // namespace

void few_rows(const Weight& w, int64_t columns, int64_t block, const float* bias, const Rows& rows, int64_t o0,
              int64_t o1) {
  switch (w.format) {
    case Format::kFloat32: return dense_few_rows(Float32Reader(w), columns, block, columns, bias, rows, o0, o1);
    case Format::kBfloat16: return dense_few_rows(Bfloat16Reader(w), columns, block, columns, bias, rows, o0, o1);
    case Format::kFloat16: return dense_few_rows(Float16Reader(w), columns, block, columns, bias, rows, o0, o1);
    case Format::kInt8: return dense_few_rows(Int8Reader(w), columns, block, w.group, bias, rows, o0, o1);
    case Format::kInt8_Zero: return dense_few_rows(Int8ZeroReader(w), columns, block, w.group, bias, rows, o0, o1);
    case Format::kInt4: return dense_few_rows(Int4Reader(w), columns, block, w.group, bias, rows, o0, o1);
    case Format::kInt4_Zero: return dense_few_rows(Int4ZeroReader(w), columns, block, w.group, bias, rows, o0, o1);
    default: return few_rows_of_blocks(w, columns, block, bias, rows, o0, o1);
  }
}

void make_panel(const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t vectors) {
  for (int64_t at = o1 - o0; at % kOuts; ++at)
    for (int64_t s = 0; s < vectors; ++s)
      store(panel + ((at / kOuts * vectors + s) * kOuts + at % kOuts) * kLanes, vf{});
  if (!regular_groups(w)) {
    std::vector<float> row(size_t(w.in));
    for (int64_t o = o0; o < o1; ++o) {
      read_columns(w, o, 0, w.in, row.data());
      const int64_t at = o - o0;
      pack_row(row.data(), w.in, int(at % kOuts), kOuts, panel + at / kOuts * kOuts * vectors * kLanes);
    }
    return;
  }
  switch (w.format) {
    case Format::kFloat32: return unpack_panel(Float32Reader(w), w, o0, o1, panel, vectors);
    case Format::kBfloat16: return unpack_panel(Bfloat16Reader(w), w, o0, o1, panel, vectors);
    case Format::kFloat16: return unpack_panel(Float16Reader(w), w, o0, o1, panel, vectors);
    case Format::kInt8: return unpack_panel(Int8Reader(w), w, o0, o1, panel, vectors);
    case Format::kInt8_Zero: return unpack_panel(Int8ZeroReader(w), w, o0, o1, panel, vectors);
    case Format::kInt4: return unpack_panel(Int4Reader(w), w, o0, o1, panel, vectors);
    case Format::kInt4_Zero: return unpack_panel(Int4ZeroReader(w), w, o0, o1, panel, vectors);
    default: return unpack_blocks(w, o0, o1, panel, vectors);
  }
}

void read_columns(const Weight& w, int64_t o, int64_t k0, int64_t k1, float* to) {
  switch (w.format) {
    case Format::kFloat32:
      std::memcpy(to, w.f32() + o * w.in + k0, size_t(k1 - k0) * sizeof(float));
      return;
    case Format::kBfloat16: return unpack_columns(Bfloat16Reader(w), o, k0, k1, to);
    case Format::kFloat16: return unpack_columns(Float16Reader(w), o, k0, k1, to);
    default: break;
  }
  if (w.layout().blocks) return read_block_columns(w, o, k0, k1, to);
  read_scaled(w, o, k0, k1, to);
}

}  // namespace COLORA_ISA_NAMESPACE
