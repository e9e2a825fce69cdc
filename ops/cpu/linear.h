// The forward pass of one to four linears that share x, with an adapter for each row: what multi_lora_linear and the
// fused decoder layers compute.
//
// Decode is bound by reading W, so every linear of the call is read once, in contiguous shares per thread. The shrink
// runs first (its result is `rank` numbers a row); the expand is folded into the dot products as further columns.
// Batched multi-adapter products: Chen et al., Punica (arXiv 2310.18547); Sheng et al., S-LoRA (arXiv 2311.03285).
#pragma once

#include <atomic>

#include "gemm.h"
#include "operands.h"
#include "pages.h"
#include "products.h"
#include "readers.h"
#include "scratch.h"

namespace COLORA_ISA_NAMESPACE {

constexpr int64_t kFewRows = 32;

// The rows of a call and their adapters: token t belongs to row t / per_row. Made once a step and used by every linear.
class RowSlots {
 public:
  // row_slot: (tokens / per_row,) slots, or null: no adapters. row_strength: factors on the adapters' scales, as many, or
  // null: 1.
  void set(int64_t tokens, int64_t per_row, const int32_t* row_slot, const float* row_strength = nullptr) {
    tokens_ = tokens, per_row_ = per_row, row_slot_ = row_slot, row_strength_ = row_strength, grouped_ = false;
  }
  const float* strengths() const { return row_strength_; }
  int64_t per_row() const { return per_row_; }
  int64_t tokens() const { return tokens_; }
  bool given() const { return row_slot_ != nullptr; }
  int32_t slot(int64_t token) const { return row_slot_[token / per_row_]; }
  // The tokens by slot. Only for linears with adapters, whose slots were checked when they were read.
  const SlotGroups& groups() {
    if (!grouped_) group_by_slot(tokens_, per_row_, row_slot_, groups_);
    grouped_ = true;
    return groups_;
  }

 private:
  int64_t tokens_ = 0, per_row_ = 1;
  const int32_t* row_slot_ = nullptr;
  const float* row_strength_ = nullptr;
  bool grouped_ = false;
  SlotGroups groups_;
};

// One matrix that Forward multiplies with: a linear, or a factor of one.
struct Product {
  Weight weight;
  const float* bias = nullptr;
  const Adapters* adapters = nullptr;  // null: none
  float* y = nullptr;
  Shrink shrink;
  std::vector<float> v;  // (tokens, padded rank)
  std::vector<RowAdapter> row_adapters;
  std::vector<float*> y_rows;
  bool rearranged() const { return weight.nibble_pairs() && regular_groups(weight); }
  int64_t rank() const { return adapters ? adapters->rank : 0; }
};

// A linear of a call: its base, its adapters, where y goes, and what a step needs.
struct Linear {
  Base base;
  Adapters adapters;
  float* y = nullptr;
  std::vector<Product> chain;                // one for each factor of the base
  std::vector<std::vector<float>> between;  // y of the factors before the last
  std::vector<float> gathered;              // x in the order of the base's columns
  int64_t out() const { return base.out(); }
};

// How x must lie for a linear: as it is, or with even and odd columns apart (int4).
struct Activations {
  bool needed = false, copied = false;
  int64_t columns = 0;             // of a row, zero padding included
  AlignedFloats copy;              // rows of `stride`, or packed in tiles
  std::vector<const float*> rows;  // few rows only
};

class Forward {
 public:
  // x: (tokens, in), read by every product.
  Forward(const std::vector<Product*>& products, const float* x, int64_t tokens, int64_t in)
      : products_(products), x_(x), tokens_(tokens), in_(in) {
    many_ = tokens > kFewRows;
    for (const Product* l : products) {
      many_ |= tokens > kRows && l->weight.packed();
      many_ |= !regular_groups(l->weight);
    }
    plain_.columns = in;
    even_odd_.columns = rearranged_columns(in);
    int64_t outs = 0;
    for (const Product* l : products) {
      (l->rearranged() ? even_odd_ : plain_).needed = true;
      outs += l->weight.out;
    }
    threads_ = threads_for(outs * in * std::max<int64_t>(1, tokens / 4), 1 << 14);
    for (Activations* a : {&plain_, &even_odd_}) {
      if (!a->needed) continue;
      const int64_t stride = packed_vectors(a->columns) * kLanes;
      // One or two plain rows are cheaper read where they are.
      a->copied = many_ || a == &even_odd_ || tokens > 2;
      if (a->copied) a->copy.resize(tokens * stride);
      for (int64_t t = 0; !many_ && t < tokens; ++t)
        a->rows.push_back(a->copied ? a->copy.data() + t * stride : x + t * in);
    }
    // Blocks of outputs. Few rows: single tiles (or, unpacked, two in the L1 cache), several to a share. Many rows: a
    // panel of W in the L2 cache.
    width_ = kOuts;
    if (many_) {
      const int64_t fit = (768 << 10) / 4 / even_odd_.columns;
      width_ = tokens <= kFewRows
                   ? 2 * kOuts
                   : std::max<int64_t>(std::min(fit, outs / (4 * threads_)) / kOuts * kOuts, 4 * kOuts);
      panel_size_ = width_ * even_odd_.columns;
      panels_.resize(panel_size_ * threads_);
    }
    int64_t bytes = 0;
    for (const Product* l : products) {
      first_block_.push_back(total_);
      total_ += (l->weight.out + width_ - 1) / width_;
      bytes += l->weight.bytes();
    }
    // Long contiguous shares keep the prefetchers running; several per thread let a thread that was interrupted do less.
    shares_ = tokens > kFewRows ? total_ : std::min(total_, std::clamp<int64_t>(bytes >> 17, threads_, 8 * threads_));
  }

