// decode_steps: the token loop of the generation in one call. Each step embeds the last token of every running request,
// runs the layers over the cache, multiplies with the head, chooses the next tokens and books them.
//
// The parts are those of embedding, decoder_layers, rms_norm, multi_lora_linear, adjust_logits, contrast_strength,
// contrastive_select and token_details, so the numbers are theirs to the last bit. Three things are left out because nobody
// reads them: rows of requests that have ended, rows that only fill a bucket, and, of rows behind a leading one, the logits
// of tokens that do not survive its cut (the head is multiplied for the blocks of survivors alone).
//
// Inputs: those of COLORA_STEPS_ARGUMENTS, then the embedding's base, the head and the layers; see operands.h.
//   token, position, active, previous (requests); slots, cache_rows (rows); whole ... mask: the requests' options, see
//   options.h and adjust.h;
//   uniforms (requests, capacity); eos (any); steps, forgiving (1); prompt (requests, width) and lengths (requests), or
//   absent where no contrast adapts; cos, sin; norm, norm_eps: weight and eps of the last norm.
// Outputs: ints (capacity, requests, 3), floats (capacity, requests, 4), counts, token, position, active (requests), tops
// (capacity, requests, kMostTop), details (capacity, requests, kDetails), see details.h.
#include <memory>
#include <new>

#include "embedding.h"
#include "layers.h"
#include "voices.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

using A = StepsArgument;

constexpr int kOutputs = 8;

struct Request : Voices {
  int32_t token = 0, position = 0, taken = 0, budget = 0;
  bool active = false;
};

class Steps {
 public:
  explicit Steps(colora::Call& call)
      : slots_(in(call, A::slots)), cache_rows_(in(call, A::cache_rows)), uniforms_(in(call, A::uniforms)),
        eos_(in(call, A::eos)) {
    const Options options(in(call, A::whole), in(call, A::real), in(call, A::mix_rows), in(call, A::mix_weights));
    const int64_t count = options.requests();
    const Tensor steps = in(call, A::steps), forgiving = in(call, A::forgiving);
    slots_.expect_dtype("int32").expect_rank(1);
    rows_ = slots_.dim(0);
    cache_rows_.expect_dtype("int32").expect_rank(1).expect_dim(0, rows_, "rows, as in slots");
    uniforms_.expect_dtype("float32").expect_rank(2).expect_dim(0, count, "requests, as in whole");
    eos_.expect_dtype("int32").expect_rank(1);
    for (const Tensor* t : {&steps, &forgiving}) t->expect_dtype("int32").expect_rank(1).expect_dim(0, 1, "one number");
    capacity_ = uniforms_.dim(1);
    steps_ = *steps.data<int32_t>();
    if (steps_ < 0 || steps_ > capacity_)
      steps.fail("is %lld, expected 0 to %lld, the columns of uniforms", (long long)steps_, (long long)capacity_);
    forgiving_ = *forgiving.data<int32_t>() != 0;
    read_model(call);
    read_requests(call, options, count);
    check_positions();
  }

  void run(const colora::Call& call) {
    int32_t* ints = output(call, 0, "ints", "int32", 3);
    float* floats = reinterpret_cast<float*>(output(call, 1, "floats", "float32", 4));
    int32_t* tops = output(call, 6, "tops", "int32", kMostTop);
    float* details = reinterpret_cast<float*>(output(call, 7, "details", "float32", kDetails));
    int32_t* state[4];
    const char* names[4] = {"counts", "token", "position", "active"};
    const int64_t count = int64_t(requests_.size());
    for (int i = 0; i < 4; ++i) {
      const Tensor t = call.out(2 + i, names[i]);
      t.expect_dtype("int32").expect_rank(1).expect_dim(0, count, "requests");
      state[i] = t.data<int32_t>();
    }
    std::fill(ints, ints + capacity_ * count * 3, 0);
    std::fill(floats, floats + capacity_ * count * 4, 0.0f);
    std::fill(tops, tops + capacity_ * count * kMostTop, -1);
    std::fill(details, details + capacity_ * count * kDetails, 0.0f);
    for (int64_t step = 0; step < steps_ && gather(step); ++step) {
      forward();
      choose_all(tops + step * count * kMostTop, details + step * count * kDetails);
      book(ints + step * count * 3, floats + step * count * 4);
    }
    for (int64_t r = 0; r < count; ++r) {
      const Request& q = requests_[size_t(r)];
      state[0][r] = q.taken, state[1][r] = q.token, state[2][r] = q.position, state[3][r] = q.active;
    }
  }

