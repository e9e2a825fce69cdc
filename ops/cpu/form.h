// What a model and each of its layers say of their form, as numbers in the table of weights: a pair of tensors (int32,
// float32) at the head of the model and of every layer. colora_ms/kernels/layer_form.py has the same lists in the same
// order (tests/kernels/test_operands.py compares them).
#pragma once

#include <cmath>
#include <vector>

#include "check.h"

// Norms: root mean square; the same with 1 + weight (Gemma); mean subtracted, no bias (Cohere).
#define COLORA_NORM_KINDS(X) \
  X(rms)                     \
  X(rms_plus_one)            \
  X(layer)

#define COLORA_ACTIVATIONS(X) \
  X(silu)                     \
  X(gelu_tanh)

// parts: bits, one for each optional part of the layer, in their order; norm: of NORM_KINDS; whole_qk_norm: one norm over
// all heads; parallel: attention and MLP read the same norm; window: 0, or how many positions a query sees, itself
// counted; rotary_table: number of the pair of tables, -1: no rotary; rotary_width: channels of a head that turn;
// rotary_pairs: neighbours turn together, else halves; normalised: the chosen experts' shares sum up to 1.
#define COLORA_LAYER_WHOLE(X) \
  X(parts)                    \
  X(norm)                     \
  X(whole_qk_norm)            \
  X(parallel)                 \
  X(activation)               \
  X(window)                   \
  X(rotary_table)             \
  X(rotary_width)             \
  X(rotary_pairs)             \
  X(experts)                  \
  X(experts_per_token)        \
  X(normalised)

// query_factor: on scores, 0: one over the root of a head's channels; score_cap: 0, or c of c * tanh(score / c);
// branch_factor: on what is added to the residual.
#define COLORA_LAYER_REAL(X) \
  X(query_factor)            \
  X(score_cap)               \
  X(branch_factor)

// norm: kind of the last norm; rotary_tables: pairs of cosines and sines.
#define COLORA_MODEL_WHOLE(X) \
  X(norm)                     \
  X(rotary_tables)

// embedding_factor: on rows of the embedding; hidden_factor: on what the head reads; logit_cap: as score_cap.
#define COLORA_MODEL_REAL(X) \
  X(embedding_factor)        \
  X(hidden_factor)           \
  X(logit_cap)

namespace COLORA_ISA_NAMESPACE {

#define COLORA_FORM_MEMBER(name) name,
enum class NormKind : int { COLORA_NORM_KINDS(COLORA_FORM_MEMBER) count };
enum class Activation : int { COLORA_ACTIVATIONS(COLORA_FORM_MEMBER) count };
enum class LayerWhole : int { COLORA_LAYER_WHOLE(COLORA_FORM_MEMBER) count };
enum class LayerReal : int { COLORA_LAYER_REAL(COLORA_FORM_MEMBER) count };
enum class ModelWhole : int { COLORA_MODEL_WHOLE(COLORA_FORM_MEMBER) count };
enum class ModelReal : int { COLORA_MODEL_REAL(COLORA_FORM_MEMBER) count };
#undef COLORA_FORM_MEMBER

// A pair of tensors and what stands in it.
template <class WholeName, class RealName>
class Form {
 public:
  Form(const colora::Tensor& whole, const colora::Tensor& real) : whole_(whole), real_(real) {
    whole_.expect_dtype("int32").expect_rank(1).expect_dim(0, int(WholeName::count), "whole numbers of a form");
    real_.expect_dtype("float32").expect_rank(1).expect_dim(0, int(RealName::count), "real numbers of a form");
  }
  int64_t operator[](WholeName name) const { return whole_.template data<int32_t>()[int(name)]; }
  float operator[](RealName name) const { return real_.template data<float>()[int(name)]; }

  // The whole number `name`, which must be from `least` to `most`.
  int64_t within(WholeName name, const char* what, int64_t least, int64_t most) const {
    const int64_t value = (*this)[name];
    if (value < least || value > most)
      whole_.fail("has %lld as %s, expected %lld to %lld", (long long)value, what, (long long)least, (long long)most);
    return value;
  }
  // The real number `name`: finite and >= 0; 0 only where it may be none.
  float positive(RealName name, const char* what, bool none) const {
    const float value = (*this)[name];
    if (!std::isfinite(value) || value < 0.0f || (value == 0.0f && !none))
      real_.fail("has %g as %s, expected a finite number > 0%s", double(value), what, none ? " or 0" : "");
    return value;
  }

 private:
  colora::Tensor whole_, real_;
};

using LayerForm = Form<LayerWhole, LayerReal>;
using ModelForm = Form<ModelWhole, ModelReal>;

// The order in which a head's channels are taken so that those that turn together are d / 2 apart, whatever the layout:
// of `dim` channels the first `width` turn, as halves or as pairs, and the tables' further columns are 1 and 0. Empty:
// they lie so already.
inline std::vector<int32_t> channel_order(int64_t dim, int64_t width, bool pairs) {
  std::vector<int32_t> order(static_cast<size_t>(dim));
  const int64_t half = dim / 2, turning = width / 2;
  bool same = true;
  for (int64_t i = 0; i < half; ++i) {
    const bool turns = i < turning;
    const int64_t first = !turns ? width + i - turning : pairs ? 2 * i : i;
    const int64_t second = !turns ? first + half - turning : pairs ? 2 * i + 1 : turning + i;
    order[size_t(i)] = int32_t(first), order[size_t(half + i)] = int32_t(second);
    same &= first == i && second == half + i;
  }
  if (same) order.clear();
  return order;
}

}  // namespace COLORA_ISA_NAMESPACE
