// step: a flat batch of tokens through the model, then runs of pure decoding, in one call.
//
// The first iteration takes the batch: pieces of prompts and the last tokens of running rows, each with its row and its
// position. The head is multiplied for the last token of every row of the requests that take a token now. The following
// iterations take the new token of every request that goes on, in each of its rows.
//
// The parts are those of embedding, paged_attention, rms_norm, multi_lora_linear, adjust_logits, contrast_strength,
// contrastive_select and token_details, so the numbers are theirs to the last bit. What nobody reads is left out: unused
// places, rows of requests that have ended, and, of rows behind a leading one, the logits of tokens that do not survive its
// cut (the head is multiplied for the blocks of survivors alone).
//
// Inputs: those of COLORA_STEP_ARGUMENTS, see operands.h and colora_ms/kernels/flat_step.py. The table of weights holds the
// model's form (form.h), its pairs of cos and sin, the last norm's weight and eps, the embedding's base, the head and the
// layers, each behind its form.
// Outputs: ints (capacity, requests, 3), floats (capacity, requests, 4), taken (requests,), tops (capacity, requests,
// kMostTop), details (capacity, requests, kDetails), see details.h.
#include <memory>
#include <new>

#include "embedding.h"
#include "stack.h"
#include "voices.h"

namespace COLORA_ISA_NAMESPACE {
namespace {

using colora::Tensor;

using A = StepArgument;

constexpr int kOutputs = 5;

struct Request : Voices {
  int32_t token = 0, taken = 0, budget = 0;
  bool active = false;
};

class Step {
 public:
  explicit Step(colora::Call& call)
      : tokens_(in(call, A::tokens)), rows_(in(call, A::rows)), positions_(in(call, A::positions)),
        slots_(in(call, A::slots)), strengths_(in(call, A::strengths)), tables_(in(call, A::tables)), copies_(in(call, A::copies)),
        uniforms_(in(call, A::uniforms)), eos_(in(call, A::eos)) {
    call.expect(int(A::count), kOutputs);
    const Options options(in(call, A::whole), in(call, A::real), in(call, A::mix_rows), in(call, A::mix_weights));
    const int64_t count = options.requests();
    const Tensor counts = in(call, A::counts);
    counts.expect_dtype("int32").expect_rank(1).expect_dim(0, 3, "tokens, copies and iterations");
    for (const Tensor* t : {&tokens_, &rows_, &positions_})
      t->expect_dtype("int32").expect_rank(1).expect_dim(0, tokens_.dim(0), "as many as tokens");
    slots_.expect_dtype("int32").expect_rank(1);
    strengths_.expect_dtype("float32").expect_rank(1).expect_dim(0, slots_.dim(0), "rows, as in slots");
    for (int64_t row = 0; row < slots_.dim(0); ++row)
      if (!std::isfinite(strengths_.data<float>()[row]))
        strengths_.fail("is %g in row %lld, expected a finite number", double(strengths_.data<float>()[row]),
                        (long long)row);
    tables_.expect_dtype("int32").expect_rank(2).expect_dim(0, slots_.dim(0), "rows, as in slots");
    copies_.expect_dtype("int32").expect_rank(2).expect_dim(1, 2, "source and target");
    uniforms_.expect_dtype("float32").expect_rank(2).expect_dim(0, count, "requests, as in whole");
    eos_.expect_dtype("int32").expect_rank(1);
    capacity_ = uniforms_.dim(1);
    used_ = number(counts, 0, "tokens", tokens_.dim(0));
    copied_ = number(counts, 1, "copies", copies_.dim(0));
    steps_ = number(counts, 2, "iterations", capacity_);
    batch_ = {rows_.data<int32_t>(), positions_.data<int32_t>(), tables_.data<int32_t>(), used_, slots_.dim(0),
              tables_.dim(1)};
    table_of_weights_ = colora::weight_table(in(call, A::table));
    if (const Tensor extras = in(call, A::extras); extras.size() != 2 || extras.data<int64_t>()[0] != 0)
      extras_ = colora::weight_table(extras);
    read_model(call);
    read_requests(call, options, count);
    read_batch();
  }

