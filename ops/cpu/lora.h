// What the operators with adapters share: their arguments, tokens grouped by slot, and the shrink v = scale·x·downᵀ.
#pragma once

#include <vector>

#include "check.h"
#include "gemm.h"
#include "products.h"

namespace COLORA_ISA_NAMESPACE {

// The stacked adapters of one linear: down (slots, rank, in), up (slots, out, rank), scale (slots,).
struct Adapters {
  Factor down, up;
  const float* scale = nullptr;
  int64_t slots = 0, rank = 0;
  bool present() const { return slots > 0 && rank > 0; }
};

inline void check_stack(const colora::Tensor& stack, const char* dims) {
  if (stack.ndim != 3) stack.fail("has shape %s, expected (%s)", stack.shape_text().c_str(), dims);
}

inline Factor factor_of(const colora::Tensor& stack) { return {stack.raw, stack.is("bfloat16")}; }

inline Adapters adapters_of(const colora::Tensor& down, const colora::Tensor& up, const colora::Tensor& scale,
                            int64_t in, int64_t out) {
  Adapters a;
  if (down.absent() && up.absent() && scale.absent()) return a;
  for (const colora::Tensor* t : {&down, &up, &scale})
    if (t->absent()) t->fail("is absent, but 'down', 'up' and 'scale' come together");
  down.expect_dtype("float32", "bfloat16");
  up.expect_dtype("float32", "bfloat16");
  if (down.is("bfloat16") != up.is("bfloat16"))
    up.fail("is %s, but 'down' is %s; expected one dtype for both", up.dtype, down.dtype);
  check_stack(down, "slots, rank, in");
  check_stack(up, "slots, out, rank");
  down.expect_dim(2, in, "the input columns of the weight");
  a.slots = down.dim(0);
  a.rank = down.dim(1);
  up.expect_dim(0, a.slots, "the slots of 'down'").expect_dim(1, out, "the output rows of the weight");
  up.expect_dim(2, a.rank, "the rank of 'down'");
  scale.expect_dtype("float32").expect_rank(1).expect_dim(0, a.slots, "one scale per slot");
  a.down = factor_of(down);
  a.up = factor_of(up);
  a.scale = scale.data<const float>();
  return a;
}

// Tokens that have an adapter, ordered by slot; tokens of one slot keep their order.
struct SlotGroups {
  struct Group {
    int32_t slot;
    int64_t begin, end;  // in `tokens`
  };
  std::vector<int64_t> tokens;
  std::vector<Group> groups;
  std::vector<int64_t> start;  // of group_by_slot, kept so that a step allocates nothing
};

// The groups of `tokens` tokens; token t belongs to row t / per_row, whose slot is row_slot[t / per_row], -1: none.
inline void group_by_slot(int64_t tokens, int64_t per_row, const int32_t* row_slot, SlotGroups& result) {
  result.groups.clear(), result.tokens.clear();
  int32_t most = -1;
  for (int64_t r = 0; r * per_row < tokens; ++r) most = std::max(most, row_slot[r]);
  std::vector<int64_t>& start = result.start;
  start.assign(size_t(most) + 2, 0);
  for (int64_t t = 0; t < tokens; ++t)
    if (row_slot[t / per_row] >= 0) ++start[size_t(row_slot[t / per_row]) + 1];
  for (int64_t s = 0; s <= most; ++s) {
    if (start[size_t(s) + 1] > 0)
      result.groups.push_back({int32_t(s), start[size_t(s)], start[size_t(s)] + start[size_t(s) + 1]});
    start[size_t(s) + 1] += start[size_t(s)];
  }
  result.tokens.resize(size_t(start[size_t(most) + 1]));
  for (int64_t t = 0; t < tokens; ++t)
    if (row_slot[t / per_row] >= 0) result.tokens[size_t(start[size_t(row_slot[t / per_row])]++)] = t;
}

// Consecutive tokens of one slot.
struct Run {
  int32_t slot;
  int64_t begin, end;
};

inline std::vector<Run> runs_of(const SlotGroups& groups, const SlotGroups::Group& group) {
  std::vector<Run> runs;
  for (int64_t i = group.begin; i < group.end; ++i) {
    const int64_t t = groups.tokens[size_t(i)];
    if (!runs.empty() && runs.back().end == t)
      ++runs.back().end;
    else
      runs.push_back({group.slot, t, t + 1});
  }
  return runs;
}

// The shrink of one linear, cut into independent tasks. It may be prepared again for other tokens.
class Shrink {
 public:
  // v: (tokens, stride) with stride >= rank; columns from rank on are set to 0. x: (tokens, in). strengths: a factor on the
  // scale for each row of per_row tokens, or null.
  void prepare(const Adapters& adapters, const SlotGroups& groups, const float* x, int64_t in, float* v, int64_t stride,
               int threads, const float* strengths = nullptr, int64_t per_row = 1) {
    adapters_ = &adapters, in_ = in, stride_ = stride;
    x_.clear(), v_.clear(), tasks_.clear(), strengths_.clear();
    for (int64_t t : groups.tokens) {
      if (strengths) strengths_.push_back(strengths[t / per_row]);
      x_.push_back(x + t * in);
      v_.push_back(v + t * stride);
    }
    // Few rows: a task is a part of the ranks, so that each is read once; many rows: a part of the rows.
    const int64_t few = 32;
    for (const SlotGroups::Group& g : groups.groups) {
      if (g.end - g.begin <= few) {
        const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(threads, adapters.rank / kOuts));
        for (int64_t p = 0; p < pieces; ++p) {
          const int64_t j0 = adapters.rank * p / pieces / kOuts * kOuts;
          const int64_t j1 = p + 1 == pieces ? adapters.rank : adapters.rank * (p + 1) / pieces / kOuts * kOuts;
          tasks_.push_back({g.slot, g.begin, g.end, j0, j1});
        }
      } else {
        for (int64_t b = g.begin; b < g.end; b += 8 * kRows)
          tasks_.push_back({g.slot, b, std::min<int64_t>(g.end, b + 8 * kRows), 0, adapters.rank});
      }
    }
  }

