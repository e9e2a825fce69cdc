// What a request does to its rows' logits before anything is chosen from them: penalties, bias, tokens that may not come
// yet, and a mask of allowed tokens. Every row of the request is treated alike.
//
// With n the number of times that the answer has the token, x its logit:
//
//   repetition   x / repetition if x >= 0, else x * repetition, for tokens of prompt and answer (arXiv 1909.05858, as
//                transformers has it)
//   frequency    x - frequency * n        presence   x - presence where n > 0        (OpenAI's definitions)
//   bias         x + bias
//   an end before min_tokens, or a token that the mask lacks: -infinity
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "options.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int32_t kInPrompt = 1, kEnds = 2;  // flags of an entry

class Adjustment {
 public:
  Adjustment() = default;

  // That of request r, with n entries (token, times in the answer, flags) int32, tokens ascending, a bias each, and a mask
  // (words,) int32, whose bit i % 32 of word i / 32 says whether token i may come. Refuses what is out of range.
  Adjustment(const Options& options, int64_t r, const colora::Tensor& entries, const int32_t* entry,
             const colora::Tensor& biases, const float* bias, int64_t n, const colora::Tensor& masks, const int32_t* mask,
             int64_t vocab)
      : presence_(options.number(r, Real::presence_penalty, -Options::kMost, Options::kMost, "a finite number")),
        frequency_(options.number(r, Real::frequency_penalty, -Options::kMost, Options::kMost, "a finite number")),
        repetition_(options.number(r, Real::repetition_penalty, Options::kLeast, Options::kMost, "a finite number > 0")),
        min_tokens_(options.whole(r, Whole::min_tokens, 0, std::numeric_limits<int32_t>::max())) {
    if (options.whole(r, Whole::masked, 0, 1)) {
      if (!mask) masks.fail("is absent, but request %lld has one", (long long)r);
      mask_ = mask;
    }
    for (int64_t i = 0; i < n; ++i, entry += 3) {
      if (entry[0] < 0 || entry[0] >= vocab || (i > 0 && entry[0] <= entry[-3]))
        entries.fail("has token %d at place %lld of request %lld, expected ascending ones of 0 to %lld", entry[0],
                     (long long)i, (long long)r, (long long)vocab - 1);
      if (entry[1] < 0 || entry[2] < 0 || entry[2] > (kInPrompt | kEnds))
        entries.fail("is (%d, %d, %d) at place %lld of request %lld, expected a number >= 0 and flags of 0 to 3", entry[0],
                     entry[1], entry[2], (long long)i, (long long)r);
      if (!(bias[i] >= -Options::kMost && bias[i] <= Options::kMost))
        biases.fail("is %g for token %d of request %lld, expected a finite number", double(bias[i]), entry[0], (long long)r);
      entries_.push_back({entry[0], entry[1], entry[2], bias[i]});
    }
  }

  bool any() const { return mask_ || !entries_.empty() || counts(); }

  // In place; row: (vocab,).
  void apply(float* row, int64_t vocab) const {
    for (const Entry& e : entries_) {
      float x = row[e.token];
      if (repetition_ != 1.0f && (e.count > 0 || (e.flags & kInPrompt))) x = x < 0.0f ? x * repetition_ : x / repetition_;
      if (e.count > 0) x = x - frequency_ * float(e.count) - presence_;
      x = x + e.bias;
      row[e.token] = min_tokens_ > 0 && (e.flags & kEnds) ? -std::numeric_limits<float>::infinity() : x;
    }
    if (!mask_) return;
    for (int64_t begin = 0; begin < vocab; begin += 32) {
      const uint32_t word = uint32_t(mask_[begin / 32]);
      if (word == ~uint32_t(0)) continue;
      for (int64_t i = begin; i < std::min(vocab, begin + 32); ++i)
        if (!(word >> (i - begin) & 1)) row[i] = -std::numeric_limits<float>::infinity();
    }
  }

  // Counts a token of the answer.
  void take(int32_t token) {
    if (min_tokens_ > 0) --min_tokens_;
    if (!counts()) return;
    const auto at = std::lower_bound(entries_.begin(), entries_.end(), token,
                                     [](const Entry& e, int32_t wanted) { return e.token < wanted; });
    if (at != entries_.end() && at->token == token) ++at->count;
    else entries_.insert(at, {token, 1, 0, 0.0f});
  }

 private:
  struct Entry {
    int32_t token, count, flags;
    float bias;
  };
  bool counts() const { return presence_ != 0.0f || frequency_ != 0.0f || repetition_ != 1.0f; }

  float presence_ = 0, frequency_ = 0, repetition_ = 1;
  int32_t min_tokens_ = 0;
  const int32_t* mask_ = nullptr;  // (words,)
  std::vector<Entry> entries_;     // ascending tokens
};

// Those of all requests in four tensors: entries (n, 3) and bias (n,), of which request r has those from offsets[r] to
// offsets[r + 1], and mask (requests, words).
class Adjustments {
 public:
  // Refuses wrong types and shapes; entries, bias and offsets may be absent together, and so may the mask.
  Adjustments(const Options& options, const colora::Tensor& entries, const colora::Tensor& bias,
              const colora::Tensor& offsets, const colora::Tensor& mask, int64_t vocab)
      : options_(options), entries_(entries), bias_(bias), offsets_(offsets), mask_(mask), vocab_(vocab) {
    if (!offsets.absent()) {
      entries.expect_dtype("int32").expect_rank(2).expect_dim(1, 3, "token, times in the answer, flags");
      bias.expect_dtype("float32").expect_rank(1).expect_dim(0, entries.dim(0), "entries");
      offsets.expect_dtype("int32").expect_rank(1).expect_dim(0, options.requests() + 1, "requests, and the end");
    }
    if (mask.absent()) return;
    mask.expect_dtype("int32").expect_rank(2).expect_dim(0, options.requests(), "requests, as in whole");
    mask.expect_dim(1, (vocab + 31) / 32, "a bit a token");
  }

  Adjustment read(int64_t r) const {
    const int32_t* mask = mask_.absent() ? nullptr : mask_.data<int32_t>() + r * mask_.dim(1);
    if (offsets_.absent()) return {options_, r, entries_, nullptr, bias_, nullptr, 0, mask_, mask, vocab_};
    const int32_t begin = offsets_.data<int32_t>()[r], end = offsets_.data<int32_t>()[r + 1];
    if (begin < 0 || end < begin || end > entries_.dim(0))
      offsets_.fail("goes from %d to %d in request %lld, expected an ascending part of 0 to %lld", begin, end, (long long)r,
                    (long long)entries_.dim(0));
    return {options_, r, entries_, entries_.data<int32_t>() + begin * 3, bias_, bias_.data<float>() + begin, end - begin,
            mask_, mask, vocab_};
  }

 private:
  const Options& options_;
  colora::Tensor entries_, bias_, offsets_, mask_;
  int64_t vocab_;
};

}  // namespace COLORA_ISA_NAMESPACE