  void run(const colora::Call& call) {
    const int64_t count = int64_t(requests_.size());
    int32_t* ints = output(call, 0, "ints", "int32", 3);
    float* floats = reinterpret_cast<float*>(output(call, 1, "floats", "float32", 4));
    int32_t* tops = output(call, 3, "tops", "int32", kMostTop);
    float* details = reinterpret_cast<float*>(output(call, 4, "details", "float32", kDetails));
    const Tensor taken = call.out(2, "taken");
    taken.expect_dtype("int32").expect_rank(1).expect_dim(0, count, "requests");
    std::fill(ints, ints + capacity_ * count * 3, 0);
    std::fill(floats, floats + capacity_ * count * 4, 0.0f);
    std::fill(tops, tops + capacity_ * count * kMostTop, -1);
    std::fill(details, details + capacity_ * count * kDetails, 0.0f);
    for (int64_t i = 0; i < copied_; ++i)
      stack_->copy_block(copies_.data<int32_t>()[2 * i], copies_.data<int32_t>()[2 * i + 1]);
    for (int64_t step = 0; step < steps_; ++step) {
      if (step > 0 && !next_batch()) break;
      gather(step);
      forward();
      choose_all(tops + step * count * kMostTop, details + step * count * kDetails);
      book(ints + step * count * 3, floats + step * count * 4);
    }
    for (int64_t r = 0; r < count; ++r) taken.data<int32_t>()[r] = requests_[size_t(r)].taken;
  }

 private:
  static int64_t number(const Tensor& counts, int i, const char* what, int64_t most) {
    const int64_t value = counts.data<int32_t>()[i];
    if (value < 0 || value > most)
      counts.fail("has %lld %s, expected 0 to %lld", (long long)value, what, (long long)most);
    return value;
  }

  void read_model(const colora::Call& call) {
    Reader reader(*table_of_weights_, call.op());
    const Tensor whole = reader.next("model_whole");
    const ModelForm form(whole, reader.next("model_real"));
    StackInputs inputs{slots_, {}, {}, 0};
    for (int64_t i = form.within(ModelWhole::rotary_tables, "rotary_tables", 1, 8); i > 0; --i) {
      inputs.cos.push_back(reader.next("cos"));
      inputs.sin.push_back(reader.next("sin"));
      inputs.cos.back().expect_rank(2).expect_dim(0, inputs.cos[0].dim(0), "positions, as in the first table");
    }
    embedding_factor_ = form.positive(ModelReal::embedding_factor, "embedding_factor", false);
    hidden_factor_ = form.positive(ModelReal::hidden_factor, "hidden_factor", false);
    logit_cap_ = form.positive(ModelReal::logit_cap, "logit_cap", true);
    const Tensor norm = reader.next("norm"), norm_eps = reader.next("norm_eps");
    const Tag tag = Tag::of(reader.next("embed_tokens"));
    const Base table = read_base(reader, tag, -1, "embed_tokens");
    if (table.product() || tag.bias || tag.adapter || table.order) table.last.fail("is no table: expected one matrix alone");
    table_ = table.matrix();
    read_norm(norm, norm_eps, table_.in, NormKind(form.within(ModelWhole::norm, "norm", 0, int(NormKind::count) - 1)), norm_);
    head_.push_back(read_linear(reader, table_.in, slots_));
    if (head_[0].out() < 1 || head_[0].out() > table_.out) {
      Tensor head = head_[0].base.last;
      head.name = "lm_head";
      head.fail("has %lld outputs, expected 1 to %lld, the tokens of embed_tokens", (long long)head_[0].out(),
                (long long)table_.out);
    }
    most_positions_ = inputs.cos[0].dim(0), inputs.hidden = table_.in;
    stack_ = std::make_unique<LayerStack>(reader, inputs);
  }

  // What request r brings of a kind; empty: nothing.
  Tensor extra(const colora::Call& call, int64_t r, Extra kind) const {
    const int64_t i = r * int64_t(Extra::count) + int64_t(kind);
    if (!extras_) return Tensor();
    if (i >= extras_->count())
      in(call, A::extras).fail("names %lld tensors, expected %lld a request", (long long)extras_->count(),
                               (long long)Extra::count);
    return extras_->tensor(i, call.op(), name_of(kind));
  }