  void run() {
    std::vector<std::pair<const Shrink*, int64_t>> first;  // null: a share of the copies of x
    const bool copies = plain_.copied || even_odd_.copied;
    const int64_t copy_shares = copies ? std::min<int64_t>(threads_, std::max<int64_t>(1, tokens_ * in_ >> 13)) : 0;
    for (int64_t i = 0; i < copy_shares; ++i) first.emplace_back(nullptr, i);
    for (const Product* l : products_)
      for (int64_t i = 0; i < l->shrink.tasks(); ++i) first.emplace_back(&l->shrink, i);
    // One region for both parts: a share of the product waits until the last piece before it is done, which by then runs
    // in another thread or is over, since tasks are claimed in order.
    const int64_t pieces = int64_t(first.size());
    std::atomic<int64_t> done{0};
    parallel_tasks(pieces + shares_, threads_, [&](int64_t i) {
      if (i < pieces) {
        const auto [shrink, part] = first[size_t(i)];
        if (shrink)
          shrink->run(part);
        else
          prepare(part, copy_shares);
        done.fetch_add(1, std::memory_order_release);
        return;
      }
      colora::wait_for(done, pieces);
      float* panel = panels_.data() + worker_index() * panel_size_;
      const int64_t share = i - pieces;
      blocks(total_ * share / shares_, total_ * (share + 1) / shares_, panel);
    });
  }

 private:
  // Share `me` of `all` of the copies of x.
  void prepare(int64_t me, int64_t all) {
    const int64_t tiles = many_ ? row_tiles(tokens_) : tokens_;
    std::vector<float> row(size_t(even_odd_.copied ? even_odd_.columns : 0));
    for (int64_t t = tiles * me / all; t < tiles * (me + 1) / all; ++t) {
      const int64_t begin = row_begin(tokens_, tiles, t), n = row_begin(tokens_, tiles, t + 1) - begin;
      for (int64_t i = 0; i < n; ++i) {
        const float* from = x_ + (begin + i) * in_;
        if (plain_.copied) pack_row(from, in_, int(i), int(n), place(plain_, begin));
        if (even_odd_.copied) {
          rearrange(from, in_, row.data());
          pack_row(row.data(), even_odd_.columns, int(i), int(n), place(even_odd_, begin));
        }
      }
    }
  }

  // Where the tile (or, of few rows, the row) that begins with row t lies.
  static float* place(Activations& a, int64_t t) { return a.copy.data() + t * packed_vectors(a.columns) * kLanes; }

  void blocks(int64_t begin, int64_t end, float* panel) {
    for (size_t i = 0; i < products_.size(); ++i) {
      const Product& l = *products_[i];
      const int64_t last = first_block_[i] + (l.weight.out + width_ - 1) / width_;
      const int64_t b0 = std::max(begin, first_block_[i]), b1 = std::min(end, last);
      if (b0 >= b1) continue;
      outputs(l, (b0 - first_block_[i]) * width_, std::min(l.weight.out, (b1 - first_block_[i]) * width_), panel);
    }
  }

  void outputs(const Product& l, int64_t o0, int64_t o1, float* panel) {
    Activations& x = l.rearranged() ? even_odd_ : plain_;
    const Weight& w = l.weight;
    const int64_t block = column_block(in_);
    Rows rows;
    rows.count = tokens_;
    rows.x = x.rows.data();
    rows.y = l.y_rows.data();
    rows.adapters = l.row_adapters.empty() ? nullptr : l.row_adapters.data();
    rows.rank = l.rank();
    if (many_) {
      const int64_t vectors = packed_vectors(x.columns);
      for (int64_t o = o0; o < o1; o += width_) {
        const int64_t end = std::min(o1, o + width_);
        make_panel(w, o, end, panel, vectors);
        dense_many_rows(panel, x.copy.data(), vectors, block / kLanes, l.bias, rows, o, end);
      }
      return;
    }
    few_rows(w, in_, block, l.bias, rows, o0, o1);
  }

