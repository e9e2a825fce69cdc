// Gradient of multi_lora_linear with a frozen base weight, for 1 to 4 linears that share x.
//
// Inputs: count (1,) int32 = number of linears; x, slots as in the forward; then of each linear dy and its tensors, see
// operands.h. Outputs: dx, then (ddown, dup) of every linear; rank 0 and set to 0 where it has no adapters.
//
//   v = scale·x·downᵀ (computed again)      dup[s]   = sum over the rows of s of dyᵀ·v
//   u = scale·dy·up                         ddown[s] = sum over the rows of s of uᵀ·x
//   dx = sum over the linears of dy·W + u·down[slot]
// A slot that no row uses gets zeros. Tokens at the end that no gradient reaches (rows of the base model that stand
// behind the adapter's as a reference) cost nothing: their dx is 0 without a product. A base that is a product of small
// matrices is gone back one factor after another; W is then the one that meets x first, and dy what reaches it.
#include "gemm.h"
#include "operands.h"
#include "outer.h"
#include "products.h"
#include "scratch.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

struct LinearGrad {
  Base base;
  Adapters adapters;
  int64_t out = 0;
  const float* dy = nullptr;      // (tokens, out)
  const float* behind = nullptr;  // (tokens, rows of the first factor): what reaches it; dy where it is the only one
  std::vector<float> buffer;      // of `behind`
  float *ddown = nullptr, *dup = nullptr;
  std::vector<float> v, u;  // (tokens, stride), by token
  int64_t stride = 0;
  std::vector<std::vector<Run>> runs;  // per group
  std::vector<Run> all_runs;           // by first token
  Shrink shrink;
  const Weight& weight() const { return base.factors.front(); }
};

// Columns of a panel: a multiple of kOuterColumns into which whole blocks of a packed weight fit, so that none is unpacked
// twice.
int64_t panel_columns(const std::vector<LinearGrad>& linears) {
  int64_t columns = kOuterColumns;
  for (const LinearGrad& l : linears) columns = std::max<int64_t>(columns, l.weight().layout().values);
  return columns;
}

// Rows [o0, o1), columns [k0, k1) of W as float32: kOuterDepth rows of kOuterColumns, then those of the next columns.
void pack(const Weight& w, int64_t o0, int64_t o1, int64_t k0, int64_t k1, float* row, float* to) {
  for (int64_t o = o0; o < o1; ++o, to += kOuterColumns) {
    if (k1 - k0 <= kOuterColumns) {
      read_columns(w, o, k0, k1, to);
      continue;
    }
    read_columns(w, o, k0, k1, row);
    for (int64_t k = 0; k < k1 - k0; k += kOuterColumns)
      std::memcpy(to + k * kOuterDepth, row + k, size_t(std::min(kOuterColumns, k1 - k0 - k)) * sizeof(float));
  }
}

class Backward {
 public:
  // x, dx: (tokens, in); groups: the tokens by slot, empty without adapters.
  Backward(std::vector<LinearGrad>& linears, const SlotGroups& groups, const float* x, float* dx, int64_t all_tokens,
           int64_t in)
      : linears_(linears), groups_(groups), x_(x), dx_(dx), tokens_(reached(linears, all_tokens)), in_(in) {
    const int64_t tokens = tokens_;
    std::memset(dx + tokens * in, 0, size_t((all_tokens - tokens) * in) * sizeof(float));
    width_ = panel_columns(linears);
    panels_ = (in + width_ - 1) / width_;
    // Rows are cut only as far as needed to give every thread several tasks: each piece packs W again.
    int64_t pieces = std::max<int64_t>(1, 4 * colora::thread_count() / panels_);
    rows_ = std::max<int64_t>((tokens + pieces - 1) / pieces, 16 * kOuterRows);
    rows_ = (rows_ + kOuterRows - 1) / kOuterRows * kOuterRows;
    packed_.resize((kOuterDepth + 1) * width_ * colora::thread_count());
  }