  void read_requests(const colora::Call& call, const Options& options, int64_t count) {
    const Tensor previous = in(call, A::previous);
    previous.expect_dtype("int32").expect_rank(1).expect_dim(0, count, "requests, as in whole");
    requests_.resize(size_t(count));
    for (int64_t r = 0; r < count; ++r) {
      Request& q = requests_[size_t(r)];
      q.select = options.read(r, slots_.dim(0));
      q.previous = previous.data<int32_t>()[r], q.budget = options.get(r, Whole::budget);
      q.active = q.budget > 0 && q.select.active(), q.logit_cap = logit_cap_;
      if (!q.active) continue;
      if (q.select.temperature > 0.0f)
        for (int64_t i = 0; i < std::min<int64_t>(steps_, q.budget); ++i)
          checked_uniform(uniforms_, uniforms_.data<float>()[r * capacity_ + i], r);
      q.adjustment = adjustment(call, options, r);
      if (q.select.count < 2) continue;
      q.settle(head_[0], slots_.data<int32_t>());
      if (!q.select.contrast()) continue;
      q.adapt(options, r);
      StrengthOptions& s = q.strength;
      if (!(s.mode & kSkipCopies)) continue;
      const Tensor prompt = extra(call, r, Extra::prompt);
      if (prompt.absent()) continue;
      prompt.expect_dtype("int32").expect_rank(1);
      s.prompt = prompt.data<int32_t>(), s.length = prompt.size();
    }
  }

  // Penalties, bias and mask of request r.
  Adjustment adjustment(const colora::Call& call, const Options& options, int64_t r) const {
    const Tensor entries = extra(call, r, Extra::entries), bias = extra(call, r, Extra::bias),
                 mask = extra(call, r, Extra::mask);
    const bool some = !entries.absent() && entries.size() > 0, masked = !mask.absent() && mask.size() > 0;
    if (some) {
      entries.expect_dtype("int32").expect_rank(2).expect_dim(1, 3, "token, times in the answer, flags");
      bias.expect_dtype("float32").expect_rank(1).expect_dim(0, entries.dim(0), "entries");
    }
    if (masked) mask.expect_dtype("int32").expect_rank(1).expect_dim(0, (head_[0].out() + 31) / 32, "a bit a token");
    return {options, r, entries, some ? entries.data<int32_t>() : nullptr, bias, some ? bias.data<float>() : nullptr,
            some ? entries.dim(0) : 0, mask.absent() ? in(call, A::extras) : mask,
            masked ? mask.data<int32_t>() : nullptr, head_[0].out()};
  }

  // Everything that the cache has to do with is checked before anything is written.
  void read_batch() {
    segments_ = segments_of(batch_, rows_, positions_, most_positions_);
    const int64_t rows = batch_.table_rows;
    std::vector<int64_t> first(size_t(rows), 0), last(size_t(rows), -1), user(size_t(rows), -1);
    last_token_.assign(size_t(rows), -1), position_.assign(size_t(rows), -1);
    for (const Segment& s : segments_) {
      first[size_t(s.row)] = s.start;
      last[size_t(s.row)] = position_[size_t(s.row)] = s.start + s.count - 1;
      last_token_[size_t(s.row)] = s.first + s.count - 1;
    }
    for (int64_t t = 0; t < used_; ++t) {
      const int64_t id = tokens_.data<int32_t>()[t];
      if (id < 0 || id >= table_.out)
        tokens_.fail("is %lld at token %lld, expected 0 to %lld", (long long)id, (long long)t, (long long)table_.out - 1);
      if (rows_.data<int32_t>()[t] < 0)
        rows_.fail("is -1 at token %lld, expected a row for each of the %lld tokens", (long long)t, (long long)used_);
    }
    for (size_t r = 0; r < requests_.size(); ++r) {
      const Request& q = requests_[r];
      if (!q.active) continue;
      for (int k = 0; k < q.select.count; ++k) {
        const int64_t row = q.select.rows[k];
        if (user[size_t(row)] >= 0)
          colora::refuse("step: row %lld is used by request %lld and by request %zu, expected rows of its own for each",
                         (long long)row, (long long)user[size_t(row)], r);
        user[size_t(row)] = int64_t(r);
        if (last_token_[size_t(row)] < 0)
          colora::refuse("step: request %zu takes a token, but its row %lld has none in the batch", r, (long long)row);
        last[size_t(row)] += std::min<int64_t>(steps_, q.budget) - 1;
        if (last[size_t(row)] >= most_positions_)
          positions_.fail("goes up to %lld in row %lld, expected 0 to %lld", (long long)last[size_t(row)], (long long)row,
                          (long long)most_positions_ - 1);
      }
    }
    check_blocks(batch_, tables_, first, last, stack_->blocks());
    for (int64_t i = 0; i < copied_; ++i)
      for (int side = 0; side < 2; ++side) {
        const int64_t block = copies_.data<int32_t>()[2 * i + side];
        if (block < 0 || block >= stack_->blocks())
          copies_.fail("has block %lld in copy %lld, expected 0 to %lld", (long long)block, (long long)i,
                       (long long)stack_->blocks() - 1);
      }
    ids_ = tokens_.data<int32_t>();
    attention_.begin(batch_, segments_);
    for (int64_t t = 0; t < used_; ++t) add_slot(batch_.rows[t]);
  }

