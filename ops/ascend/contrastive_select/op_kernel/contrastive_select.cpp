// ints[q] = (token, favourite, valid) and floats[q] = (score, largest, l_0[token], l_1[token], ...) of each request, with
// l_k = logits[mixRows[q, k]]: token = argmax over {i : l_0[i] >= logAlpha[q] + max l_0, l_0[i] > -inf} of the score
// sum_k weights[q, k] l_k[i], ties to the smallest i; favourite and largest: argmax and max of l_0; valid: how many tokens
// there are to choose from (of one row: the vocabulary). logits (rows, vocab) half, bfloat16 or float; mixRows (requests,
// voices) int32, -1 for none, the first leads; weights (requests, voices), logAlpha (requests) float32, -inf for no cut. A
// row of weight 0 takes no part. Without a first row all results of a request are 0; where no token has a score that is a
// number, its token is 0 and its score -inf.
//
// Pieces of the requests' rows are spread over the cores: largest logit of the leading row in each piece (SyncAll), then the
// best sum of each piece against the cut of the whole row (SyncAll), then the best piece. A core with a single piece that fits
// keeps the leading row's logits in the unified buffer between the two passes, so that every logit is read once.
#include "kernel_operator.h"

#ifndef COLORA_CONTRASTIVE_SELECT  // the emulator includes this file once for each dtype
#define COLORA_CONTRASTIVE_SELECT
namespace colora {

using namespace AscendC;

constexpr uint32_t kTileBytes = 8192;
constexpr uint32_t kKeptBytes = 114688;  // kResidentBytes of the tiling
constexpr uint32_t kVoices = 8;

template <typename A, typename B>
struct SameType {
    static constexpr bool value = false;
};
template <typename A>
struct SameType<A, A> {
    static constexpr bool value = true;
};

template <typename T>
class ContrastiveSelect {
  public:
    static constexpr bool kFloat = SameType<T, float>::value;
    static constexpr uint32_t kTile = kTileBytes / sizeof(T);