  // Nothing to do, until it is prepared again.
  void clear() { tasks_.clear(); }
  int64_t tasks() const { return int64_t(tasks_.size()); }

  void run(int64_t i) const {
    const Task& task = tasks_[size_t(i)];
    const Factor down = adapters_->down.from(int64_t(task.slot) * adapters_->rank * in_);
    Rows rows;
    rows.count = task.end - task.begin;
    rows.x = x_.data() + task.begin;
    rows.y = v_.data() + task.begin;
    Weight w;
    w.format = down.half ? Format::kBfloat16 : Format::kFloat32;
    w.data = down.data, w.out = adapters_->rank, w.in = w.group = in_;
    few_rows(w, in_, column_block(in_), nullptr, rows, task.j0, task.j1);
    for (int64_t r = 0; r < rows.count; ++r) {
      float scale = adapters_->scale[task.slot];
      if (!strengths_.empty()) scale = scale * strengths_[size_t(task.begin + r)];
      for (int64_t j = task.j0; j < task.j1; ++j) rows.y[r][j] *= scale;
      if (task.j1 == adapters_->rank)
        for (int64_t j = adapters_->rank; j < stride_; ++j) rows.y[r][j] = 0;
    }
  }

 private:
  struct Task {
    int32_t slot;
    int64_t begin, end, j0, j1;
  };
  const Adapters* adapters_ = nullptr;
  int64_t in_ = 0, stride_ = 0;
  std::vector<const float*> x_;
  std::vector<float*> v_;
  std::vector<float> strengths_;
  std::vector<Task> tasks_;
};

}  // namespace COLORA_ISA_NAMESPACE