  void run() {
    for (LinearGrad& l : linears_) {
      if (!l.adapters.present()) {
        if (!l.adapters.down.data) *l.ddown = *l.dup = 0;  // rank 0: one number
        continue;
      }
      const int64_t cells = l.adapters.slots * l.adapters.rank;
      std::memset(l.ddown, 0, size_t(cells * in_) * sizeof(float));
      std::memset(l.dup, 0, size_t(cells * l.out) * sizeof(float));
      for (const SlotGroups::Group& group : groups_.groups) {
        std::vector<Run> runs = runs_of(groups_, group);
        l.all_runs.insert(l.all_runs.end(), runs.begin(), runs.end());
        l.runs.push_back(std::move(runs));
      }
      std::sort(l.all_runs.begin(), l.all_runs.end(), [](const Run& a, const Run& b) { return a.begin < b.begin; });
      if (l.shrink.tasks()) parallel_tasks(l.shrink.tasks(), [&](int64_t i) { l.shrink.run(i); });
      const int64_t piece = 8 * kOuterRows;
      parallel_tasks((tokens_ + piece - 1) / piece, [&](int64_t i) { expand_back(l, i * piece, (i + 1) * piece); });
      adapter_gradients(l);
    }
    const auto ordered = [](const LinearGrad& l) { return l.base.order != nullptr; };
    if (std::none_of(linears_.begin(), linears_.end(), ordered)) {
      panels([&](int64_t panel, int64_t t0, int64_t t1) {
        for (const LinearGrad& l : linears_) {
          base_gradient(l, panel, t0, t1);
          low_rank_gradient(l, panel, t0, t1);
        }
      });
      return;
    }
    // Panels of one linear are other columns of dx than those of the next one, so that it waits; each sum is in the
    // same order.
    for (const LinearGrad& l : linears_) {
      panels([&](int64_t panel, int64_t t0, int64_t t1) { base_gradient(l, panel, t0, t1); });
      panels([&](int64_t panel, int64_t t0, int64_t t1) { low_rank_gradient(l, panel, t0, t1); });
    }
  }

 private:
  // How many tokens there are up to the last one that a gradient reaches.
  static int64_t reached(const std::vector<LinearGrad>& linears, int64_t tokens) {
    const auto is_zero = [](float value) { return value == 0.0f; };
    for (; tokens > 0; --tokens)
      for (const LinearGrad& l : linears) {
        const float* dy = l.dy + (tokens - 1) * l.out;
        if (!std::all_of(dy, dy + l.out, is_zero)) return tokens;
      }
    return 0;
  }

  // u = scale·dy·up for the tokens [begin, end) that have an adapter
  void expand_back(LinearGrad& l, int64_t begin, int64_t end) {
    const int64_t rank = l.adapters.rank, out = l.out;
    for (const Run& run : l.all_runs) {
      const int64_t t0 = std::max(begin, run.begin), t1 = std::min(end, run.end);
      if (t0 >= t1) continue;
      const float* up = l.adapters.up.f32() + run.slot * out * rank;
      for (int64_t j = 0; j < rank; j += kOuterColumns)
        outer_panel(t1 - t0, std::min(kOuterColumns, rank - j), out, l.dy + t0 * out, out, 1, up + j, rank,
                    nullptr, l.u.data() + t0 * l.stride + j, l.stride);
      const float scale = l.adapters.scale[run.slot];
      for (int64_t i = t0 * l.stride; i < t1 * l.stride; ++i) l.u[size_t(i)] *= scale;
    }
  }

  void adapter_gradients(LinearGrad& l) {
    const int64_t rank = l.adapters.rank, out = l.out, wide = 16 * kOuterRows;
    const int64_t down_tasks = (in_ + kOuterColumns - 1) / kOuterColumns, up_tasks = (out + wide - 1) / wide;
    const int64_t per_group = down_tasks + up_tasks;
    parallel_tasks(int64_t(l.runs.size()) * per_group, [&](int64_t task) {
      const std::vector<Run>& runs = l.runs[size_t(task / per_group)];
      const int64_t i = task % per_group, slot = runs[0].slot;
      bool first = true;
      for (const Run& run : runs) {
        const int64_t t0 = run.begin, n = run.end - run.begin;
        if (i < down_tasks) {
          const int64_t k0 = i * kOuterColumns;
          float* to = l.ddown + slot * rank * in_ + k0;
          outer_panel(rank, std::min(kOuterColumns, in_ - k0), n, l.u.data() + t0 * l.stride, 1, l.stride,
                      x_ + t0 * in_ + k0, in_, first ? nullptr : to, to, in_);
        } else {
          const int64_t o0 = (i - down_tasks) * wide, o1 = std::min(out, o0 + wide);
          for (int64_t j = 0; j < rank; j += kOuterColumns) {
            float* to = l.dup + (slot * out + o0) * rank + j;
            outer_panel(o1 - o0, std::min(kOuterColumns, rank - j), n, l.dy + t0 * out + o0, 1, out,
                        l.v.data() + t0 * l.stride + j, l.stride, first ? nullptr : to, to, rank);
          }
        }
        first = false;
      }
    });
  }

