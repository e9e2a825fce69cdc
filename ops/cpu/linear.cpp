// multi_lora_linear: y = x·Wᵀ + b + scale[slot]·(x·down[slot]ᵀ)·up[slot]ᵀ for 1 to 4 linears that share x.
//
// Inputs: x (rows, tokens, in) or (rows, in) float32; slots (rows,) int32 or absent; then six tensors per linear:
// weight, weight_scale, bias, down, up, scale. Outputs: one y per linear.
//
// Decode is bound by reading W, so every linear of the call is read once, in contiguous shares per thread. The shrink
// runs first (its result is `rank` numbers a row); the expand is folded into the dot products as further columns.
// Batched multi-adapter products: Chen et al., Punica (arXiv 2310.18547); Sheng et al., S-LoRA (arXiv 2311.03285).
#include <memory>

#include "gemm.h"
#include "lora.h"
#include "weights.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

constexpr int64_t kFewRows = 32;

struct Linear {
  Weight weight;
  const float* bias = nullptr;
  Adapters adapters;
  float* y = nullptr;
  std::vector<float> v;  // (tokens, padded rank)
  SlotGroups groups;
  std::unique_ptr<Shrink> shrink;
  std::vector<RowAdapter> row_adapters;
  std::vector<float*> y_rows;
  bool rearranged() const { return weight.format == Format::kInt4 && regular_groups(weight); }
};

// Dequantises the rows [o0, o1) into a float32 panel with `stride` columns a row, in the order of the reader.
template <class Reader>
void unpack_panel(const Reader& reader, const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t stride) {
  for (int64_t o = o0; o < o1; ++o) {
    float* row = panel + (o - o0) * stride;
    for (int64_t k = 0; k < w.in;) {
      const int64_t g = k / w.group, end = std::min(w.in, (g + 1) * w.group);
      const auto scale = reader.scale(o, g);
      vf part[Reader::kUnits];
      for (; k + Reader::kStep <= end; k += Reader::kStep) {
        reader.read(o, k, scale, part);
        for (int u = 0; u < Reader::kUnits; ++u) store(row + k + u * kLanes, part[u]);
      }
      if (k < end) {
        reader.read_tail(o, k, end - k, scale, part);
        if (Reader::kUnits == 1)
          store_partial(row + k, part[0], end - k);
        else
          for (int u = 0; u < Reader::kUnits; ++u) store(row + k + u * kLanes, part[u]);
        k = end;
      }
    }
  }
}

void make_panel(const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t stride) {
  if (!regular_groups(w)) {
    for (int64_t o = o0; o < o1; ++o)
      for (int64_t k = 0; k < w.in; ++k) panel[(o - o0) * stride + k] = element(w, o, k);
    return;
  }
  switch (w.format) {
    case Format::kFloat32: return unpack_panel(Float32Reader(w), w, o0, o1, panel, stride);
    case Format::kBfloat16: return unpack_panel(Bfloat16Reader(w), w, o0, o1, panel, stride);
    case Format::kInt8: return unpack_panel(Int8Reader(w), w, o0, o1, panel, stride);
    case Format::kInt4: return unpack_panel(Int4Reader(w), w, o0, o1, panel, stride);
  }
}

class Forward {
 public:
  Forward(std::vector<Linear>& linears, const float* x, int64_t tokens, int64_t in)
      : linears_(linears), tokens_(tokens), in_(in) {
    bool plain = false, rearranged = false;
    for (const Linear& l : linears) (l.rearranged() ? rearranged : plain) = true;
    if (plain) {
      x_plain_.resize(size_t(tokens));
      for (int64_t t = 0; t < tokens; ++t) x_plain_[size_t(t)] = x + t * in;
    }
    if (rearranged) {
      const int64_t stride = Int4Reader::padded(in);
      even_odd_.resize(size_t(tokens * stride));
      x_rearranged_.resize(size_t(tokens));
      for (int64_t t = 0; t < tokens; ++t) x_rearranged_[size_t(t)] = even_odd_.data() + t * stride;
    }
    x_ = x;
    for (const Linear& l : linears) work_ += l.weight.out * in * std::max<int64_t>(1, tokens / 4);
  }

