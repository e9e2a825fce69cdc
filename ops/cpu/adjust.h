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
  friend class Adjustments;
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

// Those of all requests: entries (n, 3) int32 (token, times in the answer, flags) and bias (n,) float32, of which request
// r has those from offsets[r] to offsets[r + 1]; mask (requests, words) int32, bit i % 32 of word i / 32: token i may come.
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

  // That of request r; refuses what is out of range.
  Adjustment read(int64_t r) const {
    Adjustment found;
    found.presence_ = options_.number(r, Real::presence_penalty, -Options::kMost, Options::kMost, "a finite number");
    found.frequency_ = options_.number(r, Real::frequency_penalty, -Options::kMost, Options::kMost, "a finite number");
    found.repetition_ = options_.number(r, Real::repetition_penalty, Options::kLeast, Options::kMost, "a finite number > 0");
    found.min_tokens_ = options_.whole(r, Whole::min_tokens, 0, std::numeric_limits<int32_t>::max());
    if (options_.whole(r, Whole::masked, 0, 1)) {
      if (mask_.absent()) mask_.fail("is absent, but request %lld has one", (long long)r);
      found.mask_ = mask_.data<int32_t>() + r * mask_.dim(1);
    }
    if (offsets_.absent()) return found;
    const int32_t begin = offsets_.data<int32_t>()[r], end = offsets_.data<int32_t>()[r + 1];
    if (begin < 0 || end < begin || end > entries_.dim(0))
      offsets_.fail("goes from %d to %d in request %lld, expected an ascending part of 0 to %lld", begin, end, (long long)r,
                    (long long)entries_.dim(0));
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* e = entries_.data<int32_t>() + i * 3;
      if (e[0] < 0 || e[0] >= vocab_ || (i > begin && e[0] <= e[-3]))
        entries_.fail("has token %d at place %lld of request %lld, expected ascending ones of 0 to %lld", e[0],
                      (long long)(i - begin), (long long)r, (long long)vocab_ - 1);
      if (e[1] < 0 || e[2] < 0 || e[2] > (kInPrompt | kEnds))
        entries_.fail("is (%d, %d, %d) at place %lld of request %lld, expected a number >= 0 and flags of 0 to 3", e[0], e[1],
                      e[2], (long long)(i - begin), (long long)r);
      const float bias = bias_.data<float>()[i];
      if (!(bias >= -Options::kMost && bias <= Options::kMost))
        bias_.fail("is %g for token %d of request %lld, expected a finite number", double(bias), e[0], (long long)r);
      found.entries_.push_back({e[0], e[1], e[2], bias});
    }
    return found;
  }

 private:
  const Options& options_;
  colora::Tensor entries_, bias_, offsets_, mask_;
  int64_t vocab_;
};

}  // namespace COLORA_ISA_NAMESPACE