  void add_slot(int64_t row) {
    token_slots_.push_back(slots_.data<int32_t>()[row]);
    token_strengths_.push_back(strengths_.data<float>()[row]);
  }

  int32_t* output(const colora::Call& call, int i, const char* name, const char* dtype, int64_t width) const {
    const Tensor t = call.out(i, name);
    t.expect_dtype(dtype).expect_rank(3).expect_dim(0, capacity_, "the columns of uniforms");
    t.expect_dim(1, int64_t(requests_.size()), "requests").expect_dim(2, width, "numbers of a choice");
    return t.data<int32_t>();
  }

  // The batch behind the first one: the new token of every request that goes on, in each of its rows.
  bool next_batch() {
    next_ids_.clear(), next_rows_.clear(), next_positions_.clear(), segments_.clear();
    token_slots_.clear(), token_strengths_.clear();
    for (const Request& q : requests_) {
      if (!q.active) continue;
      for (int k = 0; k < q.select.count; ++k) {
        const int64_t row = q.select.rows[k];
        const int64_t at = int64_t(next_ids_.size()), position = ++position_[size_t(row)];
        last_token_[size_t(row)] = at;
        segments_.push_back({row, at, position, 1});
        next_ids_.push_back(q.token), next_rows_.push_back(int32_t(row)), next_positions_.push_back(int32_t(position));
        add_slot(row);
      }
    }
    batch_.tokens = int64_t(next_ids_.size());
    batch_.rows = next_rows_.data(), batch_.positions = next_positions_.data(), ids_ = next_ids_.data();
    attention_.begin(batch_, segments_);
    return batch_.tokens > 0;
  }

  // The tokens whose logits are read: those of all first rows, of the rows behind them whose whole logits are needed, then
  // of the others.
  void gather(int64_t step) {
    read_.clear();
    const auto add = [&](int64_t row) {
      read_.push_back(last_token_[size_t(row)]);
      return int64_t(read_.size()) - 1;
    };
    for (size_t r = 0; r < requests_.size(); ++r) {
      Request& q = requests_[r];
      if (!q.active) continue;
      q.at[0] = add(q.select.rows[0]);
      q.select.uniform = uniforms_.data<float>()[int64_t(r) * capacity_ + step];
    }
    for (const bool whole : {true, false}) {
      for (Request& q : requests_)
        for (int k = 1; q.active && q.whole == whole && k < q.select.count; ++k) q.at[k] = add(q.select.rows[k]);
      if (whole) full_ = int64_t(read_.size());
    }
  }