  void run() {
    const int threads = threads_for(work_, 1 << 14);
    prepare(threads);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
      if (!x_rearranged_.empty())
        for (int64_t t = me; t < tokens_; t += all)
          Int4Reader::rearrange(x_ + t * in_, in_, even_odd_.data() + t * Int4Reader::padded(in_));
      int64_t turn = 0;
      for (const Linear& l : linears_)
        for (int64_t i = 0; l.shrink && i < l.shrink->tasks(); ++i)
          if (turn++ % all == me) l.shrink->run(i);
#pragma omp barrier
      float* panel = panels_.data() + me * panel_size_;
      if (shared_) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < total_;) block(i, i + 1, panel);
      } else {
        block(total_ * me / all, total_ * (me + 1) / all, panel);
      }
    }
  }

 private:
  void prepare(int threads) {
    // Blocks of outputs: four for few rows, dealt in contiguous shares; L2-sized for many rows, dealt one by one.
    shared_ = tokens_ > kFewRows;
    const int64_t stride = Int4Reader::padded(in_);
    int64_t outs = 0;
    for (const Linear& l : linears_) outs += l.weight.out;
    if (shared_) {
      width_ = std::min<int64_t>((512 << 10) / 4 / std::max<int64_t>(stride, 1), 256);
      width_ = std::min(width_, outs / (4 * threads));
      width_ = std::max<int64_t>(width_ / kOuts * kOuts, 16);
    } else {
      width_ = kOuts;
    }
    total_ = 0;
    bool panels = false;
    for (const Linear& l : linears_) {
      first_block_.push_back(total_);
      total_ += (l.weight.out + width_ - 1) / width_;
      panels |= !direct(l);
    }
    if (panels) {
      panel_size_ = std::max<int64_t>(width_, 16) * stride;
      panels_.resize(size_t(panel_size_ * threads));
    }
  }

  // W is read where it lies: float32 always, other formats when a row of W meets one tile of rows only.
  bool direct(const Linear& l) const {
    return l.weight.format == Format::kFloat32 || (tokens_ <= kRows && regular_groups(l.weight));
  }

  void block(int64_t begin, int64_t end, float* panel) {
    for (size_t i = 0; i < linears_.size(); ++i) {
      const Linear& l = linears_[i];
      const int64_t last = first_block_[i] + (l.weight.out + width_ - 1) / width_;
      const int64_t b0 = std::max(begin, first_block_[i]), b1 = std::min(end, last);
      if (b0 >= b1) continue;
      outputs(l, (b0 - first_block_[i]) * width_, std::min(l.weight.out, (b1 - first_block_[i]) * width_), panel);
    }
  }

  void outputs(const Linear& l, int64_t o0, int64_t o1, float* panel) {
    Rows rows;
    rows.count = tokens_;
    rows.x = l.rearranged() ? x_rearranged_.data() : x_plain_.data();
    rows.y = l.y_rows.data();
    rows.adapters = l.row_adapters.empty() ? nullptr : l.row_adapters.data();
    rows.rank = l.adapters.rank;
    const Weight& w = l.weight;
    const int64_t block = column_block(in_);
    if (direct(l) && !shared_) {
      switch (w.format) {
        case Format::kFloat32: return dense_few_rows(Float32Reader(w), in_, block, in_, l.bias, rows, o0, o1);
        case Format::kBfloat16: return dense_few_rows(Bfloat16Reader(w), in_, block, in_, l.bias, rows, o0, o1);
        case Format::kInt8: return dense_few_rows(Int8Reader(w), in_, block, w.group, l.bias, rows, o0, o1);
        case Format::kInt4: return dense_few_rows(Int4Reader(w), in_, block, w.group, l.bias, rows, o0, o1);
      }
    }
    if (direct(l)) return dense_many_rows(Float32Reader(w), in_, block, l.bias, rows, o0, o1);
    const int64_t columns = l.rearranged() ? Int4Reader::padded(in_) : in_;
    const int64_t step = shared_ ? width_ : 16;
    for (int64_t o = o0; o < o1; o += step) {
      const int64_t end = std::min(o1, o + step);
      make_panel(w, o, end, panel, columns);
      // The reader counts rows from the panel's first one; the address before it is formed, never read.
      const Float32Reader reader(reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(panel) -
                                                                size_t(o * columns) * sizeof(float)),
                                 columns);
      dense_many_rows(reader, columns, block, l.bias, rows, o, end);
    }
  }

  std::vector<Linear>& linears_;
  int64_t tokens_, in_, width_ = 0, total_ = 0, panel_size_ = 0, work_ = 0;
  bool shared_ = false;
  const float* x_ = nullptr;
  std::vector<const float*> x_plain_, x_rearranged_;
  std::vector<float> even_odd_, panels_;
  std::vector<int64_t> first_block_;
};

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

