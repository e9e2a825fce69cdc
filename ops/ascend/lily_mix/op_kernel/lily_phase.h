// Lily's second half on vector cores: y += scale * h . (sum over the experts e of w_e B_e), without ever forming the sum.
//
// Every core takes some output columns of some adapters. A token's coefficients are (w_e * scale) * h for every expert, so
// the product is one expansion of experts * rank rows: y is loaded once, all experts are added in float32, and it is
// rounded and stored once. A weight is read once for all the tokens of an adapter that fit the buffer together.
#ifndef COLORA_LILY_PHASE_H
#define COLORA_LILY_PHASE_H
#include "lora_phases.h"

namespace colora {

template <typename T>
class LilyPhases : public LoraPhases<T> {
  public:
    template <typename Tiling>
    __aicore__ inline void Init(TPipe* pipe, const Tiling& t, GM_ADDR workspace) {
        Base::Init(pipe, t, workspace);
        experts_ = t.experts;
        unit_ = t.unitOut;
        Base::tableRow_ = experts_ * coefficientRow_;
    }
    // As SetOutput, with up (slots, experts, rank, width).
    __aicore__ inline void SetExperts(GM_ADDR h, GM_ADDR weights, GM_ADDR up, GM_ADDR y, GM_ADDR out) {
        Base::SetOutput(up, y, out);
        hGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(h), static_cast<uint64_t>(Base::tokens_) * rank_);
        routerGm_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(weights), static_cast<uint64_t>(Base::tokens_) * experts_);
        upGm_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(up), static_cast<uint64_t>(Base::bank_) * experts_ * rank_ * width_);
    }
    __aicore__ inline void Mix(const Groups& groups) {
        Split split;
        split.Plan(groups, (width_ + unit_ - 1) / unit_, Base::cores_, 8 * rank_ * experts_, (rank_ + 16) * experts_);
        for (uint32_t g = 0; g < groups.count; ++g) {
            const uint32_t from = split.UnitAt(g, split.Boundary(Base::core_)), to = split.UnitAt(g, split.Boundary(Base::core_ + 1));
            if (from < to) Slice(groups, g, from * unit_, Smaller(to * unit_, width_));
        }
    }

  private:
    using Base = LoraPhases<T>;
    using Base::width_, Base::rank_, Base::padded_, Base::coefficientRow_, Base::tableRow_, Base::rounded_, Base::wide_;
    using Base::weightQueue_, Base::inQueue_, Base::outQueue_, Base::rows_, Base::acc_, Base::upGm_;

    __aicore__ inline void Slice(const Groups& groups, uint32_t g, uint32_t begin, uint32_t end) {
        const uint32_t tileColumns = Base::TileColumns(end - begin), most = kAccBytes / sizeof(float) / tableRow_;
        const uint64_t bank = static_cast<uint64_t>(groups.slot[g]) * experts_ * rank_ * width_;
        for (uint32_t t = 0; t < groups.size[g]; t += most) {
            const uint32_t n = Smaller(most, groups.size[g] - t), position = groups.first[g] + t;
            const LocalTensor<float> table = Coefficients(groups, g, position, n);
            for (uint32_t c = begin; c < end; c += tileColumns) {
                const uint32_t columns = Smaller(tileColumns, end - c), pitch = Base::Pitch(columns), atOnce = Base::kRowTile / pitch;
                for (uint32_t r = 0; r < n; r += atOnce) {
                    const uint32_t m = Smaller(atOnce, n - r);
                    const LocalTensor<float> y = Base::LoadRows(Base::yGm_, groups, g, position + r, m, Base::rowWidth_,
                                                                Base::offset_ + c, columns);
                    for (uint32_t e = 0; e < experts_; ++e) {
                        LocalTensor<T> tile = Base::LoadWeights(upGm_, bank + static_cast<uint64_t>(e) * rank_ * width_ + c,
                                                                      columns, width_);
                        if (!rounded_) wide_ = Base::WidenWeights(tile, columns);
                        Base::AddProducts(y, tile, table[r * tableRow_ + e * coefficientRow_], m, columns, pitch);
                        if (Base::kFloat || rounded_) weightQueue_.FreeTensor(tile);
                    }
                    LocalTensor<T> out = outQueue_.template AllocTensor<T>();
                    Base::Narrow(out, y, m * pitch);
                    outQueue_.EnQue(out);
                    Base::StoreRows(groups, g, position + r, m, c, columns);
                }
            }
        }
        Base::template Order<HardEvent::S_V>();  // what comes next may overwrite the coefficients that the scalar unit read
    }

    // (w_e * scale) * h of n tokens for every expert, packed for the expansion; read by the scalar unit.
    __aicore__ inline LocalTensor<float> Coefficients(const Groups& groups, uint32_t g, uint32_t position, uint32_t n) {
        const LocalTensor<float> table = acc_.template Get<float>(), mixed = rows_.template Get<float>();
        const float scale = Base::scaleGm_.GetValue(groups.slot[g]);
        Base::template Order<HardEvent::S_V>();
        for (uint32_t i = 0; i < n; ++i) {
            const uint64_t token = groups.Token(g, position + i);
            LocalTensor<float> h = inQueue_.template AllocTensor<float>();
            DataCopyPad(h, hGm_[token * rank_], DataCopyExtParams(1, rank_ * 4, 0, 0, 0),
                        DataCopyPadExtParams<float>(true, 0, static_cast<uint8_t>(padded_ - rank_), 0.0f));
            inQueue_.EnQue(h);
            h = inQueue_.template DeQue<float>();  // a queue of depth 1 holds one tensor
            LocalTensor<float> router = inQueue_.template AllocTensor<float>();
            DataCopyPad(router, routerGm_[token * experts_], DataCopyExtParams(1, experts_ * 4, 0, 0, 0),
                        DataCopyPadExtParams<float>(false, 0, 0, 0.0f));
            inQueue_.EnQue(router);
            router = inQueue_.template DeQue<float>();
            Base::template Order<HardEvent::MTE2_S>();
            for (uint32_t e = 0; e < experts_; ++e) {
                const float factor = router.GetValue(e) * scale;
                PipeBarrier<PIPE_V>();
                Muls(mixed, h, factor, static_cast<int32_t>(padded_));
                PipeBarrier<PIPE_V>();
                Base::Pack(table[i * tableRow_ + e * coefficientRow_], mixed);
            }
            Base::template Order<HardEvent::S_V>();
            inQueue_.FreeTensor(router);
            inQueue_.FreeTensor(h);
        }
        Base::template Order<HardEvent::V_S>();
        return table;
    }

    GlobalTensor<float> hGm_, routerGm_;
    uint32_t experts_ = 1, unit_ = 16;
};

}  // namespace colora
#endif
