// multi_lora on vector cores, with one meeting of the cores for up to 64 tokens.
//
//   plan     every core sorts the tokens by adapter, alike; many tokens of one adapter are cut into chunks
//   shrink   a core takes some hidden columns of some chunks: products with 64 lanes of partial sums for each coefficient,
//            which two block reductions add up; the sums go to the workspace, piece by piece             (SyncAll)
//   expand   a core takes some output columns of some chunks: it adds up the pieces of the chunk's coefficients itself,
//            spreads each over a block and multiplies with whole rows of up
//
// No instruction reads a coefficient through the scalar unit. More chunks: weights are read more often, but fewer pieces
// travel; `balance` weighs the two. Sums are float32 in a fixed order: equal inputs give equal bits. The first tile of up
// travels while the cores meet.
#ifndef COLORA_MULTI_LORA_PHASE_H
#define COLORA_MULTI_LORA_PHASE_H
#include "lora_phases.h"

namespace colora {

using namespace AscendC;

constexpr uint32_t kWeights = 8192;      // elements of a weight tile
constexpr uint32_t kAccRows = 128;       // rows of 64 lanes of partial sums
constexpr uint32_t kSums = 2048;         // coefficients of a chunk, float32
constexpr uint32_t kPieces = 4096;       // values of pieces that are added up at a time
constexpr uint32_t kSpread = 256;        // coefficients of a slice that are spread over blocks
constexpr uint32_t kOthersBytes = 4096;  // of a row that is copied
constexpr uint32_t kMostSlices = 8;
constexpr uint32_t kMostSums = 2;        // partial sums of one coefficient that stretches of columns take in turn
constexpr uint32_t kChains = 4;          // sums that ranks take in turn, so that few of them wait for each other
constexpr uint32_t kSmallTile = 256;     // columns of up that are widened while the cores meet, times the scale

// Which cores work on which chunk of tokens. Few chunks: each core on one of them. Many: cores may begin in one chunk and
// end in another, so that all are equally busy.
struct Shares {
    uint32_t first[kGroups], count[kGroups];
    uint32_t units = 1;
    bool many = false;
    Split split;

    // A unit costs about five tokens' work for its weights, and one for each token.
    __aicore__ inline void Plan(const Groups& chunks, uint32_t unitCount, uint32_t cores) {
        units = unitCount;
        many = chunks.count * 3 > cores;
        if (many) split.Plan(chunks, unitCount, cores, 5, 1);
        uint32_t left = cores, weights = 5 * chunks.count + chunks.tokens;
        for (uint32_t g = 0; g < chunks.count && !many; ++g) {
            const uint32_t weight = 5 + chunks.size[g], others = chunks.count - 1 - g;
            uint32_t n = (left * weight + weights / 2) / weights;
            if (n < 1) n = 1;
            if (n + others > left) n = left - others;
            first[g] = cores - left;
            count[g] = n;
            left -= n;
            weights -= weight;
        }
    }
    __aicore__ inline uint32_t Pieces(uint32_t g) const { return many ? split.Pieces(g) : count[g] < units ? count[g] : units; }
    __aicore__ inline uint32_t Piece(uint32_t g, uint32_t core, uint32_t from) const {
        return many ? split.Piece(g, core, from) : core - first[g];
    }
    // A core's units of a chunk, from == to for none.
    __aicore__ inline uint32_t From(uint32_t g, uint32_t core) const {
        if (many) return split.UnitAt(g, split.Boundary(core));
        return core < first[g] ? units : Bound(g, core - first[g]);
    }
    __aicore__ inline uint32_t To(uint32_t g, uint32_t core) const {
        if (many) return split.UnitAt(g, split.Boundary(core + 1));
        return core < first[g] || core >= first[g] + count[g] ? units : Bound(g, core - first[g] + 1);
    }
    __aicore__ inline uint32_t Bound(uint32_t g, uint32_t piece) const {
        const uint32_t pieces = Pieces(g);
        return piece >= pieces ? units : units * piece / pieces;
    }
};

template <typename T>
class MultiLora {
  public:
    static constexpr bool kFloat = Same<T, float>::value;
    static constexpr bool kMixed = Same<T, half>::value;  // products of half are added to float32 as they are
    static constexpr uint32_t kPerBlock = 32 / sizeof(T);
    static constexpr uint32_t kRows = 8192 / sizeof(T);   // elements of x or y at a time