COLORA_OPERATOR(multi_lora_linear) {
  using namespace COLORA_ISA_NAMESPACE;
  // 2 inputs, then 6 operands and 1 output per linear
  const int n = (call.count() - 2) / 7;
  if (call.count() < 9 || call.count() != 2 + 7 * n)
    colora::refuse("%s: got %d tensors, expected x, slots, six operands and one output per linear", call.op(),
                   call.count());
  call.expect(2 + 6 * n, n);
  const colora::Tensor x = call.in(0, "x"), slots = call.in(1, "slots");
  x.expect_dtype("float32").expect_rank(2, 3);
  const int64_t in = x.dim(-1), rows = x.dim(0), per_row = x.ndim == 3 ? x.dim(1) : 1, tokens = rows * per_row;
  if (in < 1) x.fail("has shape %s, expected at least one column", x.shape_text().c_str());
  if (!slots.absent()) slots.expect_dtype("int32").expect_rank(1).expect_dim(0, rows, "one slot per row of 'x'");

  std::vector<Linear> linears(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    Linear& l = linears[size_t(i)];
    const int at = 2 + 6 * i;
    const colora::Tensor bias = call.in(at + 2, "bias"), y = call.out(i, "y");
    l.weight = weight_of(call.in(at, "weight"), call.in(at + 1, "weight_scale"), in);
    if (!bias.absent()) {
      bias.expect_dtype("float32").expect_rank(1).expect_dim(0, l.weight.out, "the output rows of the weight");
      l.bias = bias.data<const float>();
    }
    l.adapters = adapters_of(call.in(at + 3, "down"), call.in(at + 4, "up"), call.in(at + 5, "scale"), in,
                             l.weight.out);
    y.expect_dtype("float32").expect_rank(x.ndim).expect_dim(0, rows, "the rows of 'x'");
    if (x.ndim == 3) y.expect_dim(1, per_row, "the tokens of 'x'");
    y.expect_dim(-1, l.weight.out, "the output rows of the weight");
    l.y = y.data<float>();
    if (!slots.absent() && l.adapters.present()) colora::check_slots(slots, l.adapters.slots);
  }
  if (tokens == 0) return;

  const int32_t* row_slot = slots.absent() ? nullptr : slots.data<const int32_t>();
  for (Linear& l : linears) {
    l.y_rows.resize(size_t(tokens));
    for (int64_t t = 0; t < tokens; ++t) l.y_rows[size_t(t)] = l.y + t * l.weight.out;
    if (!l.adapters.present() || !row_slot) continue;
    l.groups = group_by_slot(tokens, l.adapters.slots, [&](int64_t t) { return row_slot[t / per_row]; });
    if (l.groups.tokens.empty()) continue;
    const int64_t stride = padded_rank(l.adapters.rank);
    l.v.resize(size_t(tokens * stride));
    l.shrink = std::make_unique<Shrink>(l.adapters, l.groups, x.data<const float>(), in, l.v.data(), stride,
                                        colora::thread_count());
    l.row_adapters.resize(size_t(tokens));
    for (int64_t t : l.groups.tokens)
      l.row_adapters[size_t(t)] = {l.v.data() + t * stride, l.adapters.up + row_slot[t / per_row] * l.weight.out *
                                                                                 l.adapters.rank};
  }
  Forward(linears, x.data<const float>(), tokens, in).run();
}
