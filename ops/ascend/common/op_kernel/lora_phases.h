// The phases of the two halves of y += scale[slot] * (x . down[slot]^T) . up[slot] on vector cores: lora_shrink has the
// first two, lora_expand and lily_mix the last. (multi_lora has its own, with one meeting: multi_lora_phase.h.)
//
//   shrink   every core takes some hidden columns of some adapters and multiplies them with all tokens of the adapter;
//            partial sums go to the workspace                                                           (SyncAll)
//   reduce   every core takes some tokens: sum of the partial sums, times scale                         (SyncAll)
//   expand   every core takes some output columns of some adapters and adds to y for all tokens of the adapter
//
// So a weight is read once per pass whatever the number of tokens, and one token still occupies all cores. Sums have a
// fixed order (no atomics): equal inputs give equal bits.
// down is (slots, rank, hidden), up is rank-major: (slots, rank, width). T is half, bfloat16_t or float.
// float16 with exact == 0: the coefficients of a token (rank values) are rounded to float16, under a power of two when
// they leave the well-behaved range, because Axpy from half needs no widening of the weights; sums stay in float32.
#ifndef COLORA_LORA_PHASES_H
#define COLORA_LORA_PHASES_H
#include "lora_groups.h"

namespace colora {

using namespace AscendC;

constexpr uint32_t kRowTileBytes = 8192;
constexpr uint32_t kPartialTileBytes = 16384;
constexpr uint32_t kAccBytes = 16384;       // 64 ranks x 64 lanes in float32
constexpr uint32_t kCopyBytes = 4096;
constexpr uint32_t kMaxTileColumns = 2032;  // a row stride of at most 255 blocks in float32

// Which tokens of a stretch have an adapter: all, none, or by bit from token `from` on.
struct Used {
    uint64_t bits = 0;
    uint32_t from = 0;
    bool all = false;
    __aicore__ inline bool Has(uint32_t token) const { return all || (token - from < 64 && (bits >> (token - from) & 1) != 0); }
};
__aicore__ inline Used UsedBy(const Groups& groups, uint32_t from) {
    Used used;
    used.from = from;
    for (uint32_t i = 0; i < groups.tokens; ++i) used.bits |= static_cast<uint64_t>(1) << (groups.order[i] - from);
    return used;
}

template <typename A, typename B>
struct Same {
    static constexpr bool value = false;
};
template <typename A>
struct Same<A, A> {
    static constexpr bool value = true;
};

__aicore__ inline uint32_t RoundUp(uint32_t value, uint32_t step) { return (value + step - 1) / step * step; }
__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <typename T>
class LoraPhases {
  public:
    static constexpr bool kFloat = Same<T, float>::value;
    static constexpr bool kHalf = Same<T, half>::value;
    static constexpr uint32_t kPerBlock = 32 / sizeof(T);
    static constexpr uint32_t kRowTile = kRowTileBytes / sizeof(T);

