// token[r] = argmax over {i : e_i >= logAlpha[r] + max e} of (1 + beta[r]) e_i - beta[r] a_i, ties to the smallest i.
// CoLD scoring rule (arXiv 2505.14620). expert, amateur (rows, vocab) half, bfloat16 or float; logAlpha, beta (rows)
// float32; mask (1 or rows, vocab) float32, added to the expert's logits; token (rows) int32. A request whose expert
// logits are all -inf gives token 0.
//
// Pieces of the rows are spread over the cores: largest expert logit of each piece (SyncAll), then the best score of
// each piece against the cut of the whole row (SyncAll), then the best piece. A core with a single piece that fits
// keeps its logits in the unified buffer between the two passes.
#include "kernel_operator.h"

#ifndef COLORA_CONTRASTIVE_SELECT  // the emulator includes this file once for each dtype
#define COLORA_CONTRASTIVE_SELECT
namespace colora {

using namespace AscendC;

constexpr uint32_t kTile = 4096;
constexpr uint32_t kResident = 12288;

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
    template <typename Tiling>
    __aicore__ inline void Init(TPipe* pipe, const Tiling& t, GM_ADDR expert, GM_ADDR amateur, GM_ADDR logAlpha, GM_ADDR beta,
                                GM_ADDR mask, GM_ADDR token, GM_ADDR workspace) {
        pipe_ = pipe;
        rows_ = t.rows;
        vocab_ = t.vocab;
        cores_ = t.cores;
        parts_ = t.parts;
        width_ = t.width;
        maskRows_ = t.maskRows;
        core_ = static_cast<uint32_t>(GetBlockIdx());
        const uint64_t all = static_cast<uint64_t>(rows_) * vocab_;
        expertGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(expert), all);
        amateurGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(amateur), all);
        alphaGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(logAlpha), rows_);
        betaGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(beta), rows_);
        if (maskRows_) maskGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(mask), static_cast<uint64_t>(maskRows_) * vocab_);
        tokenGm_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(token), rows_);
        const uint64_t items = static_cast<uint64_t>(rows_) * parts_;
        largestGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace), items * 8);
        bestGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace) + items * 8, items * 8);
        pipe_->InitBuffer(inQueue_, 2, kTile * sizeof(T));
        pipe_->InitBuffer(maskQueue_, 1, kTile * sizeof(float));
        pipe_->InitBuffer(pieceQueue_, 1, 64 * 32);
        pipe_->InitBuffer(smallQueue_, 1, 32);
        pipe_->InitBuffer(expertBuf_, kResident * sizeof(float));
        pipe_->InitBuffer(amateurBuf_, kTile * sizeof(float));
        pipe_->InitBuffer(scoreBuf_, kTile * sizeof(float));
        pipe_->InitBuffer(bitsBuf_, kTile / 8);
        pipe_->InitBuffer(workBuf_, 2048);
        resident_ = rows_ * parts_ <= cores_ && width_ <= kResident;
    }

    __aicore__ inline void Process() {
        const uint32_t items = rows_ * parts_;
        for (uint32_t i = core_; i < items; i += cores_) Largest(i);
        SyncAll();
        for (uint32_t i = core_; i < items; i += cores_) Best(i);
        SyncAll();
        for (uint32_t r = core_; r < rows_; r += cores_) Choose(r);
    }

  private:
    static constexpr float kLowest = -__builtin_inff();

    template <HardEvent event>
    __aicore__ inline void Order() {
        const TEventID id = pipe_->FetchEventID(event);
        SetFlag<event>(id);
        WaitFlag<event>(id);
    }
    __aicore__ inline uint32_t Lesser(uint32_t a, uint32_t b) const { return a < b ? a : b; }
    __aicore__ inline void Widen(const LocalTensor<float>& dst, const LocalTensor<T>& src, uint32_t n) {
        if constexpr (SameType<T, float>::value) Muls(dst, src, 1.0f, static_cast<int32_t>(n));
        else Cast(dst, src, RoundMode::CAST_NONE, n);
    }
    // n logits, widened; filled with zeros up to the next multiple of 64, as comparisons work on whole repeats.
    __aicore__ inline void Load(const LocalTensor<float>& wide, const GlobalTensor<T>& gm, uint64_t at, uint32_t n) {
        const uint32_t block = 32 / sizeof(T), whole = (n + block - 1) / block * block, full = (n + 63) / 64 * 64;
        LocalTensor<T> raw = inQueue_.template AllocTensor<T>();
        DataCopyPad(raw, gm[at], DataCopyExtParams(1, n * sizeof(T), 0, 0, 0),
                    DataCopyPadExtParams<T>(true, 0, static_cast<uint8_t>(whole - n), T()));
        inQueue_.EnQue(raw);
        raw = inQueue_.template DeQue<T>();
        PipeBarrier<PIPE_V>();
        Widen(wide, raw, whole);
        if (whole < full) Duplicate(wide[whole], 0.0f, static_cast<int32_t>(full - whole));
        PipeBarrier<PIPE_V>();
        inQueue_.FreeTensor(raw);
    }
    __aicore__ inline void LoadExpert(const LocalTensor<float>& wide, uint32_t row, uint32_t column, uint32_t n) {
        Load(wide, expertGm_, static_cast<uint64_t>(row) * vocab_ + column, n);
        if (maskRows_ == 0) return;
        LocalTensor<float> mask = maskQueue_.template AllocTensor<float>();
        const uint64_t at = static_cast<uint64_t>(maskRows_ == 1 ? 0 : row) * vocab_ + column;
        DataCopyPad(mask, maskGm_[at], DataCopyExtParams(1, n * sizeof(float), 0, 0, 0), DataCopyPadExtParams<float>(false, 0, 0, 0.0f));
        maskQueue_.EnQue(mask);
        mask = maskQueue_.template DeQue<float>();
        Add(wide, wide, mask, static_cast<int32_t>(n));
        PipeBarrier<PIPE_V>();
        maskQueue_.FreeTensor(mask);
    }
    __aicore__ inline float LargestOf(const LocalTensor<float>& values, uint32_t n) {
        LocalTensor<float> out = workBuf_.template Get<float>();
        ReduceMax(out, values, out[64], static_cast<int32_t>(n), false);
        Order<HardEvent::V_S>();
        const float value = out.GetValue(0);
        Order<HardEvent::S_V>();
        return value;
    }
    // Writes {value, index} as one block of 32 bytes.
    __aicore__ inline void Store(const GlobalTensor<float>& gm, uint32_t item, float value, int32_t index) {
        LocalTensor<float> out = smallQueue_.template AllocTensor<float>();
        Duplicate(out, value, 8);
        Order<HardEvent::V_S>();
        out.template ReinterpretCast<int32_t>().SetValue(1, index);
        Order<HardEvent::S_MTE3>();
        smallQueue_.EnQue(out);
        out = smallQueue_.template DeQue<float>();
        DataCopyPad(gm[static_cast<uint64_t>(item) * 8], out, DataCopyExtParams(1, 32, 0, 0, 0));
        smallQueue_.FreeTensor(out);
    }
    // The blocks {value, index} of a row's pieces, for the scalar unit.
    __aicore__ inline LocalTensor<float> Pieces(const GlobalTensor<float>& gm, uint32_t row) {
        LocalTensor<float> pieces = pieceQueue_.template AllocTensor<float>();
        DataCopyPad(pieces, gm[static_cast<uint64_t>(row) * parts_ * 8], DataCopyExtParams(1, parts_ * 32, 0, 0, 0),
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
        const uint32_t row = item / parts_, begin = item % parts_ * width_, n = Lesser(width_, vocab_ - begin);
        LocalTensor<float> expert = expertBuf_.template Get<float>();
        float largest = kLowest;
        for (uint32_t c = 0; c < n; c += kTile) {
            const uint32_t m = Lesser(kTile, n - c);
            const LocalTensor<float> tile = resident_ ? expert[c] : expert;
            LoadExpert(tile, row, begin + c, m);
            const float value = LargestOf(tile, m);
            if (value > largest) largest = value;
        }
        Store(largestGm_, item, largest, 0);
    }

    __aicore__ inline void Best(uint32_t item) {
        const uint32_t row = item / parts_, begin = item % parts_ * width_, n = Lesser(width_, vocab_ - begin);
        LocalTensor<float> pieces = Pieces(largestGm_, row);
        float largest = kLowest;
        for (uint32_t p = 0; p < parts_; ++p) {
            const float value = pieces.GetValue(p * 8);
            if (value > largest) largest = value;
        }
        FreePieces(pieces);
        const float cut = largest + alphaGm_.GetValue(row), beta = betaGm_.GetValue(row);
        LocalTensor<float> expert = expertBuf_.template Get<float>(), amateur = amateurBuf_.template Get<float>();
        LocalTensor<float> score = scoreBuf_.template Get<float>(), work = workBuf_.template Get<float>();
        LocalTensor<uint8_t> bits = bitsBuf_.template Get<uint8_t>();
        float best = kLowest;
        int32_t token = static_cast<int32_t>(begin);
        for (uint32_t c = 0; c < n && largest > kLowest; c += kTile) {
            const uint32_t m = Lesser(kTile, n - c), full = (m + 63) / 64 * 64;
            const LocalTensor<float> tile = resident_ ? expert[c] : expert;
            if (!resident_) LoadExpert(tile, row, begin + c, m);
            Muls(score, tile, 1.0f + beta, static_cast<int32_t>(full));
            if (beta != 0.0f) {  // 0 * -inf would be NaN
                Load(amateur, amateurGm_, static_cast<uint64_t>(row) * vocab_ + begin + c, m);
                Axpy(score, amateur, -beta, static_cast<int32_t>(full));
            }
            CompareScalar(bits, tile, cut, CMPMODE::GE, full);
            PipeBarrier<PIPE_V>();
            Select(score, bits, score, kLowest, SELMODE::VSEL_TENSOR_SCALAR_MODE, full);
            PipeBarrier<PIPE_V>();
            ReduceMax(work, score, work[64], static_cast<int32_t>(m), true);
            Order<HardEvent::V_S>();
            const float value = work.GetValue(0);
            const int32_t index = work.template ReinterpretCast<int32_t>().GetValue(1);
            Order<HardEvent::S_V>();
            PipeBarrier<PIPE_V>();
            if (value > best) {
                best = value;
                token = static_cast<int32_t>(begin + c) + index;
            }
        }
        Store(bestGm_, item, best, token);
    }

    __aicore__ inline void Choose(uint32_t row) {
        LocalTensor<float> pieces = Pieces(bestGm_, row);
        LocalTensor<int32_t> tokens = pieces.template ReinterpretCast<int32_t>();
        float best = kLowest;
        int32_t token = tokens.GetValue(1);
        for (uint32_t p = 0; p < parts_; ++p) {
            const float value = pieces.GetValue(p * 8);
            if (value > best) {
                best = value;
                token = tokens.GetValue(p * 8 + 1);
            }
        }
        FreePieces(pieces);
        LocalTensor<int32_t> out = smallQueue_.template AllocTensor<int32_t>();
        Duplicate(out, token, 8);
        smallQueue_.EnQue(out);
        out = smallQueue_.template DeQue<int32_t>();
        DataCopyPad(tokenGm_[row], out, DataCopyExtParams(1, sizeof(int32_t), 0, 0, 0));
        smallQueue_.FreeTensor(out);
    }

    TPipe* pipe_ = nullptr;
    TQue<QuePosition::VECIN, 1> inQueue_, maskQueue_, pieceQueue_;
    TQue<QuePosition::VECOUT, 1> smallQueue_;
    TBuf<QuePosition::VECCALC> expertBuf_, amateurBuf_, scoreBuf_, bitsBuf_, workBuf_;
    GlobalTensor<T> expertGm_, amateurGm_;
    GlobalTensor<float> alphaGm_, betaGm_, maskGm_, largestGm_, bestGm_;
    GlobalTensor<int32_t> tokenGm_;
    uint32_t rows_ = 0, vocab_ = 0, cores_ = 1, parts_ = 1, width_ = 64, maskRows_ = 0, core_ = 0;
    bool resident_ = false;
};

}  // namespace colora
#endif

extern "C" __global__ __aicore__ void contrastive_select(GM_ADDR expert, GM_ADDR amateur, GM_ADDR logAlpha, GM_ADDR beta, GM_ADDR mask,
                                                         GM_ADDR token, GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with the hardware's SyncAll
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::ContrastiveSelect<DTYPE_EXPERT> select;
    select.Init(&pipe, data, expert, amateur, logAlpha, beta, mask, token, AscendC::GetUserWorkspace(workspace));
    select.Process();
}