  void forward() {
    const int64_t tokens = batch_.tokens, rows = int64_t(read_.size()), hidden = table_.in, vocab = head_[0].out();
    if (tokens > reserved_) {
      for (AlignedFloats* m : {&x_, &sum_}) m->resize(tokens * hidden);
      reserved_ = tokens;
    }
    if (rows > reserved_rows_) {
      for (AlignedFloats* m : {&read_x_, &read_sum_, &h_}) m->resize(rows * hidden);
      logits_.resize(rows * vocab);
      reserved_rows_ = rows;
    }
    embed_rows(table_, ids_, tokens, x_.data());  // (tokens, hidden)
    scale_rows(x_.data(), embedding_factor_, tokens, hidden);
    std::fill(sum_.data(), sum_.data() + tokens * hidden, 0.0f);
    row_slots_.set(tokens, 1, token_slots_.data(), token_strengths_.data());
    stack_->run(row_slots_, attention_, x_.data(), sum_.data(), x_.data(), sum_.data());
    if (rows == 0) return;
    read_slots_.resize(size_t(rows)), read_strengths_.resize(size_t(rows));
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = read_[size_t(i)];
      std::memcpy(read_x_.data() + i * hidden, x_.data() + t * hidden, size_t(hidden) * sizeof(float));
      std::memcpy(read_sum_.data() + i * hidden, sum_.data() + t * hidden, size_t(hidden) * sizeof(float));
      read_slots_[size_t(i)] = token_slots_[size_t(t)], read_strengths_[size_t(i)] = token_strengths_[size_t(t)];
    }
    enter(norm_, read_x_.data(), read_sum_.data(), rows, hidden, read_sum_.data(), h_.data());
    scale_rows(h_.data(), hidden_factor_, rows, hidden);
    head_[0].y = logits_.data();  // (full rows, vocab)
    row_slots_.set(full_, 1, read_slots_.data(), read_strengths_.data());
    run_linears(head_, h_.data(), hidden, row_slots_);
    if (logit_cap_ > 0.0f)
      parallel_ranges(full_, 1, kNormGrain / (vocab + 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) cap_range(logits_.data() + r * vocab, vocab, logit_cap_);
      });
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
  }

  // A request whose logits are not finite ends with results of zeros.
  void book(int32_t* ints, float* floats) {
    for (size_t r = 0; r < requests_.size(); ++r) {
      Request& q = requests_[r];
      if (!q.active) continue;
      const bool failed = !choices_[r].error.empty();
      const Choice choice = failed ? Choice() : choices_[r];
      choice.write(ints + r * 3, floats + r * 4);
      q.token = q.previous = int32_t(choice.token);
      q.adjustment.take(q.token);
      ++q.taken;
      const int32_t* ends = eos_.data<int32_t>();
      q.active = !failed && q.taken < q.budget && std::find(ends, ends + eos_.size(), q.token) == ends + eos_.size();
    }
  }

  const Tensor tokens_, rows_, positions_, slots_, strengths_, tables_, copies_, uniforms_, eos_;
  int64_t capacity_ = 0, used_ = 0, copied_ = 0, steps_ = 0, full_ = 0, reserved_ = 0, reserved_rows_ = 0;
  int64_t most_positions_ = 0;
  float embedding_factor_ = 1.0f, hidden_factor_ = 1.0f, logit_cap_ = 0.0f;
  FlatBatch batch_{};
  std::shared_ptr<const colora::WeightTable> table_of_weights_, extras_;
  Weight table_;
  Norm norm_;
  std::vector<Linear> head_;
  std::unique_ptr<LayerStack> stack_;
  std::vector<Request> requests_;
  std::vector<Choice> choices_;
  std::vector<Segment> segments_;
  std::vector<int64_t> last_token_, position_, read_;  // of each row: its token in the batch and its last position
  std::vector<int32_t> next_ids_, next_rows_, next_positions_, token_slots_, read_slots_;
  std::vector<float> token_strengths_, read_strengths_;
  const int32_t* ids_ = nullptr;
  PagedAttention attention_;
  RowSlots row_slots_;
  AlignedFloats x_, sum_, read_x_, read_sum_, h_, logits_;
};

}  // namespace
}  // namespace COLORA_ISA_NAMESPACE

COLORA_OPERATOR(step) {
  using namespace COLORA_ISA_NAMESPACE;
  Step(call).run(call);
}