  const std::vector<Product*>& products_;
  const float* x_;
  int64_t tokens_, in_, width_ = 0, total_ = 0, shares_ = 0, panel_size_ = 0;
  int threads_ = 1;
  bool many_ = false;
  Activations plain_, even_odd_;
  AlignedFloats panels_;
  std::vector<int64_t> first_block_;
};

// One linear with `in` columns, from its tag on; everything but y is set and checked.
inline Linear read_linear(Reader& reader, int64_t in, const colora::Tensor& slots) {
  Linear l;
  const Tag tag = Tag::of(reader.next("linear"));
  l.base = read_base(reader, tag, in);
  l.adapters = read_adapters(reader, tag, in, l.out(), slots);
  l.chain.resize(l.base.factors.size());
  l.between.resize(l.base.factors.size() - 1);
  for (size_t i = 0; i < l.chain.size(); ++i) l.chain[i].weight = l.base.factors[i];
  l.chain.back().bias = l.base.bias;
  return l;
}

// y of products that share `from` (tokens, width), as one region of work. The adapters read x (tokens, in), which is what
// the linear got: a product's last factor adds them.
inline void run_group(const std::vector<Product*>& products, const float* from, int64_t width, const float* x, int64_t in,
                      RowSlots& rows) {
  const int64_t tokens = rows.tokens();
  for (Product* one : products) {
    Product& l = *one;
    colora::prefer_huge_pages(l.weight.data, size_t(l.weight.bytes()));
    l.y_rows.resize(size_t(tokens));
    for (int64_t t = 0; t < tokens; ++t) l.y_rows[size_t(t)] = l.y + t * l.weight.out;
    l.row_adapters.clear();
    l.shrink.clear();
    if (!l.adapters || !rows.given()) continue;
    const SlotGroups& groups = rows.groups();
    if (groups.tokens.empty()) continue;
    const int64_t rank = l.adapters->rank, stride = padded_rank(rank);
    l.v.resize(size_t(tokens * stride));
    l.shrink.prepare(*l.adapters, groups, x, in, l.v.data(), stride, colora::thread_count(), rows.strengths(),
                     rows.per_row());
    l.row_adapters.resize(size_t(tokens));
    for (int64_t t : groups.tokens)
      l.row_adapters[size_t(t)] = {l.v.data() + t * stride, l.adapters->up.from(rows.slot(t) * l.weight.out * rank)};
  }
  Forward(products, from, tokens, width).run();
}

// x (tokens, in) in the order of a base's columns.
inline void gather_columns(const float* x, int64_t tokens, int64_t in, const int32_t* order, float* to) {
  parallel_ranges(tokens, 1, 32768 / (in + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t k = 0; k < in; ++k) to[t * in + k] = x[t * in + order[k]];
  });
}

// The linears of a call whose columns have an order of their own: x is gathered once for those that share one, as
// projections that were quantised on the same inputs do; the adapters read x as it is.
inline void run_ordered(std::vector<Linear*> linears, const float* x, int64_t in, RowSlots& rows) {
  while (!linears.empty()) {
    Linear& first = *linears[0];
    std::vector<Product*> same;
    std::vector<Linear*> others;
    for (Linear* l : linears) {
      if (std::equal(first.base.order, first.base.order + in, l->base.order)) same.push_back(&l->chain[0]);
      else others.push_back(l);
    }
    first.gathered.resize(size_t(rows.tokens() * in));
    gather_columns(x, rows.tokens(), in, first.base.order, first.gathered.data());
    run_group(same, first.gathered.data(), in, x, in, rows);
    linears.swap(others);
  }
}

// y of all linears. x: (tokens, in).
inline void run_linears(std::vector<Linear>& linears, const float* x, int64_t in, RowSlots& rows) {
  std::vector<Product*> whole;
  std::vector<Linear*> ordered;
  for (Linear& l : linears) {
    l.chain.back().adapters = l.adapters.present() ? &l.adapters : nullptr;
    l.chain.back().y = l.y;
    if (l.base.order) {
      ordered.push_back(&l);
      continue;
    }
    if (!l.base.product()) {
      whole.push_back(&l.chain[0]);
      continue;
    }
    const float* from = x;
    int64_t width = in;
    for (size_t i = 0; i < l.chain.size(); ++i) {
      Product& factor = l.chain[i];
      if (i + 1 < l.chain.size()) {
        l.between[i].resize(size_t(rows.tokens() * factor.weight.out));
        factor.y = l.between[i].data();
      }
      run_group({&factor}, from, width, x, in, rows);
      from = factor.y, width = factor.weight.out;  // (tokens, rank)
    }
  }
  if (!whole.empty()) run_group(whole, x, in, x, in, rows);
  run_ordered(ordered, x, in, rows);
}

}  // namespace COLORA_ISA_NAMESPACE
