// The blocks of GGUF files.
#include "few_rows.h"
#include "products.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

// use(vectors of the values of a step, its first column) for every step of a block.
template <class Reader, int step = 0, class Use>
inline __attribute__((always_inline)) void each_step(const uint8_t* block, const typename Reader::Scale& scale,
                                                     const Use& use) {
  if constexpr (step * Reader::kStep < Reader::kValues) {
    vf part[Reader::kUnits];
    Reader::template read<step>(block, scale, part);
    use(part, step * Reader::kStep);
    each_step<Reader, step + 1>(block, scale, use);
  }
}

template <class Reader>
void unpack_panel(const Reader& reader, const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t vectors) {
  for (int64_t o = o0; o < o1; ++o) {
    const int64_t at = o - o0;
    float* to = panel + (at / kOuts * kOuts * vectors + at % kOuts) * kLanes;
    for (int64_t k = 0; k < w.in; k += Reader::kValues) {
      typename Reader::Scale scale;
      Reader::scale(reader.block(o, k), scale);
      each_step<Reader>(reader.block(o, k), scale, [&](const vf* part, int64_t) {
        for (int u = 0; u < Reader::kUnits; ++u, to += kOuts * kLanes) store(to, part[u]);
      });
    }
  }
}

template <class Reader>
void unpack_columns(const Reader& reader, int64_t o, int64_t k0, int64_t k1, float* to) {
  alignas(64) float values[Reader::kValues];
  for (int64_t k = k0 / Reader::kValues * Reader::kValues; k < k1; k += Reader::kValues) {
    typename Reader::Scale scale;
    Reader::scale(reader.block(o, k), scale);
    each_step<Reader>(reader.block(o, k), scale, [&](const vf* part, int64_t first) {
      for (int u = 0; u < Reader::kUnits; ++u) store(values + first + u * kLanes, part[u]);
    });
    const int64_t begin = std::max(k, k0), end = std::min(k + Reader::kValues, k1);
    std::memcpy(to + begin - k0, values + begin - k, size_t(end - begin) * sizeof(float));
  }
}

template <class Use>
void with_reader(const Weight& w, const Use& use) {
  switch (w.format) {
    case Format::kQ4_0: return use(Q4_0Reader(w));
    case Format::kQ4_1: return use(Q4_1Reader(w));
    case Format::kQ5_0: return use(Q5_0Reader(w));
    case Format::kQ5_1: return use(Q5_1Reader(w));
    case Format::kQ8_0: return use(Q8_0Reader(w));
    case Format::kQ4_K: return use(Q4_KReader(w));
    case Format::kQ5_K: return use(Q5_KReader(w));
    case Format::kQ6_K: return use(Q6_KReader(w));
    default: break;
  }
}

}  // namespace

void few_rows_of_blocks(const Weight& w, int64_t columns, int64_t block, const float* bias, const Rows& rows, int64_t o0,
                        int64_t o1) {
  with_reader(w, [&](const auto& reader) { dense_few_rows(reader, columns, block, columns, bias, rows, o0, o1); });
}

void unpack_blocks(const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t vectors) {
  with_reader(w, [&](const auto& reader) { unpack_panel(reader, w, o0, o1, panel, vectors); });
}

void read_block_columns(const Weight& w, int64_t o, int64_t k0, int64_t k1, float* to) {
  with_reader(w, [&](const auto& reader) { unpack_columns(reader, o, k0, k1, to); });
}

}  // namespace COLORA_ISA_NAMESPACE