 private:
  void read_model(colora::Call& call) {
    Reader reader(call, int(A::count), kOutputs);
    const Tag tag = Tag::of(reader.next("embed_tokens"));
    const Base table = read_base(reader, tag, -1, "embed_tokens");
    if (table.product() || tag.bias || tag.adapter) table.last.fail("is no table: expected one matrix alone");
    table_ = table.matrix();
    read_norm(in(call, A::norm), in(call, A::norm_eps), table_.in, norm_);
    head_.push_back(read_linear(reader, table_.in, slots_));
    if (head_[0].out() < 1 || head_[0].out() > table_.out) {
      Tensor head = head_[0].base.last;
      head.name = "lm_head";
      head.fail("has %lld outputs, expected 1 to %lld, the tokens of embed_tokens", (long long)head_[0].out(),
                (long long)table_.out);
    }
    stack_ = std::make_unique<LayerStack>(reader, StackInputs{slots_, in(call, A::cos), in(call, A::sin), table_.in});
    call.expect(reader.at(), kOutputs);
  }

  void read_requests(const colora::Call& call, const Options& options, int64_t count) {
    const Tensor token = in(call, A::token), position = in(call, A::position), active = in(call, A::active),
                 previous = in(call, A::previous), prompt = in(call, A::prompt), lengths = in(call, A::lengths);
    for (const Tensor* t : {&token, &position, &active, &previous})
      t->expect_dtype("int32").expect_rank(1).expect_dim(0, count, "requests, as in whole");
    const Adjustments adjustments(options, in(call, A::entries), in(call, A::bias), in(call, A::offsets),
                                  in(call, A::mask), head_[0].out());
    const bool adaptive = !lengths.absent();
    if (adaptive) {
      lengths.expect_dtype("int32").expect_rank(1).expect_dim(0, count, "requests, as in whole");
      prompt.expect_dtype("int32").expect_rank(2).expect_dim(0, count, "requests, as in whole");
    }
    requests_.resize(size_t(count));
    for (int64_t r = 0; r < count; ++r) {
      Request& q = requests_[size_t(r)];
      q.select = options.read(r, rows_);
      q.token = token.data<int32_t>()[r], q.position = position.data<int32_t>()[r];
      q.previous = previous.data<int32_t>()[r], q.budget = options.get(r, Whole::budget);
      q.active = active.data<int32_t>()[r] != 0 && q.budget > 0 && q.select.active();
      if (!q.active) continue;
      if (q.token < 0 || q.token >= table_.out)
        token.fail("is %d in request %lld, expected 0 to %lld", q.token, (long long)r, (long long)table_.out - 1);
      if (q.select.temperature > 0.0f)
        for (int64_t i = 0; i < std::min<int64_t>(steps_, q.budget); ++i)
          checked_uniform(uniforms_, uniforms_.data<float>()[r * capacity_ + i], r);
      q.adjustment = adjustments.read(r);
      if (q.select.count < 2) continue;
      q.settle(head_[0], slots_.data<int32_t>());
      if (!q.select.contrast()) continue;
      q.adapt(options, r);
      StrengthOptions& s = q.strength;
      if (!adaptive) {
        if (s.mode) lengths.fail("is absent, but the contrast of request %lld adapts (mode %d)", (long long)r, s.mode);
        continue;
      }
      s.length = checked_length(lengths, r, prompt.dim(1));
      s.prompt = prompt.data<int32_t>() + r * prompt.dim(1);  // (width,)
    }
  }

  // Every row that is used has one request, a cache row of its own and room for all tokens that may come.
  void check_positions() const {
    std::vector<int32_t> start(size_t(rows_), 0), length(size_t(rows_), 0);
    for (size_t r = 0; r < requests_.size(); ++r) {
      const Request& q = requests_[r];
      if (!q.active) continue;
      for (int k = 0; k < q.select.count; ++k) {
        const int64_t row = q.select.rows[k];
        if (length[size_t(row)] > 0)
          colora::refuse("decode_steps: row %lld is used twice (the second time by request %zu), expected rows of its own "
                         "for each request", (long long)row, r);
        start[size_t(row)] = q.position;
        length[size_t(row)] = int32_t(std::min<int64_t>(steps_, q.budget));
      }
    }
    Tensor starts = cache_rows_, lengths = cache_rows_;
    starts.name = "position", starts.raw = start.data();
    lengths.name = "steps", lengths.raw = length.data();
    stack_->check_rows(cache_rows_, starts, lengths, rows_, std::max<int64_t>(capacity_, 1));
  }

  int32_t* output(const colora::Call& call, int i, const char* name, const char* dtype, int64_t width) const {
    const Tensor t = call.out(i, name);
    t.expect_dtype(dtype).expect_rank(3).expect_dim(0, capacity_, "the columns of uniforms");
    t.expect_dim(1, int64_t(requests_.size()), "requests").expect_dim(2, width, "numbers of a choice");
    return t.data<int32_t>();
  }

