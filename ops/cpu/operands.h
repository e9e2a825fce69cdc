// How the tensors of linears and layers are laid out in a call: the one place on this side that knows it, as
// colora_ms/kernels/operands.py is on the other. Every list of names below stands there too, in the same order
// (tests/kernels/test_operands.py compares them), and no number of a tensor is written down anywhere.
//
// A linear is a tag, the tensors of its base (those of the tag's format, then its bias if it has one) and the adapters'
// down, up and scale if there are any; what is not there has no place. The tag is an int8 tensor whose *length* says
// which of them there are: a length is known while a graph is compiled, when nobody sees values.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"
#include "form.h"
#include "lora.h"
#include "weight_table.h"
#include "weights.h"

// An enum class whose members' names are texts too: name_of(Enum::member) is "member".
#define COLORA_MEMBER(name) name,
#define COLORA_TEXT(name) #name,
#define COLORA_NAMES(Enum, LIST)                                \
  enum class Enum : int { LIST(COLORA_MEMBER) count };          \
  inline const char* name_of(Enum member) {                     \
    static constexpr const char* kNames[] = {LIST(COLORA_TEXT)}; \
    return kNames[int(member)];                                 \
  }

// Formats of a base and how many tensors each has, its bias not counted.
#define COLORA_BASE_FORMATS(X) \
  X(float32, 1)                \
  X(bfloat16, 1)               \
  X(int8, 2)                   \
  X(int4, 2)                   \
  X(float16, 1)                \
  X(q4_0, 1)                   \
  X(q4_1, 1)                   \
  X(q5_0, 1)                   \
  X(q5_1, 1)                   \
  X(q8_0, 1)                   \
  X(q4_k, 1)                   \
  X(q5_k, 1)                   \
  X(q6_k, 1)                   \
  X(int4_zero, 2)              \
  X(int8_zero, 2)              \
  X(int4_zero_ordered, 3)      \
  X(int8_zero_ordered, 3)      \
  X(product, 2)                \
  X(product_with_core, 3)

// The parts of a layer, in order, and what each consists of: weight and eps of a norm, a linear, one tensor, or gate_proj,
// up_proj and down_proj of every expert. The layer's form (form.h) says which of the optional ones are there.
#define COLORA_LAYER_PARTS(X)        \
  X(before_attention, optional_norm) \
  X(q_proj, linear)                  \
  X(k_proj, linear)                  \
  X(v_proj, linear)                  \
  X(q_norm, optional_norm)           \
  X(k_norm, optional_norm)           \
  X(k_cache, tensor)                 \
  X(v_cache, tensor)                 \
  X(o_proj, linear)                  \
  X(after_attention, optional_norm)  \
  X(before_mlp, optional_norm)       \
  X(gate_proj, optional_linear)      \
  X(up_proj, optional_linear)        \
  X(down_proj, optional_linear)      \
  X(router, optional_linear)         \
  X(shared_gate, optional_linear)    \
  X(experts, experts)                \
  X(after_mlp, optional_norm)

// Inputs of step, whose model stands in the table of weights.
#define COLORA_STEP_ARGUMENTS(X) \
  X(table)                       \
  X(tokens)                      \
  X(rows)                        \
  X(positions)                   \
  X(counts)                      \
  X(slots)                       \
  X(strengths)                   \
  X(tables)                      \
  X(copies)                      \
  X(previous)                    \
  X(whole)                       \
  X(real)                        \
  X(mix_rows)                    \
  X(mix_weights)                 \
  X(uniforms)                    \
  X(eos)                         \
  X(extras)

// What a request may bring beside its options, of any length: a tensor each in the table that `extras` names, one request
// after another; empty: nothing. A table of number 0 means that nobody brings anything.
#define COLORA_EXTRAS(X) \
  X(prompt)              \
  X(entries)             \
  X(bias)                \
  X(mask)