    template <typename Tiling>
    __aicore__ inline void Init(TPipe* pipe, const Tiling& t, GM_ADDR workspace) {
        pipe_ = pipe;
        tokens_ = t.tokens;
        hidden_ = t.hidden;
        rank_ = t.rank;
        width_ = t.width;
        rowWidth_ = t.rowWidth;
        offset_ = t.offset;
        bank_ = t.slots;
        cores_ = t.cores;
        window_ = t.window;
        unitIn_ = t.unitIn;
        unitOut_ = t.unitOut;
        rounded_ = kHalf && t.exact == 0;
        core_ = static_cast<uint32_t>(GetBlockIdx());
        padded_ = RoundUp(rank_, 8);
        coefficients_ = RoundUp(rank_, 16);
        coefficientRow_ = rounded_ ? coefficients_ / 2 + 8 : padded_;  // in floats
        tableRow_ = coefficientRow_;
        const uint64_t partials = static_cast<uint64_t>(window_) * cores_ * padded_;
        partialGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace), partials);
        // Two tiles that are loaded in turn; beyond rank 192 one larger tile, which keeps rows of 64 columns. float32
        // needs no widened copy and takes its room.
        const uint8_t tiles = rank_ > 192 ? 1 : 2;
        weightTile_ = rank_ > 192 ? 16384 : 12288;
        pipe_->InitBuffer(weightQueue_, tiles, weightTile_ * sizeof(T));
        if (!kFloat) pipe_->InitBuffer(wideWeights_, weightTile_ * sizeof(float));
        pipe_->InitBuffer(inQueue_, 2, kRowTileBytes);
        pipe_->InitBuffer(outQueue_, 2, kRowTileBytes);
        pipe_->InitBuffer(rows_, kRowTile * sizeof(float));
        pipe_->InitBuffer(acc_, kAccBytes);
        pipe_->InitBuffer(small_, 3072);
        pipe_->InitBuffer(partialQueue_, 1, kPartialTileBytes);
        pipe_->InitBuffer(copyQueue_, 1, kCopyBytes);
    }
    __aicore__ inline void SetInput(GM_ADDR x, GM_ADDR down) {
        xGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x), static_cast<uint64_t>(tokens_) * hidden_);
        downGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(down), static_cast<uint64_t>(bank_) * rank_ * hidden_);
    }
    __aicore__ inline void SetScale(GM_ADDR scale) {
        scaleGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale), bank_);
    }
    __aicore__ inline void SetOutput(GM_ADDR up, GM_ADDR y, GM_ADDR out) {
        upGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(up), static_cast<uint64_t>(bank_) * rank_ * width_);
        yGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), static_cast<uint64_t>(tokens_) * rowWidth_);
        outGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), static_cast<uint64_t>(tokens_) * rowWidth_);
        inPlace_ = y == out;
    }

    // Reads the slots of tokens [from, from + n), n <= 64, and groups them.
    __aicore__ inline void Sort(Groups& groups, const GlobalTensor<int32_t>& slotGm, uint32_t from, uint32_t n) {
        LocalTensor<int32_t> slots = inQueue_.template AllocTensor<int32_t>();
        DataCopyPad(slots, slotGm[from], DataCopyExtParams(1, n * sizeof(int32_t), 0, 0, 0),
                    DataCopyPadExtParams<int32_t>(false, 0, 0, 0));
        inQueue_.EnQue(slots);
        slots = inQueue_.template DeQue<int32_t>();
        Order<HardEvent::MTE2_S>();
        groups.Sort(slots, from, n, bank_);
        Order<HardEvent::S_V>();
        inQueue_.FreeTensor(slots);
    }

    __aicore__ inline void Shrink(const Groups& groups) {
        shrink_.Plan(groups, (hidden_ + unitIn_ - 1) / unitIn_, cores_, 8 * rank_, rank_ + 8);
        for (uint32_t g = 0; g < groups.count; ++g) {
            const uint32_t from = shrink_.UnitAt(g, shrink_.Boundary(core_));
            const uint32_t to = shrink_.UnitAt(g, shrink_.Boundary(core_ + 1));
            if (from >= to) continue;
            ShrinkSlice(groups, g, from * unitIn_, Smaller(to * unitIn_, hidden_), shrink_.Piece(g, core_, from));
        }
    }

    // Sums the pieces of each token, times scale, into h (tokens, rank): the shrink operator's own output.
    __aicore__ inline void ReduceInto(const Groups& groups, const GlobalTensor<float>& h) {
        for (uint32_t i = core_; i < groups.tokens; i += cores_) {
            const uint32_t g = groups.GroupOf(i);
            LocalTensor<float> sum = SumPieces(i, shrink_.Pieces(g));
            LocalTensor<float> row = partialQueue_.template AllocTensor<float>();
            Muls(row, sum, scaleGm_.GetValue(groups.slot[g]), static_cast<int32_t>(padded_));
            StoreH(h, row, groups.Token(g, i));
        }
    }
    // Zeroes the rows of h that no adapter writes.
    __aicore__ inline void ZeroInto(const GlobalTensor<float>& h, uint32_t from, uint32_t n, const Used& used) {
        for (uint32_t i = core_; i < n; i += cores_) {
            if (used.Has(from + i)) continue;
            LocalTensor<float> row = partialQueue_.template AllocTensor<float>();
            Duplicate(row, 0.0f, static_cast<int32_t>(padded_));
            StoreH(h, row, from + i);
        }
    }

    // h: the coefficients, rows by token.
    __aicore__ inline void Expand(const Groups& groups, const GlobalTensor<float>& h);

    // When y and out are two tensors, what the expansion does not touch is copied: whole rows of tokens without an
    // adapter, and the columns beside the slice of the others.
    __aicore__ inline void CopyThrough(uint32_t from, uint32_t n, const Used& used);

    uint32_t core_ = 0, cores_ = 1, tokens_ = 0, window_ = 1, rank_ = 0, bank_ = 0;

  protected:
    template <HardEvent event>
    __aicore__ inline void Order() {
        const TEventID id = pipe_->FetchEventID(event);
        SetFlag<event>(id);
        WaitFlag<event>(id);
    }
    __aicore__ inline void Widen(const LocalTensor<float>& dst, const LocalTensor<T>& src, uint32_t n) {
        if constexpr (kFloat) Muls(dst, src, 1.0f, static_cast<int32_t>(n));
        else Cast(dst, src, RoundMode::CAST_NONE, n);
    }
    __aicore__ inline void Narrow(const LocalTensor<T>& dst, const LocalTensor<float>& src, uint32_t n) {
        if constexpr (kFloat) Muls(dst, src, 1.0f, static_cast<int32_t>(n));
        else Cast(dst, src, RoundMode::CAST_RINT, n);
    }
    __aicore__ inline uint32_t Pitch(uint32_t columns) const { return RoundUp(columns, kPerBlock); }
    // Columns of a weight tile: all ranks must fit.
    __aicore__ inline uint32_t TileColumns(uint32_t columns) const {
        return Smaller(columns, Smaller(weightTile_ / rank_ / 16 * 16, kMaxTileColumns));
    }

    // rank_ rows of `columns` elements; rows lie Pitch(columns) apart, filled up with zeros.
    __aicore__ inline LocalTensor<T> LoadWeights(const GlobalTensor<T>& gm, uint64_t at, uint32_t columns, uint32_t stride) {
        LocalTensor<T> tile = weightQueue_.template AllocTensor<T>();
        DataCopyPad(tile, gm[at],
                    DataCopyExtParams(static_cast<uint16_t>(rank_), columns * sizeof(T), (stride - columns) * sizeof(T), 0, 0),
                    DataCopyPadExtParams<T>(true, 0, static_cast<uint8_t>(Pitch(columns) - columns), T()));
        weightQueue_.EnQue(tile);
        return weightQueue_.template DeQue<T>();
    }
    __aicore__ inline LocalTensor<float> WidenWeights(LocalTensor<T>& tile, uint32_t columns) {
        if constexpr (kFloat) {
            return tile;
        } else {
            LocalTensor<float> wide = wideWeights_.template Get<float>();
            PipeBarrier<PIPE_V>();
            Widen(wide, tile, rank_ * Pitch(columns));
            PipeBarrier<PIPE_V>();
            weightQueue_.FreeTensor(tile);
            return wide;
        }
    }
    // n rows (tokens at positions from `position` on), columns [column, column + columns), Pitch(columns) apart; to be freed.
    __aicore__ inline LocalTensor<T> FetchRows(const GlobalTensor<T>& gm, const Groups& groups, uint32_t g, uint32_t position,
                                               uint32_t n, uint32_t stride, uint32_t column, uint32_t columns) {
        const uint32_t pitch = Pitch(columns);
        LocalTensor<T> tile = inQueue_.template AllocTensor<T>();
        for (uint32_t i = 0; i < n;) {
            const uint32_t run = groups.Run(g, position + i, n - i);
            DataCopyPad(tile[i * pitch], gm[static_cast<uint64_t>(groups.Token(g, position + i)) * stride + column],
                        DataCopyExtParams(static_cast<uint16_t>(run), columns * sizeof(T), (stride - columns) * sizeof(T), 0, 0),
                        DataCopyPadExtParams<T>(true, 0, static_cast<uint8_t>(pitch - columns), T()));
            i += run;
        }
        inQueue_.EnQue(tile);
        return inQueue_.template DeQue<T>();
    }
    // The same, widened to float32.
    __aicore__ inline LocalTensor<float> LoadRows(const GlobalTensor<T>& gm, const Groups& groups, uint32_t g, uint32_t position,
                                                  uint32_t n, uint32_t stride, uint32_t column, uint32_t columns) {
        LocalTensor<T> tile = FetchRows(gm, groups, g, position, n, stride, column, columns);
        LocalTensor<float> wide = rows_.template Get<float>();
        PipeBarrier<PIPE_V>();
        Widen(wide, tile, n * Pitch(columns));
        PipeBarrier<PIPE_V>();
        inQueue_.FreeTensor(tile);
        return wide;
    }

    // h[j] (+)= sum over the columns of w[j] * x, j < n. 64 lanes of partial sums a row, then two block sums.
    __aicore__ inline void Products(const LocalTensor<float>& h, const LocalTensor<float>& w, const LocalTensor<float>& x,
                                    uint32_t n, uint32_t pitch, bool add) {
        LocalTensor<float> acc = acc_.template Get<float>();
        LocalTensor<float> eighths = small_.template Get<float>();
        LocalTensor<float> sums = eighths[512];
        for (uint32_t j = 0; j < n; j += 64) {
            const uint32_t ranks = Smaller(64, n - j);
            const BinaryRepeatParams strides{1, 1, 1, 8, static_cast<uint8_t>(pitch / 8), 0};
            PipeBarrier<PIPE_V>();
            if (pitch < 64) Duplicate(acc, 0.0f, static_cast<int32_t>(ranks * 64));
            else Mul(acc, w[j * pitch], x, static_cast<uint64_t>(64), static_cast<uint8_t>(ranks), strides);
            PipeBarrier<PIPE_V>();
            for (uint32_t c = pitch < 64 ? 0 : 64; c < pitch; c += 64) {
                MulAddDst(acc, w[j * pitch + c], x[c], static_cast<uint64_t>(Smaller(64, pitch - c)), static_cast<uint8_t>(ranks), strides);
                PipeBarrier<PIPE_V>();
            }
            BlockReduceSum(eighths, acc, static_cast<int32_t>(ranks), 64, 1, 1, 8);
            PipeBarrier<PIPE_V>();
            const LocalTensor<float> target = add ? sums : h[j];
            const uint32_t whole = ranks / 8, rest = ranks % 8;
            if (whole) BlockReduceSum(target, eighths, static_cast<int32_t>(whole), 64, 1, 1, 8);
            if (rest) BlockReduceSum(target[whole * 8], eighths[whole * 64], 1, static_cast<int32_t>(rest * 8), 1, 1, 8);
            if (add) {
                PipeBarrier<PIPE_V>();
                Add(h[j], h[j], sums, static_cast<int32_t>(ranks));
            }
        }
        PipeBarrier<PIPE_V>();
    }

    __aicore__ inline void ShrinkSlice(const Groups& groups, uint32_t g, uint32_t begin, uint32_t end, uint32_t piece) {
        const uint32_t tileColumns = TileColumns(end - begin);
        const bool once = tileColumns == end - begin;
        const uint64_t bank = static_cast<uint64_t>(groups.slot[g]) * rank_ * hidden_;
        const uint32_t most = kPartialTileBytes / sizeof(float) / padded_;
        LocalTensor<T> tile;
        LocalTensor<float> w;
        for (uint32_t t = 0; t < groups.size[g]; t += most) {
            const uint32_t n = Smaller(most, groups.size[g] - t), position = groups.first[g] + t;
            LocalTensor<float> part = partialQueue_.template AllocTensor<float>();
            Duplicate(part, 0.0f, static_cast<int32_t>(n * padded_));
            for (uint32_t c = begin; c < end; c += tileColumns) {
                const uint32_t columns = Smaller(tileColumns, end - c), pitch = Pitch(columns);
                if (!once || t == 0) {
                    tile = LoadWeights(downGm_, bank + c, columns, hidden_);
                    w = WidenWeights(tile, columns);
                }
                const uint32_t rowsAtOnce = kRowTile / pitch;
                for (uint32_t r = 0; r < n; r += rowsAtOnce) {
                    const uint32_t m = Smaller(rowsAtOnce, n - r);
                    LocalTensor<float> x = LoadRows(xGm_, groups, g, position + r, m, hidden_, c, columns);
                    for (uint32_t i = 0; i < m; ++i) Products(part[(r + i) * padded_], w, x[i * pitch], rank_, pitch, c != begin);
                }
                if constexpr (kFloat) {
                    if (!once) weightQueue_.FreeTensor(tile);
                }
            }
            partialQueue_.EnQue(part);
            part = partialQueue_.template DeQue<float>();
            DataCopyPad(partialGm_[(static_cast<uint64_t>(position) * cores_ + piece) * padded_], part,
                        DataCopyExtParams(static_cast<uint16_t>(n), padded_ * 4, 0, (cores_ - 1) * padded_ * 4, 0));
            partialQueue_.FreeTensor(part);
        }
        if constexpr (kFloat) {
            if (once) weightQueue_.FreeTensor(tile);
        }
    }

    __aicore__ inline LocalTensor<float> SumPieces(uint32_t position, uint32_t pieces) {
        LocalTensor<float> sum = rows_.template Get<float>();
        const uint32_t most = weightTile_ * sizeof(T) / sizeof(float) / padded_;
        const uint64_t at = static_cast<uint64_t>(position) * cores_ * padded_;
        PipeBarrier<PIPE_V>();
        for (uint32_t p = 0; p < pieces; p += most) {
            uint32_t n = Smaller(most, pieces - p);
            LocalTensor<float> part = weightQueue_.template AllocTensor<float>();
            DataCopyPad(part, partialGm_[at + static_cast<uint64_t>(p) * padded_], DataCopyExtParams(1, n * padded_ * 4, 0, 0, 0),
                        DataCopyPadExtParams<float>(false, 0, 0, 0.0f));
            weightQueue_.EnQue(part);
            part = weightQueue_.template DeQue<float>();
            while (n > 1) {
                const uint32_t pairs = n / 2;
                Add(part, part, part[(n - pairs) * padded_], static_cast<int32_t>(pairs * padded_));
                PipeBarrier<PIPE_V>();
                n -= pairs;
            }
            if (p == 0) Muls(sum, part, 1.0f, static_cast<int32_t>(padded_));
            else Add(sum, sum, part, static_cast<int32_t>(padded_));
            PipeBarrier<PIPE_V>();
            weightQueue_.FreeTensor(part);
        }
        return sum;
    }

    // One token's coefficients in the form in which the expansion wants them. sums (padded floats) may be changed.
    __aicore__ inline void Pack(const LocalTensor<float>& row, const LocalTensor<float>& sums) {
        if (!rounded_) {
            Muls(row, sums, 1.0f, static_cast<int32_t>(padded_));
            return;
        }
        LocalTensor<half> halves = row.template ReinterpretCast<half>();
        LocalTensor<float> largest = small_.template Get<float>(), scratch = largest[64], work = largest[384];
        PipeBarrier<PIPE_V>();
        Abs(scratch, sums, static_cast<int32_t>(rank_));
        Duplicate(halves, static_cast<half>(0.0f), static_cast<int32_t>(coefficients_));
        PipeBarrier<PIPE_V>();
        ReduceMax(largest, scratch, work, static_cast<int32_t>(rank_), false);
        Order<HardEvent::V_S>();
        float most = largest.GetValue(0), up = 1.0f, down = 1.0f;
        // In half, values from 2^-4 to 2^12 leave room for terms 2^-10 times smaller; otherwise a power of two moves
        // the largest below 2. Zeros, infinities and NaN stay as they are.
        if (!(most < 3.0e38f)) most = 1.0f;
        if (most > 0.0f && (most < 0.0625f || most >= 4096.0f)) {
            for (uint32_t k = 0; k < 100 && most >= 2.0f; ++k) { most *= 0.5f; down *= 0.5f; up *= 2.0f; }
            for (uint32_t k = 0; k < 100 && most < 1.0f; ++k) { most *= 2.0f; down *= 2.0f; up *= 0.5f; }
            Order<HardEvent::S_V>();
            Muls(sums, sums, down, static_cast<int32_t>(padded_));
            PipeBarrier<PIPE_V>();
        }
        Cast(halves, sums, RoundMode::CAST_RINT, rank_);
        row.SetValue(coefficients_ / 2, up);
        row.SetValue(coefficients_ / 2 + 1, down);
        Order<HardEvent::S_V>();
        PipeBarrier<PIPE_V>();
    }

    __aicore__ inline void StoreH(const GlobalTensor<float>& h, LocalTensor<float>& row, uint32_t token) {
        partialQueue_.EnQue(row);
        row = partialQueue_.template DeQue<float>();
        DataCopyPad(h[static_cast<uint64_t>(token) * rank_], row, DataCopyExtParams(1, rank_ * 4, 0, 0, 0));
        partialQueue_.FreeTensor(row);
    }

    // The coefficients of n tokens, to be read by the scalar unit from acc_ (unused in this phase).
    __aicore__ inline LocalTensor<float> LoadCoefficients(const Groups& groups, uint32_t g, uint32_t position, uint32_t n,
                                                          const GlobalTensor<float>& h);

    __aicore__ inline void ExpandSlice(const Groups& groups, uint32_t g, uint32_t begin, uint32_t end, const GlobalTensor<float>& h);
    // y[i] += table[i] . (the weight tile), i < m; rows of y lie yPitch apart, rows of table tableRow_.
    __aicore__ inline void AddProducts(const LocalTensor<float>& y, const LocalTensor<T>& tile, const LocalTensor<float>& table,
                                       uint32_t m, uint32_t columns, uint32_t yPitch);
    __aicore__ inline void AddExact(const LocalTensor<float>& y, const LocalTensor<float>& table, uint32_t m, uint32_t columns,
                                    uint32_t yPitch);
    __aicore__ inline void AddRounded(const LocalTensor<float>& y, const LocalTensor<half>& w, const LocalTensor<float>& table,
                                      uint32_t m, uint32_t columns, uint32_t yPitch);
    __aicore__ inline void StoreRows(const Groups& groups, uint32_t g, uint32_t position, uint32_t n, uint32_t column, uint32_t columns);
    __aicore__ inline void CopyPart(uint32_t token, uint32_t left, uint32_t right);

    TPipe* pipe_ = nullptr;
    TQue<QuePosition::VECIN, 1> weightQueue_, inQueue_;
    TQue<QuePosition::VECOUT, 1> outQueue_, partialQueue_;
    TQueBind<QuePosition::VECIN, QuePosition::VECOUT, 1> copyQueue_;
    TBuf<QuePosition::VECCALC> wideWeights_, rows_, acc_, small_;
    GlobalTensor<T> xGm_, downGm_, upGm_, yGm_, outGm_;
    GlobalTensor<float> scaleGm_, partialGm_;
    LocalTensor<float> wide_;
    Split shrink_, expand_;
    uint32_t hidden_ = 0, width_ = 0, rowWidth_ = 0, offset_ = 0, unitIn_ = 16, unitOut_ = 16;
    uint32_t weightTile_ = 12288, padded_ = 8, coefficients_ = 16, coefficientRow_ = 8, tableRow_ = 8;
    bool rounded_ = false, inPlace_ = true;
};

}  // namespace colora

#include "lora_expand_phase.h"
#endif