  // Calls work(panel, t0, t1) for all panels of columns and pieces of the tokens.
  template <class Work>
  void panels(const Work& work) {
    const int64_t pieces = (tokens_ + rows_ - 1) / rows_;
    parallel_tasks(panels_ * pieces, [&](int64_t i) {
      const int64_t begin = i % pieces * rows_;
      work(i / pieces, begin, std::min(tokens_, begin + rows_));
    });
  }

  // What a base adds to dx of the tokens [t0, t1) in one panel of its columns; those of an order of their own are
  // gathered from dx and put back.
  void base_gradient(const LinearGrad& l, int64_t panel, int64_t t0, int64_t t1) {
    float *packed = packed_.data() + worker_index() * (kOuterDepth + 1) * width_, *row = packed + kOuterDepth * width_;
    const int64_t k0 = panel * width_, k1 = std::min(in_, k0 + width_), width = k1 - k0;
    const int32_t* order = l.base.order;
    std::vector<float> tile(size_t(order ? (t1 - t0) * width : 0));
    float* to = order ? tile.data() : dx_ + t0 * in_ + k0;
    const int64_t stride = order ? width : in_;
    const bool first = &l == &linears_.front();
    const float* from = first ? nullptr : to;
    for (int64_t t = t0; order && !first && t < t1; ++t)
      for (int64_t k = k0; k < k1; ++k) to[(t - t0) * width + k - k0] = dx_[t * in_ + order[k]];
    const int64_t out = l.weight().out;
    for (int64_t o = 0; o < out; o += kOuterDepth) {
      const int64_t depth = std::min(kOuterDepth, out - o);
      pack(l.weight(), o, o + depth, k0, k1, row, packed);
      for (int64_t k = 0; k < width; k += kOuterColumns)
        outer_panel(t1 - t0, std::min(kOuterColumns, width - k), depth, l.behind + t0 * out + o, out, 1,
                    packed + k * kOuterDepth, kOuterColumns, from ? from + k : nullptr, to + k, stride);
      from = to;
    }
    for (int64_t t = t0; order && t < t1; ++t)
      for (int64_t k = k0; k < k1; ++k) dx_[t * in_ + order[k]] = to[(t - t0) * width + k - k0];
  }

  // What the adapters of a linear add to dx of the tokens [t0, t1) in one panel of columns.
  void low_rank_gradient(const LinearGrad& l, int64_t panel, int64_t t0, int64_t t1) {
    const int64_t k1 = std::min(in_, (panel + 1) * width_);
    for (const Run& run : l.all_runs) {
      const int64_t begin = std::max(t0, run.begin), end = std::min(t1, run.end);
      for (int64_t k = panel * width_; begin < end && k < k1; k += kOuterColumns) {
        float* rows = dx_ + begin * in_ + k;
        outer_panel(end - begin, std::min(kOuterColumns, k1 - k), l.adapters.rank, l.u.data() + begin * l.stride,
                    l.stride, 1, l.adapters.down.f32() + run.slot * l.adapters.rank * in_ + k, in_, rows, rows, in_);
      }
    }
  }

  std::vector<LinearGrad>& linears_;
  const SlotGroups& groups_;
  const float* x_;
  float* dx_;
  int64_t tokens_, in_, width_, panels_, rows_;
  AlignedFloats packed_;  // of each worker: a block of W, and a row of it
};

