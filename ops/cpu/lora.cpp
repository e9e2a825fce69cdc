// lora_shrink: v = scale[slot]·x·down[slot]ᵀ          inputs x, slots, down, scale, segments; output v
// lora_expand: result = y + v·up[slot]ᵀ               inputs v, slots, up, y, segments; output result
//
// Without segments (absent) slots holds one number per row of x, valid for all its tokens (BGMV); with segments
// (n + 1 token offsets) one per segment (SGMV). Tokens are grouped by slot, so that each adapter is read once.
// Punica: Multi-Tenant LoRA Serving, arXiv 2310.18547, section 4.
#include "lora.h"
#include "outer.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

// The slot of every token, from rows or segments.
std::vector<int32_t> token_slots(const colora::Tensor& x, const colora::Tensor& slots, const colora::Tensor& segments,
                                 int64_t known_slots) {
  slots.expect_dtype("int32").expect_rank(1);
  const int32_t* slot = slots.data<const int32_t>();
  if (segments.absent()) {
    x.expect_rank(2, 3);
    slots.expect_dim(0, x.dim(0), "one slot per row");
    colora::check_slots(slots, known_slots);
    const int64_t per_row = x.ndim == 3 ? x.dim(1) : 1;
    std::vector<int32_t> result(size_t(x.dim(0) * per_row));
    for (size_t t = 0; t < result.size(); ++t) result[t] = slot[int64_t(t) / per_row];
    return result;
  }
  x.expect_rank(2);
  segments.expect_dtype("int32").expect_rank(1);
  if (segments.dim(0) < 1) segments.fail("is empty, expected the offsets 0, ..., number of tokens");
  slots.expect_dim(0, segments.dim(0) - 1, "one slot per segment");
  const int32_t* offset = segments.data<const int32_t>();
  const int64_t n = slots.dim(0), tokens = x.dim(0);
  if (offset[0] != 0) segments.fail("starts at %d, expected 0", int(offset[0]));
  for (int64_t i = 0; i < n; ++i)
    if (offset[i + 1] < offset[i])
      segments.fail("falls from %d to %d at index %lld, expected ascending offsets", int(offset[i]),
                    int(offset[i + 1]), (long long)i + 1);
  if (offset[n] != tokens)
    segments.fail("ends at %d, expected the number of tokens, %lld", int(offset[n]), (long long)tokens);
  colora::check_slots(slots, known_slots);
  std::vector<int32_t> result(static_cast<size_t>(tokens));
  for (int64_t i = 0; i < n; ++i) std::fill(result.begin() + offset[i], result.begin() + offset[i + 1], slot[i]);
  return result;
}

// `wide` has the leading dimensions of `like` and another last one.
void expect_leading(const colora::Tensor& wide, const colora::Tensor& like, int64_t last, const char* because) {
  wide.expect_dtype("float32").expect_rank(like.ndim);
  for (int i = 0; i + 1 < like.ndim; ++i) wide.expect_dim(i, like.dim(i), like.name);
  wide.expect_dim(-1, last, because);
}