    template <typename Tiling>
    __aicore__ inline void Init(TPipe* pipe, const Tiling& t, GM_ADDR workspace) {
        pipe_ = pipe;
        tokens_ = t.tokens;
        hidden_ = t.hidden;
        rank_ = t.rank;
        slices_ = t.slices;
        width_ = t.width;
        bank_ = t.slots;
        cores_ = t.cores;
        window_ = t.window;
        unitIn_ = t.unitIn;
        unitOut_ = t.unitOut;
        balance_ = t.balance;
        core_ = static_cast<uint32_t>(GetBlockIdx());
        rank8_ = RoundUp(rank_, 8);
        padded_ = slices_ * rank8_;
        most_ = Smaller(t.most, kSums / padded_);
        half_ = static_cast<uint64_t>(window_) * cores_ * padded_;
        piecesGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace), 2 * half_);
        pipe_->InitBuffer(weightQueue_, 2, kWeights * sizeof(T));
        if constexpr (!kFloat) pipe_->InitBuffer(wideWeights_, kWeights * sizeof(float));
        pipe_->InitBuffer(rowQueue_, 2, kRows * sizeof(T));
        pipe_->InitBuffer(pieceQueue_, 1, kPieces * sizeof(float));
        pipe_->InitBuffer(outQueue_, 1, 8192);
        pipe_->InitBuffer(otherQueue_, 1, kOthersBytes);
        pipe_->InitBuffer(wideRows_, kRows * sizeof(float));
        pipe_->InitBuffer(acc_, kAccRows * 256);
        pipe_->InitBuffer(eighths_, kAccRows * 32);
        pipe_->InitBuffer(sums_, kSums * sizeof(float));
        pipe_->InitBuffer(spread_, kSpread * 32);
    }
    __aicore__ inline void SetTensors(GM_ADDR x, GM_ADDR down, GM_ADDR up, GM_ADDR scale, GM_ADDR slots, GM_ADDR y, GM_ADDR ends,
                                      GM_ADDR out) {
        xGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x), static_cast<uint64_t>(tokens_) * hidden_);
        downGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(down), static_cast<uint64_t>(bank_) * slices_ * rank_ * hidden_);
        upGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(up), static_cast<uint64_t>(bank_) * rank_ * width_);
        scaleGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale), static_cast<uint64_t>(bank_) * slices_);
        slotGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots), tokens_);
        yGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), static_cast<uint64_t>(tokens_) * width_);
        endGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(ends), slices_);
        outGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), static_cast<uint64_t>(tokens_) * width_);
        inPlace_ = y == out;
        ends_[0] = width_;
        for (uint32_t i = 0; slices_ > 1 && i < slices_; ++i) ends_[i] = static_cast<uint32_t>(endGm_.GetValue(i));
    }

    // Which tokens of [from, from + n), n <= 64, go together, and which core takes what of them.
    __aicore__ inline void Plan(uint32_t from, uint32_t n) {
        from_ = from;
        count_ = n;
        if (tokens_ == 1) {  // the columns do not depend on the adapter: its row can travel while the slot is read
            chunks_.Clear();
            chunks_.listed = true;
            chunks_.order[0] = 0;
            chunks_.AddSegment(0, 0, 1);
            Divide();
            const uint32_t begin = From(shrink_, 0) * unitIn_, end = Smaller(To(shrink_, 0) * unitIn_, hidden_);
            if (begin < end) LoadRows(xGm_, 0, begin, Smaller(Together(1), end - begin), hidden_, true);
            early_ = begin < end;
        }
        Sort();
        Divide();
    }
    __aicore__ inline bool Nothing() const { return chunks_.tokens == 0; }
    // Rows without an adapter, where out is not y.
    __aicore__ inline void CopyOthers() {
        if (inPlace_) return;
        const uint32_t most = kOthersBytes / sizeof(T), parts = (width_ + most - 1) / most;
        for (uint32_t k = core_; k < count_ * parts; k += cores_) {
            if (used_ >> (k / parts) & 1) continue;
            const uint32_t left = k % parts * most, bytes = Smaller(most, width_ - left) * sizeof(T);
            const uint64_t at = static_cast<uint64_t>(from_ + k / parts) * width_ + left;
            LocalTensor<T> part = otherQueue_.template AllocTensor<T>();
            DataCopyPad(part, yGm_[at], DataCopyExtParams(1, bytes, 0, 0, 0), DataCopyPadExtParams<T>(false, 0, 0, T()));
            otherQueue_.EnQue(part);
            part = otherQueue_.template DeQue<T>();
            DataCopyPad(outGm_[at], part, DataCopyExtParams(1, bytes, 0, 0, 0));
            otherQueue_.FreeTensor(part);
        }
    }

    __aicore__ inline void Shrink(uint32_t turn) {
        for (uint32_t g = 0; g < chunks_.count; ++g) {
            const uint32_t from = From(shrink_, g), to = To(shrink_, g);
            if (from < to) ShrinkChunk(g, from * unitIn_, Smaller(to * unitIn_, hidden_), PieceAt(g, turn, shrink_.Piece(g, core_, from)));
        }
    }
    // The first tile of up, ready to be multiplied with.
    __aicore__ inline void Prefetch() {
        for (uint32_t g = 0; g < chunks_.count; ++g) {
            const uint32_t from = From(expand_, g) * unitOut_, to = Smaller(To(expand_, g) * unitOut_, width_);
            if (from >= to) continue;
            const uint32_t end = BlockEnd(g, from, to), columns = Smaller(end - from, Tile(rank_));
            LoadUp(g, from, columns);
            loaded_ = true;
            small_ = to - from <= kSmallTile;
            scale_ = ScaleOf(g, SliceOf(from));
            aheadColumns_ = columns;
            if (small_) TakeUp(columns);
            ahead_ = small_;
            return;
        }
    }
    __aicore__ inline void Expand(uint32_t turn) {
        for (uint32_t g = 0; g < chunks_.count; ++g) {
            const uint32_t from = From(expand_, g) * unitOut_, to = Smaller(To(expand_, g) * unitOut_, width_);
            if (from >= to) continue;
            small_ = to - from <= kSmallTile;
            if (loaded_ && !ahead_) {  // while the pieces travel
                TakeUp(aheadColumns_);
                ahead_ = true;
            }
            AddPieces(g, turn);
            uint32_t spread = kMostSlices;
            for (uint32_t c = from, end = 0; c < to; c = end) {
                end = BlockEnd(g, c, to);
                // In place, others may be writing the rows between.
                LoadRows(yGm_, g, c, end - c, width_, !inPlace_);
                if (spread != SliceOf(c)) {
                    spread = SliceOf(c);
                    if (!loaded_) scale_ = ScaleOf(g, spread);
                    ScaleSums(g, spread);
                    Spread(spread, 0, Smaller(chunks_.size[g], kSpread / rank8_));
                }
                ExpandBlock(g, c, end);
            }
        }
    }
    __aicore__ inline void End() {
        if (!early_) return;
        LocalTensor<T> row = rowQueue_.template DeQue<T>();
        rowQueue_.FreeTensor(row);
    }

    uint32_t tokens_ = 0, window_ = 1;

  private:
    template <HardEvent event>
    __aicore__ inline void Order() {
        const TEventID id = pipe_->FetchEventID(event);
        SetFlag<event>(id);
        WaitFlag<event>(id);
    }
    __aicore__ inline uint32_t Pitch(uint32_t columns) const { return RoundUp(columns, kPerBlock); }
    // Columns of a tile of so many rows of weights; of n rows of x or y.
    __aicore__ inline uint32_t Tile(uint32_t rows) const { return Smaller(kWeights / rows / 16 * 16, kMaxTileColumns); }
    __aicore__ inline uint32_t Together(uint32_t n) const { return Smaller(kRows / n / 16 * 16, kMaxTileColumns); }
    __aicore__ inline uint32_t SliceOf(uint32_t column) const {
        uint32_t i = 0;
        while (i + 1 < slices_ && column >= ends_[i]) ++i;
        return i;
    }
    __aicore__ inline float ScaleOf(uint32_t g, uint32_t slice) const {
        return scaleGm_.GetValue(static_cast<uint64_t>(chunks_.slot[g]) * slices_ + slice);
    }
    // How far of [from, to) one slice and the rows at a time reach.
    __aicore__ inline uint32_t BlockEnd(uint32_t g, uint32_t from, uint32_t to) const {
        return Smaller(Smaller(to, ends_[SliceOf(from)]), from + Together(chunks_.size[g]));
    }
    __aicore__ inline uint32_t From(const Shares& shares, uint32_t g) const { return shares.From(g, core_); }
    __aicore__ inline uint32_t To(const Shares& shares, uint32_t g) const { return shares.To(g, core_); }
    __aicore__ inline uint64_t PieceAt(uint32_t g, uint32_t turn, uint32_t piece) const {
        return turn * half_ + (static_cast<uint64_t>(chunks_.first[g]) * cores_ + static_cast<uint64_t>(piece) * chunks_.size[g]) * padded_;
    }
    __aicore__ inline void Divide() {
        if (chunks_.tokens == 0) return;
        // No rank here: an adapter that is filled up with zeros gives the bits that it has alone.
        shrink_.Plan(chunks_, (hidden_ + unitIn_ - 1) / unitIn_, cores_);
        expand_.Plan(chunks_, (width_ + unitOut_ - 1) / unitOut_, cores_);
    }
    // Chunks of n tokens of one adapter that `cores` cores share. With k chunks a core reads k / cores of the weights and
    // n cores / k^2 rows of sums: one chunk more is worth it while k (k + 1/2) (k + 1) is below n cores^2 over the ratio of
    // the two sizes.
    __aicore__ inline uint32_t Parts(uint32_t n, uint32_t cores) const {
        uint32_t parts = (n + most_ - 1) / most_;
        while (parts < n && static_cast<uint64_t>(balance_) * parts * (parts + 1) * (2 * parts + 1) <= static_cast<uint64_t>(2) * n * cores * cores) ++parts;
        return parts;
    }
    __aicore__ inline void Sort() {
        int32_t slot[kGroups];
        uint32_t size[kGroups], at[kGroups], adapter[kGroups];
        uint32_t adapters = 0;
        used_ = 0;
        for (uint32_t i = 0; i < count_; ++i) {
            const int32_t s = slotGm_.GetValue(from_ + i);
            if (s < 0 || s >= static_cast<int32_t>(bank_)) continue;
            uint32_t a = 0;
            while (a < adapters && slot[a] != s) ++a;
            if (a == adapters) {
                slot[adapters] = s;
                size[adapters++] = 0;
            }
            ++size[a];
            adapter[i] = a;
            used_ |= static_cast<uint64_t>(1) << i;
        }
        chunks_.Clear();
        chunks_.listed = true;
        for (uint32_t a = 0; a < adapters; ++a) {
            at[a] = chunks_.tokens;
            const uint32_t parts = Parts(size[a], cores_ > adapters ? cores_ / adapters : 1);
            for (uint32_t p = 0, left = size[a]; p < parts; ++p) {
                const uint32_t n = (left + parts - p - 1) / (parts - p);
                chunks_.AddSegment(slot[a], 0, n);
                left -= n;
            }
        }
        for (uint32_t i = 0; i < count_; ++i) {
            if (used_ >> i & 1) chunks_.order[at[adapter[i]]++] = from_ + i;
        }
    }

    // How many tokens of a chunk, from its i-th on, are equally far from each other; how far.
    __aicore__ inline uint32_t Run(uint32_t g, uint32_t i, uint32_t& step) const {
        const uint32_t* order = chunks_.order + chunks_.first[g];
        const uint32_t n = chunks_.size[g];
        step = 1;
        if (i + 1 == n) return 1;
        step = order[i + 1] - order[i];
        uint32_t run = 2;
        while (i + run < n && order[i + run] - order[i + run - 1] == step) ++run;
        return run;
    }
    // The rows of a chunk's tokens, columns [column, column + columns), Pitch(columns) apart. between: where the tokens lie
    // irregularly and near each other, the rows between them come along.
    __aicore__ inline void LoadRows(const GlobalTensor<T>& gm, uint32_t g, uint32_t column, uint32_t columns, uint32_t stride, bool between) {
        const uint32_t pitch = Pitch(columns), first = chunks_.first[g], n = chunks_.size[g];
        const uint32_t low = chunks_.order[first], all = chunks_.order[first + n - 1] - low + 1;
        uint32_t step = 1;
        spaced_ = between && all * pitch <= kRows && Run(g, 0, step) < n;
        LocalTensor<T> tile = rowQueue_.template AllocTensor<T>();
        for (uint32_t i = 0, run = 0; i < n; i += run) {
            run = spaced_ ? n : Run(g, i, step);
            const uint32_t rows = spaced_ ? all : run, apart = spaced_ ? 1 : step;
            DataCopyPad(tile[i * pitch], gm[static_cast<uint64_t>(chunks_.order[first + i]) * stride + column],
                        DataCopyExtParams(static_cast<uint16_t>(rows), columns * sizeof(T), (apart * stride - columns) * sizeof(T), 0, 0),
                        DataCopyPadExtParams<T>(true, 0, static_cast<uint8_t>(pitch - columns), T()));
        }
        rowQueue_.EnQue(tile);
    }
    // Which of the rows just loaded is that of a chunk's i-th token.
    __aicore__ inline uint32_t RowOf(uint32_t g, uint32_t i) const {
        const uint32_t first = chunks_.first[g];
        return spaced_ ? chunks_.order[first + i] - chunks_.order[first] : i;
    }
    __aicore__ inline void LoadWeights(const GlobalTensor<T>& gm, uint64_t at, uint32_t rows, uint32_t columns, uint32_t stride) {
        LocalTensor<T> tile = weightQueue_.template AllocTensor<T>();
        DataCopyPad(tile, gm[at],
                    DataCopyExtParams(static_cast<uint16_t>(rows), columns * sizeof(T), (stride - columns) * sizeof(T), 0, 0),
                    DataCopyPadExtParams<T>(true, 0, static_cast<uint8_t>(Pitch(columns) - columns), T()));
        weightQueue_.EnQue(tile);
    }
    __aicore__ inline void LoadUp(uint32_t g, uint32_t column, uint32_t columns) {
        LoadWeights(upGm_, static_cast<uint64_t>(chunks_.slot[g]) * rank_ * width_ + column, rank_, columns, width_);
    }

