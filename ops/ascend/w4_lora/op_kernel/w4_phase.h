// The product with a packed int4 weight, and the LoRA phases around it, in one kernel.
//
// The adapters' coefficients come first (LoraPhases: shrink, reduce). Then every core takes some weight rows (outputs):
//
//   for each column tile     the activations of all tokens of the pass, widened, once for all of the core's rows
//     for each 16 rows       packed weights and scales in; nibbles to signed; int4 -> half -> float32; times the scale;
//                            products with every token, added to float32 sums in the unified buffer
//   then the adapters' part is added to the same sums, and y is rounded and written once.
//
// So a weight is read once per pass of at most 32 tokens and is never written anywhere in another form. Activations are
// read by every core. Packed weights: low nibble = even column, stored as value + 8; a scale holds for `group` columns.
#ifndef COLORA_W4_PHASE_H
#define COLORA_W4_PHASE_H
#include "lora_phases.h"

namespace colora {

template <typename T>
class W4Phases : public LoraPhases<T> {
  public:
    template <typename Tiling>
    __aicore__ inline void Init(TPipe* pipe, const Tiling& t, GM_ADDR workspace) {
        Base::Init(pipe, t, workspace, kTile, kInput);
        groups_ = t.groups;
        group_ = t.group;
        columnTile_ = t.columns;
        pipe->InitBuffer(scales_, kScales * 32);
        pipe->InitBuffer(bits_, 256);
        Duplicate(bits_.template Get<int16_t>(), static_cast<int16_t>(-0x7778), 128);  // 0x8888: the high bit of each nibble
    }
    __aicore__ inline void SetWeight(GM_ADDR weight, GM_ADDR weightScale) {
        weightGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int8_t*>(weight), static_cast<uint64_t>(width_) * (hidden_ / 2));
        weightScaleGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(weightScale), static_cast<uint64_t>(width_) * groups_);
    }

    // The n tokens from `from` on. groups: those with an adapter, sorted; the others are appended here.
    __aicore__ inline void Multiply(Groups& groups, uint32_t from, uint32_t n) {
        const Used used = UsedBy(groups, from);
        uint32_t at = groups.tokens;
        for (uint32_t i = 0; i < n; ++i) {
            if (!used.Has(from + i)) groups.order[at++] = from + i;
        }
        const uint32_t units = (width_ + 7) / 8, end = Smaller(units * (core_ + 1) / cores_ * 8, width_);
        const uint32_t most = Smaller(kSums / n, Base::kRowTile) / 16 * 16;
        for (uint32_t o = units * core_ / cores_ * 8; o < end; o += most) Slab(groups, n, o, Smaller(most, end - o));
    }

  private:
    using Base = LoraPhases<T>;
    using Base::core_, Base::cores_, Base::hidden_, Base::width_, Base::rank_, Base::padded_, Base::coefficientRow_, Base::rounded_;
    using Base::weightQueue_, Base::inQueue_, Base::outQueue_, Base::partialQueue_;
    using Base::wideWeights_, Base::rows_, Base::acc_, Base::wide_, Base::xGm_, Base::upGm_;

    static constexpr uint32_t kTile = Base::kFloat ? 5120 : 8192;  // weights that are widened at a time
    static constexpr uint32_t kRows = 16;
    static constexpr uint32_t kStep = kTile / kRows / 64 * 64;     // columns of them
    static constexpr uint32_t kInput = 8192;                       // floats of activations
    static constexpr uint32_t kSums = kPartialTileBytes / 4;
    static constexpr uint32_t kScales = 512;

    __aicore__ inline void Slab(const Groups& groups, uint32_t n, uint32_t begin, uint32_t rows) {
        const uint32_t pitch = Base::Pitch(rows);
        LocalTensor<float> sums = partialQueue_.template AllocTensor<float>();
        PipeBarrier<PIPE_V>();
        Duplicate(sums, 0.0f, static_cast<int32_t>(n * pitch));
        for (uint32_t c = 0; c < hidden_; c += columnTile_) {
            const uint32_t columns = Smaller(columnTile_, hidden_ - c);
            const LocalTensor<float> x = LoadInput(groups, n, c, columns);
            for (uint32_t r = 0; r < rows; r += kRows) {
                const uint32_t m = Smaller(kRows, rows - r);
                LocalTensor<int8_t> packed = LoadPacked(begin + r, m, c, columns);
                LoadScales(begin + r, m, c, columns);
                for (uint32_t s = 0; s < columns; s += kStep) {
                    const uint32_t stepPitch = RoundUp(Smaller(kStep, columns - s), 16);
                    const LocalTensor<float> w = Dequantise(packed, m, c, columns, s, stepPitch);
                    for (uint32_t i = 0; i < n; ++i) Base::Products(sums[i * pitch + r], w, x[i * inputPitch_ + s], m, stepPitch, true);
                }
                weightQueue_.FreeTensor(packed);
            }
        }
        for (uint32_t g = 0; g < groups.count; ++g) AddAdapter(groups, g, begin, rows, sums, pitch);
        const uint32_t atOnce = Base::kRowTile / pitch;
        for (uint32_t r = 0; r < n; r += atOnce) {
            const uint32_t m = Smaller(atOnce, n - r);
            LocalTensor<T> out = outQueue_.template AllocTensor<T>();
            Base::Narrow(out, sums[r * pitch], m * pitch);
            outQueue_.EnQue(out);
            Base::StoreRows(groups, 0, r, m, begin, rows);
        }
        partialQueue_.FreeTensor(sums);
    }

    // The activations of all positions, columns [c, c + columns), float32, inputPitch_ apart, zeros up to there.
    __aicore__ inline LocalTensor<float> LoadInput(const Groups& groups, uint32_t n, uint32_t c, uint32_t columns) {
        const uint32_t pitch = Base::Pitch(columns), atOnce = Base::kRowTile / pitch;
        inputPitch_ = RoundUp(columns, 16);
        LocalTensor<float> x = rows_.template Get<float>();
        PipeBarrier<PIPE_V>();
        if (pitch != inputPitch_) {
            Duplicate(x, 0.0f, static_cast<int32_t>(n * inputPitch_));
            PipeBarrier<PIPE_V>();
        }
        for (uint32_t r = 0; r < n; r += atOnce) {
            const uint32_t m = Smaller(atOnce, n - r);
            LocalTensor<T> tile = Base::FetchRows(xGm_, groups, 0, r, m, hidden_, c, columns);
            if (pitch == inputPitch_) Base::Widen(x[r * pitch], tile, m * pitch);
            for (uint32_t i = 0; i < m && pitch != inputPitch_; ++i) Base::Widen(x[(r + i) * inputPitch_], tile[i * pitch], pitch);
            inQueue_.FreeTensor(tile);
        }
        PipeBarrier<PIPE_V>();
        return x;
    }

    // m rows of packed weights as two's complement nibbles; rows lie PackedPitch(columns) bytes apart; to be freed. Bytes are
    // int8_t here: the type from which the documentation gets tensors of int4b_t.
    __aicore__ inline LocalTensor<int8_t> LoadPacked(uint32_t row, uint32_t m, uint32_t c, uint32_t columns) {
        LocalTensor<int8_t> packed = weightQueue_.template AllocTensor<int8_t>();
        DataCopyPad(packed, weightGm_[static_cast<uint64_t>(row) * (hidden_ / 2) + c / 2],
                    DataCopyExtParams(static_cast<uint16_t>(m), columns / 2, (hidden_ - columns) / 2, 0, 0),
                    DataCopyPadExtParams<int8_t>(false, 0, 0, 0));
        weightQueue_.EnQue(packed);
        packed = weightQueue_.template DeQue<int8_t>();
        const uint32_t all = m * PackedPitch(columns) / 2;
        const LocalTensor<int16_t> pairs = packed.template ReinterpretCast<int16_t>();
        Flip(pairs, 128, all / 128);
        if (all % 128) Flip(pairs[all / 128 * 128], all % 128, 1);
        return packed;
    }
    // Stored values are larger by 8: the high bit of every nibble is turned over, (v | 8) - (v & 8), which never borrows.
    __aicore__ inline void Flip(const LocalTensor<int16_t>& pairs, uint64_t lanes, uint32_t repeats) {
        if (repeats == 0) return;
        const LocalTensor<int16_t> high = acc_.template Get<int16_t>(), bits = bits_.template Get<int16_t>();
        const BinaryRepeatParams withBits{1, 1, 1, 8, 8, 0}, both{1, 1, 1, 8, 8, 8};
        const uint8_t times = static_cast<uint8_t>(repeats);
        PipeBarrier<PIPE_V>();
        And(high, pairs, bits, lanes, times, withBits);
        PipeBarrier<PIPE_V>();
        Or(pairs, pairs, bits, lanes, times, withBits);
        PipeBarrier<PIPE_V>();
        Sub(pairs, pairs, high, lanes, times, both);
        PipeBarrier<PIPE_V>();
    }
    __aicore__ inline uint32_t PackedPitch(uint32_t columns) const { return RoundUp(columns / 2, 32); }

    // The scales of the tile, each filling a block of 32 bytes: row after row, scaleStride_ blocks a row.
    __aicore__ inline void LoadScales(uint32_t row, uint32_t m, uint32_t c, uint32_t columns) {
        firstGroup_ = c / group_;
        const uint32_t count = (c + columns - 1) / group_ - firstGroup_ + 1;
        LocalTensor<float> raw = inQueue_.template AllocTensor<float>();
        const DataCopyPadExtParams<float> unfilled(false, 0, 0, 0.0f);
        if (groups_ == 1) DataCopyPad(raw, weightScaleGm_[row], DataCopyExtParams(1, m * 4, 0, 0, 0), unfilled);
        else DataCopyPad(raw, weightScaleGm_[static_cast<uint64_t>(row) * groups_ + firstGroup_],
                         DataCopyExtParams(static_cast<uint16_t>(m), count * 4, (groups_ - count) * 4, 0, 0), unfilled);
        inQueue_.EnQue(raw);
        raw = inQueue_.template DeQue<float>();
        scaleStride_ = groups_ == 1 ? 1 : RoundUp(count, 8);
        PipeBarrier<PIPE_V>();
        Brcb(scales_.template Get<float>(), raw, static_cast<uint8_t>(RoundUp(m * scaleStride_, 8) / 8), BrcbRepeatParams{1, 8});
        PipeBarrier<PIPE_V>();
        inQueue_.FreeTensor(raw);
    }

    // Columns [s, s + pitch) of the tile (which starts at column c of the weight) as float32, times their scales.
    __aicore__ inline LocalTensor<float> Dequantise(const LocalTensor<int8_t>& packed, uint32_t m, uint32_t c, uint32_t columns,
                                                    uint32_t s, uint32_t pitch) {
        const LocalTensor<half> narrow = acc_.template Get<half>();
        LocalTensor<float> wide = wideWeights_.template Get<float>();
        const uint32_t rowBytes = PackedPitch(columns);
        PipeBarrier<PIPE_V>();
        if (pitch == rowBytes * 2) {
            Cast(narrow, packed.template ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, m * pitch);
        } else {
            for (uint32_t j = 0; j < m; ++j) {
                Cast(narrow[j * pitch], packed[j * rowBytes + s / 2].template ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, pitch);
            }
        }
        PipeBarrier<PIPE_V>();
        Cast(wide, narrow, RoundMode::CAST_NONE, m * pitch);
        PipeBarrier<PIPE_V>();
        const LocalTensor<float> scales = scales_.template Get<float>();
        const uint8_t rowBlocks = static_cast<uint8_t>(pitch / 8);
        const BinaryRepeatParams oneScaleARow{1, 1, 0, rowBlocks, rowBlocks, static_cast<uint8_t>(scaleStride_)};
        for (uint32_t k = 0; k < pitch;) {
            const uint32_t g = Smaller((c + s + k) / group_, groups_ - 1);
            const uint32_t edge = g + 1 == groups_ ? pitch : Smaller((g + 1) * group_ - c - s, pitch);
            const uint32_t lanes = Smaller(64, edge - k);
            Mul(wide[k], wide[k], scales[(g - firstGroup_) * 8], static_cast<uint64_t>(lanes), static_cast<uint8_t>(m), oneScaleARow);
            k += lanes;
        }
        PipeBarrier<PIPE_V>();
        return wide;
    }

    // sums += (coefficients of the group's tokens) . up, for `rows` outputs from `begin` on.
    __aicore__ inline void AddAdapter(const Groups& groups, uint32_t g, uint32_t begin, uint32_t rows, const LocalTensor<float>& sums,
                                      uint32_t pitch) {
        const uint32_t tileColumns = Base::TileColumns(rows), most = kAccBytes / sizeof(float) / coefficientRow_;
        const uint64_t bank = static_cast<uint64_t>(groups.slot[g]) * rank_ * width_ + begin;
        GlobalTensor<float> none;
        for (uint32_t t = 0; t < groups.size[g]; t += most) {
            const uint32_t n = Smaller(most, groups.size[g] - t), position = groups.first[g] + t;
            const LocalTensor<float> table = Base::LoadCoefficients(groups, g, position, n, false, none);
            for (uint32_t c = 0; c < rows; c += tileColumns) {
                const uint32_t columns = Smaller(tileColumns, rows - c);
                LocalTensor<T> tile = Base::LoadWeights(upGm_, bank + c, columns, width_);
                if (!rounded_) wide_ = Base::WidenWeights(tile, columns);
                Base::AddProducts(sums[position * pitch + c], tile, table, n, columns, pitch);
                if (Base::kFloat || rounded_) weightQueue_.FreeTensor(tile);
            }
        }
        Base::template Order<HardEvent::S_V>();  // what comes next may overwrite the coefficients that the scalar unit read
    }

    TBuf<QuePosition::VECCALC> scales_, bits_;
    GlobalTensor<int8_t> weightGm_;
    GlobalTensor<float> weightScaleGm_;
    uint32_t groups_ = 1, group_ = 1, columnTile_ = 64, inputPitch_ = 16, firstGroup_ = 0, scaleStride_ = 1;
};

}  // namespace colora
#endif