// Rows [o0, o1) of up (out, rank), transposed: (rank, kOuterColumns).
void transpose_panel(const float* up, int64_t rank, int64_t o0, int64_t o1, float* to) {
  for (int64_t o = o0; o < o1; ++o)
    for (int64_t j = 0; j < rank; ++j) to[j * kOuterColumns + (o - o0)] = up[o * rank + j];
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

COLORA_OPERATOR(lora_shrink) {
  using namespace COLORA_ISA_NAMESPACE;
  call.expect(5, 1);
  const colora::Tensor x = call.in(0, "x"), slots = call.in(1, "slots"), down = call.in(2, "down"),
                       scale = call.in(3, "scale"), segments = call.in(4, "segments"), v = call.out(0, "v");
  x.expect_dtype("float32").expect_rank(2, 3);
  check_stack(down.expect_dtype("float32"), "slots, rank, in");
  down.expect_dim(2, x.dim(-1), "the columns of 'x'");
  scale.expect_dtype("float32").expect_rank(1).expect_dim(0, down.dim(0), "one scale per slot");
  expect_leading(v, x, down.dim(1), "the rank of 'down'");
  const std::vector<int32_t> slot = token_slots(x, slots, segments, down.dim(0));

  Adapters adapters;
  adapters.down = factor_of(down);
  adapters.scale = scale.data<const float>();
  adapters.slots = down.dim(0);
  adapters.rank = down.dim(1);
  const int64_t tokens = int64_t(slot.size()), in = x.dim(-1), rank = adapters.rank;
  float* to = v.data<float>();
  for (int64_t t = 0; t < tokens; ++t)
    if (slot[size_t(t)] < 0) std::memset(to + t * rank, 0, size_t(rank) * sizeof(float));
  if (rank == 0) return;
  SlotGroups groups;
  group_by_slot(tokens, 1, slot.data(), groups);
  Shrink shrink;
  shrink.prepare(adapters, groups, x.data<const float>(), in, to, rank, colora::thread_count());
  if (int64_t(groups.tokens.size()) * rank * in < (1 << 15)) {
    for (int64_t i = 0; i < shrink.tasks(); ++i) shrink.run(i);
  } else {
    parallel_tasks(shrink.tasks(), [&](int64_t i) { shrink.run(i); });
  }
}

COLORA_OPERATOR(lora_expand) {
  using namespace COLORA_ISA_NAMESPACE;
  call.expect(5, 1);
  const colora::Tensor v = call.in(0, "v"), slots = call.in(1, "slots"), up = call.in(2, "up"), y = call.in(3, "y"),
                       segments = call.in(4, "segments"), result = call.out(0, "result");
  v.expect_dtype("float32").expect_rank(2, 3);
  check_stack(up.expect_dtype("float32"), "slots, out, rank");
  up.expect_dim(2, v.dim(-1), "the columns of 'v'");
  expect_leading(y, v, up.dim(1), "the output rows of 'up'");
  result.expect_dtype("float32").expect_same_shape(y);
  const std::vector<int32_t> slot = token_slots(v, slots, segments, up.dim(0));

  const int64_t tokens = int64_t(slot.size()), out = up.dim(1), rank = up.dim(2);
  const float *from = y.data<const float>(), *low = v.data<const float>(), *stack = up.data<const float>();
  float* to = result.data<float>();
  SlotGroups groups;
  group_by_slot(tokens, 1, slot.data(), groups);
  std::vector<std::vector<Run>> runs;
  for (const SlotGroups::Group& group : groups.groups) runs.push_back(runs_of(groups, group));
  for (int64_t t = 0; t < tokens; ++t)
    if (slot[size_t(t)] < 0) std::memcpy(to + t * out, from + t * out, size_t(out) * sizeof(float));
  if (runs.empty() || out == 0) return;

  const int64_t panels = (out + kOuterColumns - 1) / kOuterColumns;
  const int threads = threads_for(int64_t(groups.tokens.size()) * out * rank, 1 << 15);
  const int64_t panel_size = std::max<int64_t>(rank, 1) * kOuterColumns;
  std::vector<float> buffers(size_t(panel_size * threads));
  parallel_tasks(int64_t(runs.size()) * panels, threads, [&](int64_t i) {
    float* packed = buffers.data() + worker_index() * panel_size;
    const std::vector<Run>& group = runs[size_t(i / panels)];
    const int64_t o0 = i % panels * kOuterColumns, o1 = std::min(out, o0 + kOuterColumns);
    transpose_panel(stack + group[0].slot * out * rank, rank, o0, o1, packed);
    for (const Run& run : group)
      outer_panel(run.end - run.begin, o1 - o0, rank, low + run.begin * rank, rank, 1, packed, kOuterColumns,
                  from + run.begin * out + o0, to + run.begin * out + o0, out);
  });
}