#include "multi_lora_tiles.h"

    TPipe* pipe_ = nullptr;
    TQue<QuePosition::VECIN, 2> weightQueue_, rowQueue_;
    TQue<QuePosition::VECIN, 1> pieceQueue_;
    TQue<QuePosition::VECOUT, 1> outQueue_;
    TQueBind<QuePosition::VECIN, QuePosition::VECOUT, 1> otherQueue_;
    TBuf<QuePosition::VECCALC> wideWeights_, wideRows_, acc_, eighths_, sums_, spread_;
    GlobalTensor<T> xGm_, downGm_, upGm_, yGm_, outGm_;
    GlobalTensor<float> scaleGm_, piecesGm_;
    GlobalTensor<int32_t> slotGm_, endGm_;
    Groups chunks_;
    Shares shrink_, expand_;
    uint64_t used_ = 0, half_ = 0;
    uint32_t hidden_ = 0, rank_ = 0, slices_ = 1, width_ = 0, bank_ = 0, cores_ = 1, core_ = 0, unitIn_ = 16, unitOut_ = 16;
    uint32_t balance_ = 1, most_ = 1, rank8_ = 8, padded_ = 8, from_ = 0, count_ = 0;
    uint32_t aheadColumns_ = 0;
    uint32_t ends_[kMostSlices];
    LocalTensor<T> upTile_;
    LocalTensor<float> up_;
    float scale_ = 1.0f;
    // ahead_: a tile of up is ready; loaded_: it travels; small_: the scale is in up and not in the coefficients.
    bool inPlace_ = true, early_ = false, ahead_ = false, loaded_ = false, small_ = false, spaced_ = false;
};

}  // namespace colora

#endif
