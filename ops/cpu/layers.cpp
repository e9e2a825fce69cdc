// decoder_layers: consecutive decoder layers (pre-norm attention over a key/value cache, then a gated MLP) in one call.
//
// A step of a small model is some 250 operators of 20 to 200 µs; each costs the framework more than 10 µs and leaves
// the memory idle meanwhile. Here they follow one another directly. The parts are those of multi_lora_linear,
// cached_attention, rms_norm and swiglu, so the numbers are theirs to the last bit.
//
// Inputs: x, residual (rows, tokens, hidden); slots; cos, sin; cache_rows, start, length; then kPerLayer of each layer:
//   weight and eps of the norm before attention; q, k, v (six operands each); weight and eps of the q and of the k norm
//   (or absent); k_cache, v_cache; o (six); weight and eps of the norm before the MLP; gate, up, down (six each).
// Outputs: the last layer's MLP output and the residual stream before it, both of x's shape.
#include "attention_cached.h"
#include "linear.h"
#include "norm.h"
#include "swiglu.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

constexpr int kFixed = 8, kPerLayer = 52;

struct Norm {
  const float* weight = nullptr;
  float eps = 0;
  std::vector<float> buffer;  // of a bfloat16 weight
};

void read_norm(const colora::Call& call, int at, const char* name, int64_t n, Norm& norm) {
  const Tensor weight = call.in(at, name);
  if (weight.absent()) return;
  weight.expect_dtype("float32", "bfloat16").expect_rank(1).expect_dim(0, n, "the normed axis");
  norm.eps = read_eps(call.in(at + 1, "eps"));
  norm.weight = widened(weight, norm.buffer);
}

struct Layer {
  Norm before_attention, q_norm, k_norm, before_mlp;
  std::vector<Linear> qkv, o, gate_up, down;
  CachedSizes sizes;
  void *k_cache, *v_cache;
  bool half_width;
};

struct Shared {
  Tensor slots, cos, sin, cache_rows, start, length;
  int64_t rows, tokens, hidden;
};

// All checks of one layer; nothing is computed before every layer has passed.
void read_layer(const colora::Call& call, int at, const Shared& s, Layer& layer) {
  read_norm(call, at, "input_layernorm", s.hidden, layer.before_attention);
  if (!layer.before_attention.weight) call.in(at, "input_layernorm").fail("is absent");
  for (int i = 0; i < 3; ++i) layer.qkv.push_back(read_linear(call, at + 2 + 6 * i, s.hidden, s.slots));
  const Tensor k_cache = call.in(at + 24, "k_cache"), v_cache = call.in(at + 25, "v_cache"),
               q_weight = call.in(at + 2, "q_proj"), k_weight = call.in(at + 8, "k_proj");
  const int64_t width = layer.qkv[0].weight.out;
  layer.sizes = cached_sizes(k_cache, v_cache, s.cos, s.sin, s.rows, s.tokens, width, q_weight);
  for (int i = 1; i < 3; ++i)
    if (layer.qkv[size_t(i)].weight.out != layer.sizes.kv_heads * layer.sizes.dim)
      k_weight.fail("(or v_proj) has %lld outputs, expected kv_heads * head_dim = %lld as in k_cache",
                    (long long)layer.qkv[size_t(i)].weight.out, (long long)(layer.sizes.kv_heads * layer.sizes.dim));
  read_norm(call, at + 20, "q_norm", layer.sizes.dim, layer.q_norm);
  read_norm(call, at + 22, "k_norm", layer.sizes.dim, layer.k_norm);
  layer.k_cache = k_cache.raw, layer.v_cache = v_cache.raw, layer.half_width = k_cache.is("bfloat16");
  check_cache_rows(s.cache_rows, s.start, s.length, s.rows, s.tokens, k_cache.dim(0), layer.sizes.max_len);
  layer.o.push_back(read_linear(call, at + 26, width, s.slots));
  call.in(at + 26, "o_proj").expect_dim(0, s.hidden, "the last axis of x");
  read_norm(call, at + 32, "post_attention_layernorm", s.hidden, layer.before_mlp);
  if (!layer.before_mlp.weight) call.in(at + 32, "post_attention_layernorm").fail("is absent");
  for (int i = 0; i < 2; ++i) layer.gate_up.push_back(read_linear(call, at + 34 + 6 * i, s.hidden, s.slots));
  call.in(at + 40, "up_proj").expect_dim(0, layer.gate_up[0].weight.out, "the outputs of gate_proj");
  layer.down.push_back(read_linear(call, at + 46, layer.gate_up[0].weight.out, s.slots));
  call.in(at + 46, "down_proj").expect_dim(0, s.hidden, "the last axis of x");
}