namespace COLORA_ISA_NAMESPACE {

COLORA_NAMES(StepArgument, COLORA_STEP_ARGUMENTS)
COLORA_NAMES(Extra, COLORA_EXTRAS)

#define COLORA_FIRST(name, second) name,
#define COLORA_SECOND(name, second) second,
enum class BaseFormat : int { COLORA_BASE_FORMATS(COLORA_FIRST) count };
enum class LayerPart : int { COLORA_LAYER_PARTS(COLORA_FIRST) count };
enum class PartKind { optional_norm, linear, optional_linear, experts, tensor };

inline const char* name_of(BaseFormat format) {
#define COLORA_FIRST_TEXT(name, second) #name,
  static constexpr const char* kNames[] = {COLORA_BASE_FORMATS(COLORA_FIRST_TEXT)};
  return kNames[int(format)];
}

inline const char* name_of(LayerPart part) {
  static constexpr const char* kNames[] = {COLORA_LAYER_PARTS(COLORA_FIRST_TEXT)};
  return kNames[int(part)];
}

inline PartKind kind_of(LayerPart part) {
  using enum_kind = PartKind;
#define COLORA_KIND(name, second) enum_kind::second,
  static constexpr PartKind kKinds[] = {COLORA_LAYER_PARTS(COLORA_KIND)};
  return kKinds[int(part)];
}

template <class Argument>
colora::Tensor in(const colora::Call& call, Argument argument) {
  return call.in(int(argument), name_of(argument));
}

// What a linear's tag says.
struct Tag {
  BaseFormat format;
  bool bias, adapter;

  static Tag of(const colora::Tensor& tag) {
    const int most = int(BaseFormat::count) * 4;
    if (!tag.is("int8") || tag.ndim != 1 || tag.dim(0) < 1 || tag.dim(0) > most)
      tag.fail("is %s of shape %s, expected int8 of 1 to %d numbers, which begins a linear", tag.dtype,
               tag.shape_text().c_str(), most);
    const int number = int(tag.dim(0)) - 1;
    return {BaseFormat(number / 4), (number & 2) != 0, (number & 1) != 0};
  }

  // Tensors of the linear, the tag itself counted.
  int tensors() const {
    static constexpr int kTensors[] = {COLORA_BASE_FORMATS(COLORA_SECOND)};
    return 1 + kTensors[int(format)] + bias + 3 * adapter;
  }
};

// Reads tensors one after another: the inputs of a call from a place on, or those of a table of weights.
class Reader {
 public:
  Reader(const colora::Call& call, int at, int outputs)
      : op_(call.op()), call_(&call), at_(at), end_(call.count() - outputs), all_(call.count()) {}
  Reader(const colora::WeightTable& table, const char* op)
      : op_(op), table_(&table), end_(int(table.count())), all_(end_) {}

  int at() const { return at_; }
  bool more() const { return at_ < end_; }
  colora::Tensor next(const char* name) {
    if (!more()) colora::refuse("%s: got %d tensors, expected one more as '%s'", op_, all_, name);
    const int i = at_++;
    return call_ ? call_->in(i, name) : table_->tensor(i, op_, name);
  }
  // An input that is not given, for the checks that name it.
  colora::Tensor absent(const char* name) const {
    colora::Tensor t;
    t.op = op_, t.name = name;
    return t;
  }
  // A reader from here on; this one goes on behind `tensors` of them.
  Reader skip(int tensors) {
    Reader here = *this;
    at_ += tensors;
    if (at_ > end_) colora::refuse("%s: got %d tensors, expected at least %d inputs", op_, all_, at_);
    return here;
  }

 private:
  const char* op_;
  const colora::Call* call_ = nullptr;
  const colora::WeightTable* table_ = nullptr;
  int at_ = 0, end_, all_;  // all_: tensors of the call, outputs counted
};

// What a linear multiplies with, whatever it is stored as: one matrix, or a product of small ones in the order in which x
// meets them; and its bias.
struct Base {
  BaseFormat format = BaseFormat::float32;
  std::vector<Weight> factors;
  const float* bias = nullptr;
  const int32_t* order = nullptr;  // (in,): column k of the matrix meets x[order[k]]; null: x[k]
  colora::Tensor last;  // the tensor of the last factor, for messages