    template <typename Tiling>
    __aicore__ inline void Init(TPipe* pipe, const Tiling& t, GM_ADDR logits, GM_ADDR mixRows, GM_ADDR weights, GM_ADDR logAlpha,
                                GM_ADDR ints, GM_ADDR floats, GM_ADDR workspace) {
        pipe_ = pipe;
        rows_ = t.rows;
        vocab_ = t.vocab;
        requests_ = t.requests;
        voices_ = t.voices;
        cores_ = t.cores;
        parts_ = t.parts;
        width_ = t.width;
        resident_ = t.resident != 0;
        core_ = static_cast<uint32_t>(GetBlockIdx());
        logitGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(logits), static_cast<uint64_t>(rows_) * vocab_);
        mixGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(mixRows), static_cast<uint64_t>(requests_) * voices_);
        weightGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(weights), static_cast<uint64_t>(requests_) * voices_);
        alphaGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(logAlpha), requests_);
        intGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(ints), static_cast<uint64_t>(requests_) * 3);
        floatGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(floats), static_cast<uint64_t>(requests_) * (2 + voices_));
        const uint64_t items = static_cast<uint64_t>(requests_) * parts_;
        largestGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace), items * 8);
        bestGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace) + items * 8, items * 8);
        pipe_->InitBuffer(inQueue_, 2, kTileBytes);
        pipe_->InitBuffer(pieceQueue_, 1, 64 * 32);
        pipe_->InitBuffer(smallQueue_, 1, 64);
        pipe_->InitBuffer(keptQueue_, 1, kKeptBytes);
        if constexpr (!kFloat) pipe_->InitBuffer(wideBuf_, kTile * sizeof(float));
        pipe_->InitBuffer(otherBuf_, kTile * sizeof(float));
        pipe_->InitBuffer(scoreBuf_, kTile * sizeof(float));
        pipe_->InitBuffer(bitsBuf_, kTile / 8);
        pipe_->InitBuffer(workBuf_, 3072);
    }

    __aicore__ inline void Process() {
        const uint32_t items = requests_ * parts_;
        for (uint32_t i = core_; i < items; i += cores_) Largest(i);
        SyncAll();
        for (uint32_t i = core_; i < items; i += cores_) Best(i);
        SyncAll();
        for (uint32_t q = core_; q < requests_; q += cores_) Choose(q);
    }

  private:
    static constexpr float kLowest = -__builtin_inff();
    static constexpr float kLowestFinite = -3.4028234e38f;

    template <HardEvent event>
    __aicore__ inline void Order() {
        const TEventID id = pipe_->FetchEventID(event);
        SetFlag<event>(id);
        WaitFlag<event>(id);
    }
    __aicore__ inline uint32_t Lesser(uint32_t a, uint32_t b) const { return a < b ? a : b; }
    // A row of the logits, or -1. A voice of weight 0 has none, but for the first.
    __aicore__ inline int32_t RowOf(uint32_t q, uint32_t voice) const {
        const int32_t row = mixGm_.GetValue(static_cast<uint64_t>(q) * voices_ + voice);
        return row < static_cast<int32_t>(rows_) ? row : -1;
    }
    // n logits of a row, filled up with zeros to the next block.
    __aicore__ inline void Fetch(const LocalTensor<T>& raw, uint32_t row, uint32_t column, uint32_t n) {
        const uint32_t block = 32 / sizeof(T), whole = (n + block - 1) / block * block;
        DataCopyPad(raw, logitGm_[static_cast<uint64_t>(row) * vocab_ + column], DataCopyExtParams(1, n * sizeof(T), 0, 0, 0),
                    DataCopyPadExtParams<T>(true, 0, static_cast<uint8_t>(whole - n), T()));
    }
    __aicore__ inline LocalTensor<T> Load(uint32_t row, uint32_t column, uint32_t n) {
        LocalTensor<T> raw = inQueue_.template AllocTensor<T>();
        Fetch(raw, row, column, n);
        inQueue_.EnQue(raw);
        return inQueue_.template DeQue<T>();
    }
    // The values in float32; blocks up to the next multiple of 64 are zeros, as comparisons work on whole repeats.
    __aicore__ inline LocalTensor<float> Widen(const LocalTensor<T>& raw, TBuf<QuePosition::VECCALC>& buffer, uint32_t n) {
        const uint32_t block = 32 / sizeof(T), whole = (n + block - 1) / block * block, full = (n + 63) / 64 * 64;
        PipeBarrier<PIPE_V>();
        if constexpr (kFloat) {
            if (whole < full) Duplicate(raw[whole], 0.0f, static_cast<int32_t>(full - whole));
            PipeBarrier<PIPE_V>();
            return raw;
        } else {
            LocalTensor<float> wide = buffer.template Get<float>();
            Cast(wide, raw, RoundMode::CAST_NONE, whole);
            if (whole < full) Duplicate(wide[whole], 0.0f, static_cast<int32_t>(full - whole));
            PipeBarrier<PIPE_V>();
            return wide;
        }
    }
    // Writes {value, index, count} as one block of 32 bytes.
    __aicore__ inline void Store(const GlobalTensor<float>& gm, uint32_t item, float value, int32_t index, int32_t count) {
        LocalTensor<float> out = smallQueue_.template AllocTensor<float>();
        Duplicate(out, value, 8);
        Order<HardEvent::V_S>();
        out.template ReinterpretCast<int32_t>().SetValue(1, index);
        out.template ReinterpretCast<int32_t>().SetValue(2, count);
        Order<HardEvent::S_MTE3>();
        smallQueue_.EnQue(out);
        out = smallQueue_.template DeQue<float>();
        DataCopyPad(gm[static_cast<uint64_t>(item) * 8], out, DataCopyExtParams(1, 32, 0, 0, 0));
        smallQueue_.FreeTensor(out);
    }
    // The blocks {value, index, count} of a request's pieces, for the scalar unit.
    __aicore__ inline LocalTensor<float> Pieces(const GlobalTensor<float>& gm, uint32_t q) {
        LocalTensor<float> pieces = pieceQueue_.template AllocTensor<float>();
        DataCopyPad(pieces, gm[static_cast<uint64_t>(q) * parts_ * 8], DataCopyExtParams(1, parts_ * 32, 0, 0, 0),
                    DataCopyPadExtParams<float>(false, 0, 0, 0.0f));
        pieceQueue_.EnQue(pieces);
        pieces = pieceQueue_.template DeQue<float>();
        Order<HardEvent::MTE2_S>();
        return pieces;
    }
    __aicore__ inline void FreePieces(LocalTensor<float>& pieces) {
        Order<HardEvent::S_V>();
        pieceQueue_.FreeTensor(pieces);
    }

    __aicore__ inline void Largest(uint32_t item) {
        const uint32_t q = item / parts_, begin = item % parts_ * width_, n = Lesser(width_, vocab_ - begin);
        const int32_t row = RowOf(q, 0);
        float largest = kLowest;
        int32_t favourite = 0;
        if (row >= 0 && resident_) {
            kept_ = keptQueue_.template AllocTensor<T>();
            Fetch(kept_, static_cast<uint32_t>(row), begin, n);
            keptQueue_.EnQue(kept_);
            kept_ = keptQueue_.template DeQue<T>();
            holds_ = true;
        }
        LocalTensor<float> out = workBuf_.template Get<float>();
        for (uint32_t c = 0; row >= 0 && c < n; c += kTile) {
            const uint32_t m = Lesser(kTile, n - c);
            LocalTensor<T> raw = resident_ ? kept_[c] : Load(static_cast<uint32_t>(row), begin + c, m);
            const LocalTensor<float> wide = Widen(raw, wideBuf_, m);
            ReduceMax(out, wide, out[64], static_cast<int32_t>(m), true);
            if (!resident_) inQueue_.FreeTensor(raw);
            Order<HardEvent::V_S>();
            const float value = out.GetValue(0);
            const int32_t index = out.template ReinterpretCast<int32_t>().GetValue(1);
            Order<HardEvent::S_V>();
            if (value > largest) {
                largest = value;
                favourite = static_cast<int32_t>(begin + c) + index;
            }
        }
        Store(largestGm_, item, largest, favourite, 0);
    }

    __aicore__ inline void Best(uint32_t item) {
        const uint32_t q = item / parts_, begin = item % parts_ * width_, n = Lesser(width_, vocab_ - begin);
        LocalTensor<float> pieces = Pieces(largestGm_, q);
        float largest = kLowest;
        for (uint32_t p = 0; p < parts_; ++p) {
            const float value = pieces.GetValue(p * 8);
            if (value > largest) largest = value;
        }
        FreePieces(pieces);
        int32_t rows[kVoices];
        float weights[kVoices];
        uint32_t voices = 1;
        rows[0] = RowOf(q, 0);
        weights[0] = weightGm_.GetValue(static_cast<uint64_t>(q) * voices_);
        for (uint32_t k = 1; k < voices_ && rows[0] >= 0; ++k) {
            rows[voices] = RowOf(q, k);
            weights[voices] = weightGm_.GetValue(static_cast<uint64_t>(q) * voices_ + k);
            if (rows[voices] >= 0 && weights[voices] != 0.0f) ++voices;
        }
        float cut = largest + alphaGm_.GetValue(q);
        if (!(cut > kLowestFinite)) cut = kLowestFinite;  // a token of -inf is never taken
        float best = kLowest;
        int32_t token = static_cast<int32_t>(begin), valid = 0;
        LocalTensor<float> score = scoreBuf_.template Get<float>(), work = workBuf_.template Get<float>();
        LocalTensor<uint8_t> bits = bitsBuf_.template Get<uint8_t>();
        for (uint32_t c = 0; c < n && rows[0] >= 0 && largest > kLowest; c += kTile) {
            const uint32_t m = Lesser(kTile, n - c), full = (m + 63) / 64 * 64;
            LocalTensor<T> lead = resident_ ? kept_[c] : Load(static_cast<uint32_t>(rows[0]), begin + c, m);
            const LocalTensor<float> wide = Widen(lead, wideBuf_, m);
            if (weights[0] == 0.0f) Duplicate(score, 0.0f, static_cast<int32_t>(full));  // 0 * -inf would be NaN
            else Muls(score, wide, weights[0], static_cast<int32_t>(full));
            CompareScalar(bits, wide, cut, CMPMODE::GE, full);
            for (uint32_t k = 1; k < voices; ++k) {
                LocalTensor<T> raw = Load(static_cast<uint32_t>(rows[k]), begin + c, m);
                const LocalTensor<float> other = Widen(raw, otherBuf_, m);
                Axpy(score, other, weights[k], static_cast<int32_t>(full));
                inQueue_.FreeTensor(raw);
            }
            PipeBarrier<PIPE_V>();
            Keep(score, bits, kLowest, full);
            CompareScalar(bits, score, kLowestFinite, CMPMODE::GE, full);  // infinities of both signs: no number
            PipeBarrier<PIPE_V>();
            Keep(score, bits, kLowest, full);
            Count(bits, m);
            ReduceMax(work, score, work[64], static_cast<int32_t>(m), true);
            if (!resident_) inQueue_.FreeTensor(lead);
            Order<HardEvent::V_S>();
            const float value = work.GetValue(0);
            const int32_t index = work.template ReinterpretCast<int32_t>().GetValue(1);
            valid += static_cast<int32_t>(work.GetValue(8));
            Order<HardEvent::S_V>();
            PipeBarrier<PIPE_V>();
            if (value > best) {
                best = value;
                token = static_cast<int32_t>(begin + c) + index;
            }
        }
        if (holds_) keptQueue_.FreeTensor(kept_);
        holds_ = false;
        Store(bestGm_, item, best, token, valid);
    }
    __aicore__ inline void Keep(const LocalTensor<float>& values, const LocalTensor<uint8_t>& bits, float other, uint32_t full) {
        Select(values, bits, values, other, SELMODE::VSEL_TENSOR_SCALAR_MODE, full);
        PipeBarrier<PIPE_V>();
    }
    // How many of the first m bits are set, as a float in workBuf_[8].
    __aicore__ inline void Count(const LocalTensor<uint8_t>& bits, uint32_t m) {
        LocalTensor<float> ones = otherBuf_.template Get<float>(), work = workBuf_.template Get<float>();
        LocalTensor<float> eighths = work[128], sums = work[640];
        const uint32_t whole = m / 64, rest = m % 64;
        Duplicate(ones, 1.0f, static_cast<int32_t>((m + 63) / 64 * 64));
        Duplicate(eighths, 0.0f, 512);
        PipeBarrier<PIPE_V>();
        Keep(ones, bits, 0.0f, (m + 63) / 64 * 64);
        if (whole) BlockReduceSum(eighths, ones, static_cast<int32_t>(whole), 64, 1, 1, 8);
        if (rest) BlockReduceSum(eighths[whole * 8], ones[whole * 64], 1, static_cast<int32_t>(rest), 1, 1, 8);
        PipeBarrier<PIPE_V>();
        BlockReduceSum(sums, eighths, 8, 64, 1, 1, 8);
        PipeBarrier<PIPE_V>();
        WholeReduceSum(work[8], sums, 64, 1, 1, 1, 8);
    }

    __aicore__ inline void Choose(uint32_t q) {
        const bool active = RowOf(q, 0) >= 0;
        LocalTensor<int32_t> ints = smallQueue_.template AllocTensor<int32_t>();
        Duplicate(ints, 0, 8);
        Order<HardEvent::V_S>();
        Order<HardEvent::MTE3_S>();
        int32_t favourite = 0, token = 0, valid = 0;
        const float largest = Better(largestGm_, q, favourite, valid), best = Better(bestGm_, q, token, valid);
        if (voices_ == 1 || RowOf(q, 1) < 0) valid = static_cast<int32_t>(vocab_);
        if (active) {
            ints.SetValue(0, token);
            ints.SetValue(1, favourite);
            ints.SetValue(2, valid);
        }
        Order<HardEvent::S_MTE3>();
        smallQueue_.EnQue(ints);
        ints = smallQueue_.template DeQue<int32_t>();
        DataCopyPad(intGm_[static_cast<uint64_t>(q) * 3], ints, DataCopyExtParams(1, 3 * sizeof(int32_t), 0, 0, 0));
        smallQueue_.FreeTensor(ints);
        Floats(q, active, static_cast<uint32_t>(token), best, largest);
    }
    // The best of a request's pieces; adds up their counts.
    __aicore__ inline float Better(const GlobalTensor<float>& gm, uint32_t q, int32_t& index, int32_t& count) {
        LocalTensor<float> pieces = Pieces(gm, q);
        LocalTensor<int32_t> whole = pieces.template ReinterpretCast<int32_t>();
        float best = kLowest;
        for (uint32_t p = 0; p < parts_; ++p) {
            const float value = pieces.GetValue(p * 8);
            count += whole.GetValue(p * 8 + 2);
            if (value > best) {
                best = value;
                index = whole.GetValue(p * 8 + 1);
            }
        }
        FreePieces(pieces);
        return best;
    }
    // The score, the largest logit of the first row, and one logit of each row, a block of 32 bytes for each.
    __aicore__ inline void Floats(uint32_t q, bool active, uint32_t token, float score, float largest) {
        constexpr uint32_t block = 32 / sizeof(T);
        LocalTensor<T> raw = inQueue_.template AllocTensor<T>();
        Duplicate(raw, T(), static_cast<int32_t>(voices_ * block));
        Order<HardEvent::V_MTE2>();
        for (uint32_t k = 0; k < voices_; ++k) {
            const int32_t row = RowOf(q, k);
            if (active && row >= 0) Fetch(raw[k * block], static_cast<uint32_t>(row), token, 1);
        }
        inQueue_.EnQue(raw);
        raw = inQueue_.template DeQue<T>();
        const LocalTensor<float> wide = Widen(raw, otherBuf_, voices_ * block);
        LocalTensor<float> out = smallQueue_.template AllocTensor<float>();
        Order<HardEvent::MTE2_S>();
        Order<HardEvent::V_S>();
        Order<HardEvent::MTE3_S>();
        out.SetValue(0, active ? score : 0.0f);
        out.SetValue(1, active ? largest : 0.0f);
        for (uint32_t k = 0; k < voices_; ++k) out.SetValue(2 + k, wide.GetValue(k * block));
        Order<HardEvent::S_MTE3>();
        Order<HardEvent::S_V>();
        inQueue_.FreeTensor(raw);
        smallQueue_.EnQue(out);
        out = smallQueue_.template DeQue<float>();
        DataCopyPad(floatGm_[static_cast<uint64_t>(q) * (2 + voices_)], out, DataCopyExtParams(1, (2 + voices_) * sizeof(float), 0, 0, 0));
        smallQueue_.FreeTensor(out);
    }

    TPipe* pipe_ = nullptr;
    TQue<QuePosition::VECIN, 1> inQueue_, pieceQueue_, keptQueue_;
    TQue<QuePosition::VECOUT, 1> smallQueue_;
    TBuf<QuePosition::VECCALC> wideBuf_, otherBuf_, scoreBuf_, bitsBuf_, workBuf_;
    GlobalTensor<T> logitGm_;
    GlobalTensor<float> weightGm_, alphaGm_, floatGm_, largestGm_, bestGm_;
    GlobalTensor<int32_t> mixGm_, intGm_;
    LocalTensor<T> kept_;
    uint32_t rows_ = 0, vocab_ = 0, requests_ = 0, voices_ = 1, cores_ = 1, parts_ = 1, width_ = 64, core_ = 0;
    bool resident_ = false, holds_ = false;
};

}  // namespace colora
#endif

extern "C" __global__ __aicore__ void contrastive_select(GM_ADDR logits, GM_ADDR mixRows, GM_ADDR weights, GM_ADDR logAlpha, GM_ADDR ints,
                                                         GM_ADDR floats, GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with the hardware's SyncAll
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::ContrastiveSelect<DTYPE_LOGITS> select;
    select.Init(&pipe, data, logits, mixRows, weights, logAlpha, ints, floats, AscendC::GetUserWorkspace(workspace));
    select.Process();
}