// RMS norm of every head, in place.
void norm_heads(const Norm& norm, int64_t heads, int64_t dim, float* x) {
  if (!norm.weight) return;
  parallel_ranges(heads, 1, kNormGrain / (dim + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) norm_row(x + h * dim, norm.weight, x + h * dim, dim, norm.eps);
  });
}

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

COLORA_OPERATOR(decoder_layers) {
  using namespace COLORA_ISA_NAMESPACE;
  const int count = (call.count() - kFixed - 2) / kPerLayer;
  if (count < 1 || call.count() != kFixed + 2 + count * kPerLayer)
    colora::refuse("%s: got %d tensors, expected %d, %d a layer, and two outputs", call.op(), call.count(), kFixed,
                   kPerLayer);
  call.expect(kFixed + count * kPerLayer, 2);
  const Tensor x = call.in(0, "x"), residual = call.in(1, "residual"), y = call.out(0, "y"), total = call.out(1, "total");
  x.expect_dtype("float32").expect_rank(3);
  for (const Tensor* t : {&residual, &y, &total}) t->expect_dtype("float32").expect_same_shape(x);
  const Shared s{call.in(2, "slots"),  call.in(3, "cos"),    call.in(4, "sin"), call.in(5, "cache_rows"),
                 call.in(6, "start"),  call.in(7, "length"), x.dim(0),          x.dim(1),
                 x.dim(2)};
  if (s.hidden < 1) x.fail("has shape %s, expected at least one column", x.shape_text().c_str());
  if (!s.slots.absent()) s.slots.expect_dtype("int32").expect_rank(1).expect_dim(0, s.rows, "one slot per row of 'x'");
  std::vector<Layer> layers(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) read_layer(call, kFixed + i * kPerLayer, s, layers[size_t(i)]);
  const int64_t tokens = s.rows * s.tokens;
  if (tokens == 0) return;

  int64_t width = 0, kv_width = 0, inner = 0;
  for (const Layer& l : layers) {
    width = std::max(width, l.qkv[0].weight.out);
    kv_width = std::max(kv_width, l.qkv[1].weight.out);
    inner = std::max(inner, l.gate_up[0].weight.out);
  }
  AlignedFloats memory[7];
  const int64_t sizes[7] = {s.hidden, width, kv_width, kv_width, width, inner, inner};
  for (int i = 0; i < 7; ++i) memory[i].resize(tokens * sizes[i]);
  float *h = memory[0].data(), *q = memory[1].data(), *k = memory[2].data(), *v = memory[3].data(),
        *attended = memory[4].data(), *gate = memory[5].data(), *up = memory[6].data();
  const int32_t* row_slot = s.slots.absent() ? nullptr : s.slots.data<const int32_t>();
  float *out = y.data<float>(), *sum = total.data<float>();
  const float *last = x.data<float>(), *stream = residual.data<float>();

  for (Layer& l : layers) {
    const int64_t n = l.qkv[0].weight.out, mlp = l.gate_up[0].weight.out, dim = l.sizes.dim;
    add_norm_rows(last, stream, l.before_attention.weight, l.before_attention.eps, tokens, s.hidden, sum, h, nullptr);
    l.qkv[0].y = q, l.qkv[1].y = k, l.qkv[2].y = v;
    run_linears(l.qkv, h, tokens, s.tokens, s.hidden, row_slot);
    norm_heads(l.q_norm, tokens * l.sizes.heads, dim, q);
    norm_heads(l.k_norm, tokens * l.sizes.kv_heads, dim, k);
    attend_cached({l.sizes, q, k, v, s.cos.data<float>(), s.sin.data<float>(), s.cache_rows.data<int32_t>(),
                   s.start.data<int32_t>(), s.length.data<int32_t>(), attended},
                  l.k_cache, l.v_cache, l.half_width);
    l.o[0].y = out;
    run_linears(l.o, attended, tokens, s.tokens, n, row_slot);
    add_norm_rows(out, sum, l.before_mlp.weight, l.before_mlp.eps, tokens, s.hidden, sum, h, nullptr);
    l.gate_up[0].y = gate, l.gate_up[1].y = up;
    run_linears(l.gate_up, h, tokens, s.tokens, s.hidden, row_slot);
    swiglu_forward(gate, up, tokens * mlp, gate);
    l.down[0].y = out;
    run_linears(l.down, gate, tokens, s.tokens, mlp, row_slot);
    last = out, stream = sum;
  }
}