  bool product() const { return factors.size() > 1; }
  const Weight& matrix() const { return factors.back(); }  // the whole weight where it is no product
  int64_t out() const { return factors.back().out; }
};

// The order of a matrix's columns, which the loader made a permutation; here what it reads is kept inside of x.
inline const int32_t* order_of(const colora::Tensor& order, int64_t in) {
  order.expect_dtype("int32").expect_rank(1).expect_dim(0, in, "the input columns of the weight");
  const int32_t* at = order.data<const int32_t>();
  uint32_t most = 0;
  for (int64_t k = 0; k < in; ++k) most = std::max(most, uint32_t(at[k]));
  if (int64_t(most) >= in)
    order.fail("holds %d, expected columns of x, 0 to %lld", int(int32_t(most)), (long long)in - 1);
  return at;
}

// The base of a linear with `in` columns (< 0: any number) behind its tag. `name`: of a matrix that is no product.
inline Base read_base(Reader& reader, const Tag& tag, int64_t in, const char* name = "weight") {
  Base base;
  base.format = tag.format;
  const auto factor = [&](const char* what, int64_t columns) {
    base.last = reader.next(what);
    const Format format = base.last.is("bfloat16") ? Format::kBfloat16 : Format::kFloat32;
    base.factors.push_back(weight_of(base.last, reader.absent("weight_scale"), columns, format));
    return base.factors.back().out;
  };
  if (tag.format == BaseFormat::product || tag.format == BaseFormat::product_with_core) {
    int64_t rank = factor("inner", in);
    if (tag.format == BaseFormat::product_with_core) rank = factor("core", rank);
    factor("outer", rank);
  } else {
    // The formats before the products are those of one matrix; an ordered one is the format of its integers.
    const bool ordered = tag.format == BaseFormat::int4_zero_ordered || tag.format == BaseFormat::int8_zero_ordered;
    const Format format = tag.format == BaseFormat::int4_zero_ordered   ? Format::kInt4_Zero
                          : tag.format == BaseFormat::int8_zero_ordered ? Format::kInt8_Zero
                                                                        : Format(int(tag.format));
    base.last = reader.next(name);
    const bool scaled = layout_of(format).scale_numbers > 0;
    base.factors.push_back(
        weight_of(base.last, scaled ? reader.next("weight_scale") : reader.absent("weight_scale"), in, format));
    if (ordered) base.order = order_of(reader.next("order"), base.matrix().in);
  }
  if (tag.bias) {
    const colora::Tensor bias = reader.next("bias");
    bias.expect_dtype("float32").expect_rank(1).expect_dim(0, base.out(), "the output rows of the weight");
    base.bias = bias.data<const float>();
  }
  return base;
}

// The adapters of a linear behind its base.
inline Adapters read_adapters(Reader& reader, const Tag& tag, int64_t in, int64_t out, const colora::Tensor& slots) {
  if (!tag.adapter) return {};
  const colora::Tensor down = reader.next("down"), up = reader.next("up"), scale = reader.next("scale");
  const Adapters adapters = adapters_of(down, up, scale, in, out);
  if (!slots.absent() && adapters.present()) colora::check_slots(slots, adapters.slots);
  return adapters;
}

// Where the parts of one layer begin.
struct LayerTensors {
  LayerForm form;
  std::vector<Reader> parts;
  std::vector<bool> there;
  bool has(LayerPart part) const { return there[size_t(part)]; }
  Reader at(LayerPart part) const { return parts[size_t(part)]; }
};

// A reader at the linear, and the given one behind it.
inline Reader skip_linear(Reader& reader, const char* name) {
  Reader linear = reader;
  return reader.skip(Tag::of(linear.next(name)).tensors());
}

// Finds the parts of the layer that begins with its form.
inline LayerTensors read_layer_places(Reader& reader) {
  constexpr int64_t kMostExperts = 4096;
  const colora::Tensor whole = reader.next("layer_whole");
  LayerTensors found{LayerForm(whole, reader.next("layer_real")), {}, {}};
  int optional = 0;
  for (int i = 0; i < int(LayerPart::count); ++i) {
    const PartKind kind = kind_of(LayerPart(i));
    optional += kind == PartKind::optional_norm || kind == PartKind::optional_linear;
  }
  const int64_t mask = found.form.within(LayerWhole::parts, "parts", 0, (int64_t(1) << optional) - 1);
  const int64_t experts = found.form.within(LayerWhole::experts, "experts", 0, kMostExperts);
  for (int i = 0, bit = 0; i < int(LayerPart::count); ++i) {
    const char* name = name_of(LayerPart(i));
    const PartKind kind = kind_of(LayerPart(i));
    bool there = true;
    if (kind == PartKind::optional_norm || kind == PartKind::optional_linear) there = mask >> bit++ & 1;
    if (kind == PartKind::experts) there = experts > 0;
    found.there.push_back(there);
    found.parts.push_back(reader.skip(0));
    if (!there) continue;
    if (kind == PartKind::optional_norm) reader.skip(2);  // weight and eps
    if (kind == PartKind::tensor) reader.skip(1);
    const int64_t linears = kind == PartKind::experts ? 3 * experts
                            : kind == PartKind::linear || kind == PartKind::optional_linear ? 1 : 0;
    for (int64_t n = 0; n < linears; ++n) skip_linear(reader, name);
  }
  return found;
}

}  // namespace COLORA_ISA_NAMESPACE