// What reaches the first factor of a product: dy through the factors behind it, last first.
void go_back(LinearGrad& l, int64_t tokens) {
  l.behind = l.dy;
  for (size_t i = l.base.factors.size(); i-- > 1;) {
    const Weight& factor = l.base.factors[i];
    std::vector<LinearGrad> one(1);
    float nothing[2];
    one[0].base.factors.push_back(factor);
    one[0].out = factor.out, one[0].dy = one[0].behind = l.behind;
    one[0].ddown = nothing, one[0].dup = nothing + 1;
    std::vector<float> dx(size_t(tokens * factor.in));  // (tokens, columns of the factor)
    Backward(one, {}, nullptr, dx.data(), tokens, factor.in).run();
    l.buffer.swap(dx);
    l.behind = l.buffer.data();
  }
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

COLORA_OPERATOR(multi_lora_linear_grad) {
  using namespace COLORA_ISA_NAMESPACE;
  Reader reader(call, 0, 1);
  const colora::Tensor count = reader.next("count");
  count.expect_dtype("int32").expect_rank(1).expect_dim(0, 1, "one number");
  const int n = count.data<const int32_t>()[0];
  if (n < 1 || n > 64) count.fail("is %d, expected the number of linears", n);
  const colora::Tensor x = reader.next("x"), slots = reader.next("slots");
  x.expect_dtype("float32").expect_rank(2, 3);
  const int64_t in = x.dim(-1), rows = x.dim(0), per_row = x.ndim == 3 ? x.dim(1) : 1, tokens = rows * per_row;
  if (in < 1) x.fail("has shape %s, expected at least one column", x.shape_text().c_str());
  if (!slots.absent()) slots.expect_dtype("int32").expect_rank(1).expect_dim(0, rows, "one slot per row of 'x'");

  std::vector<LinearGrad> linears(static_cast<size_t>(n));
  std::vector<colora::Tensor> downs, ups;
  for (LinearGrad& l : linears) {
    const colora::Tensor dy = reader.next("dy");
    const Tag tag = Tag::of(reader.next("linear"));
    l.base = read_base(reader, tag, in);
    l.out = l.base.out();
    dy.expect_dtype("float32").expect_rank(x.ndim).expect_dim(0, rows, "the rows of 'x'");
    if (x.ndim == 3) dy.expect_dim(1, per_row, "the tokens of 'x'");
    dy.expect_dim(-1, l.out, "the output rows of the weight");
    l.dy = dy.data<const float>();  // (rows, tokens, out)
    Reader pair = reader;
    downs.push_back(tag.adapter ? pair.next("down") : reader.absent("down"));
    ups.push_back(tag.adapter ? pair.next("up") : reader.absent("up"));
    for (const colora::Tensor* t : {&downs.back(), &ups.back()})
      if (!t->absent()) t->expect_dtype("float32");
    l.adapters = read_adapters(reader, tag, in, l.out, slots);
  }
  call.expect(reader.at(), 1 + 2 * n);
  const colora::Tensor dx = call.out(0, "dx");
  dx.expect_dtype("float32").expect_same_shape(x);
  for (int i = 0; i < n; ++i) {
    const colora::Tensor ddown = call.out(1 + 2 * i, "ddown"), dup = call.out(2 + 2 * i, "dup");
    ddown.expect_dtype("float32").expect_same_shape(downs[size_t(i)]);
    dup.expect_dtype("float32").expect_same_shape(ups[size_t(i)]);
    linears[size_t(i)].ddown = ddown.data<float>();
    linears[size_t(i)].dup = dup.data<float>();
  }

  const int32_t* row_slot = slots.absent() ? nullptr : slots.data<const int32_t>();
  SlotGroups groups;
  bool grouped = false;
  for (LinearGrad& l : linears) {
    go_back(l, tokens);
    if (!l.adapters.present() || !row_slot) continue;
    if (!grouped) group_by_slot(tokens, per_row, row_slot, groups);
    grouped = true;
    if (groups.tokens.empty()) continue;
    l.stride = padded_rank(l.adapters.rank);
    l.v.resize(size_t(tokens * l.stride));
    l.u.resize(size_t(tokens * l.stride));
    l.shrink.prepare(l.adapters, groups, x.data<const float>(), in, l.v.data(), l.stride, colora::thread_count());
  }
  Backward(linears, groups, x.data<const float>(), dx.data<float>(), tokens, in).run();
}