  // The rows of this step: all first ones, those behind them whose whole logits are needed, then the others.
  bool gather(int64_t step) {
    ids_.clear(), slot_.clear(), cache_row_.clear(), start_.clear();
    const auto add = [&](const Request& q, int64_t row) {
      ids_.push_back(q.token), start_.push_back(q.position);
      slot_.push_back(slots_.data<int32_t>()[row]), cache_row_.push_back(cache_rows_.data<int32_t>()[row]);
      return int64_t(ids_.size()) - 1;
    };
    for (size_t r = 0; r < requests_.size(); ++r) {
      Request& q = requests_[r];
      if (!q.active) continue;
      q.at[0] = add(q, q.select.rows[0]);
      q.select.uniform = uniforms_.data<float>()[int64_t(r) * capacity_ + step];
    }
    for (const bool whole : {true, false}) {
      for (Request& q : requests_)
        for (int k = 1; q.active && q.whole == whole && k < q.select.count; ++k) q.at[k] = add(q, q.select.rows[k]);
      if (whole) full_ = int64_t(ids_.size());
    }
    ones_.assign(ids_.size(), 1);
    return !ids_.empty();
  }

  void forward() {
    const int64_t rows = int64_t(ids_.size()), hidden = table_.in;
    if (rows > reserved_) {
      for (AlignedFloats* m : {&x_, &sum_, &h_}) m->resize(rows * hidden);
      logits_.resize(rows * head_[0].out());
      reserved_ = rows;
    }
    embed_rows(table_, ids_.data(), rows, x_.data());  // (rows, hidden)
    std::fill(sum_.data(), sum_.data() + rows * hidden, 0.0f);
    row_slots_.set(rows, 1, slot_.data());
    stack_->run({rows, 1, row_slots_, cache_row_.data(), start_.data(), ones_.data()}, x_.data(), sum_.data(), x_.data(),
                sum_.data());
    add_norm_rows(x_.data(), sum_.data(), norm_.weight, norm_.eps, rows, hidden, sum_.data(), h_.data(), nullptr);
    head_[0].y = logits_.data();  // (full rows, vocab)
    if (full_ != rows) row_slots_.set(full_, 1, slot_.data());
    run_linears(head_, h_.data(), hidden, row_slots_);
  }

  void choose_all(int32_t* tops, float* details) {
    const int64_t vocab = head_[0].out();
    choices_.assign(requests_.size(), Choice());
    const auto work = [&](int64_t r) {
      Request& q = requests_[size_t(r)];
      if (!q.active) return;
      try {
        choices_[size_t(r)] = choose_one(q, head_[0].base, h_.data(), logits_.data(), tops + r * kMostTop,
                                         details + r * kDetails);
      } catch (const std::bad_alloc&) {  // must not leave the parallel region
        choices_[size_t(r)].error = "no memory";
      }
    };
    parallel_rows(int64_t(requests_.size()), vocab, work);
    for (size_t r = 0; r < choices_.size(); ++r)
      if (!forgiving_ && !choices_[r].error.empty())
        colora::refuse("decode_steps: %s (request %zu), expected finite numbers", choices_[r].error.c_str(), r);
  }

  void book(int32_t* ints, float* floats) {
    for (size_t r = 0; r < requests_.size(); ++r) {
      Request& q = requests_[r];
      if (!q.active) continue;
      const bool failed = !choices_[r].error.empty();
      const Choice choice = failed ? Choice() : choices_[r];
      choice.write(ints + r * 3, floats + r * 4);
      q.token = q.previous = int32_t(choice.token);
      q.adjustment.take(q.token);
      ++q.taken, ++q.position;
      const int32_t* ends = eos_.data<int32_t>();
      q.active = !failed && q.taken < q.budget && std::find(ends, ends + eos_.size(), q.token) == ends + eos_.size();
    }
  }

  const Tensor slots_, cache_rows_, uniforms_, eos_;
  int64_t rows_ = 0, capacity_ = 0, steps_ = 0, full_ = 0, reserved_ = 0;
  bool forgiving_ = false;
  Weight table_;
  Norm norm_;
  std::vector<Linear> head_;
  std::unique_ptr<LayerStack> stack_;
  std::vector<Request> requests_;
  std::vector<Choice> choices_;
  std::vector<int32_t> ids_, slot_, cache_row_, start_, ones_;
  RowSlots row_slots_;
  AlignedFloats x_, sum_, h_, logits_;
};

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

COLORA_OPERATOR(decode_steps) {
  using namespace COLORA_ISA_NAMESPACE;
  Steps(call).run(call);
}
