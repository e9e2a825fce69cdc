// The expand phase of LoraPhases, and the copy of what it does not touch. Included by lora_phases.h.
#ifndef COLORA_LORA_EXPAND_PHASE_H
#define COLORA_LORA_EXPAND_PHASE_H
#include "lora_phases.h"

namespace colora {

template <typename T>
__aicore__ inline void LoraPhases<T>::Expand(const Groups& groups, const GlobalTensor<float>& h) {
    expand_.Plan(groups, (width_ + unitOut_ - 1) / unitOut_, cores_, 8 * rank_, rank_ + 16);
    for (uint32_t g = 0; g < groups.count; ++g) {
        const uint32_t from = expand_.UnitAt(g, expand_.Boundary(core_));
        const uint32_t to = expand_.UnitAt(g, expand_.Boundary(core_ + 1));
        if (from >= to) continue;
        ExpandSlice(groups, g, from * unitOut_, Smaller(to * unitOut_, width_), h);
    }
}

template <typename T>
__aicore__ inline void LoraPhases<T>::CopyThrough(uint32_t from, uint32_t n, const Used& used) {
    if (inPlace_) return;
    const uint32_t chunk = kCopyBytes / sizeof(T), chunks = (rowWidth_ + chunk - 1) / chunk;
    for (uint32_t k = core_; k < n * chunks; k += cores_) {
        const uint32_t token = from + k / chunks, left = k % chunks * chunk, right = Smaller(left + chunk, rowWidth_);
        if (!used.Has(token)) {
            CopyPart(token, left, right);
            continue;
        }
        CopyPart(token, left, Smaller(right, offset_));
        CopyPart(token, left > offset_ + width_ ? left : offset_ + width_, right);
    }
}

template <typename T>
__aicore__ inline LocalTensor<float> LoraPhases<T>::LoadCoefficients(const Groups& groups, uint32_t g, uint32_t position, uint32_t n,
                                                      const GlobalTensor<float>& h) {
    LocalTensor<float> table = acc_.template Get<float>();
    Order<HardEvent::S_MTE2>();
    Order<HardEvent::V_MTE2>();
    Order<HardEvent::S_V>();
    for (uint32_t i = 0; i < n; ++i) {
        LocalTensor<float> raw = inQueue_.template AllocTensor<float>();
        DataCopyPad(raw, h[static_cast<uint64_t>(groups.Token(g, position + i)) * rank_], DataCopyExtParams(1, rank_ * 4, 0, 0, 0),
                    DataCopyPadExtParams<float>(true, 0, static_cast<uint8_t>(padded_ - rank_), 0.0f));
        inQueue_.EnQue(raw);
        raw = inQueue_.template DeQue<float>();
        Pack(table[i * coefficientRow_], raw);
        inQueue_.FreeTensor(raw);
    }
    Order<HardEvent::V_S>();
    return table;
}

template <typename T>
__aicore__ inline void LoraPhases<T>::ExpandSlice(const Groups& groups, uint32_t g, uint32_t begin, uint32_t end, const GlobalTensor<float>& h) {
    const uint32_t tileColumns = TileColumns(end - begin);
    const bool once = tileColumns == end - begin;
    const uint64_t bank = static_cast<uint64_t>(groups.slot[g]) * rank_ * width_;
    const uint32_t most = kAccBytes / sizeof(float) / coefficientRow_;
    LocalTensor<T> tile;
    for (uint32_t t = 0; t < groups.size[g]; t += most) {
        const uint32_t n = Smaller(most, groups.size[g] - t), position = groups.first[g] + t;
        const LocalTensor<float> table = LoadCoefficients(groups, g, position, n, h);
        for (uint32_t c = begin; c < end; c += tileColumns) {
            const uint32_t columns = Smaller(tileColumns, end - c), pitch = Pitch(columns);
            if (!once || t == 0) {
                tile = LoadWeights(upGm_, bank + c, columns, width_);
                if (!rounded_) wide_ = WidenWeights(tile, columns);
            }
            const uint32_t rowsAtOnce = kRowTile / pitch;
            for (uint32_t r = 0; r < n; r += rowsAtOnce) {
                const uint32_t m = Smaller(rowsAtOnce, n - r);
                LocalTensor<float> y = LoadRows(yGm_, groups, g, position + r, m, rowWidth_, offset_ + c, columns);
                AddProducts(y, tile, table[r * coefficientRow_], m, columns, pitch);
                LocalTensor<T> out = outQueue_.template AllocTensor<T>();
                Narrow(out, y, m * pitch);
                outQueue_.EnQue(out);
                StoreRows(groups, g, position + r, m, c, columns);
            }
            if (!once && (kFloat || rounded_)) weightQueue_.FreeTensor(tile);
        }
    }
    if (once && (kFloat || rounded_)) weightQueue_.FreeTensor(tile);
    Order<HardEvent::S_V>();  // the next phase may overwrite the coefficients that the scalar unit read
}

template <typename T>
__aicore__ inline void LoraPhases<T>::AddProducts(const LocalTensor<float>& y, const LocalTensor<T>& tile, const LocalTensor<float>& table,
                                                  uint32_t m, uint32_t columns, uint32_t yPitch) {
    if constexpr (kHalf) {
        if (rounded_) AddRounded(y, tile, table, m, columns, yPitch);
    }
    if (!rounded_) AddExact(y, table, m, columns, yPitch);
}

template <typename T>
__aicore__ inline void LoraPhases<T>::AddExact(const LocalTensor<float>& y, const LocalTensor<float>& table, uint32_t m, uint32_t columns,
                                               uint32_t yPitch) {
    const uint32_t pitch = Pitch(columns);
    for (uint32_t j = 0; j < rank_; ++j) {
        for (uint32_t i = 0; i < m; ++i) {
            Axpy(y[i * yPitch], wide_[j * pitch], table.GetValue(i * tableRow_ + j), static_cast<int32_t>(columns));
        }
        PipeBarrier<PIPE_V>();
    }
}

template <typename T>
__aicore__ inline void LoraPhases<T>::AddRounded(const LocalTensor<float>& y, const LocalTensor<half>& w, const LocalTensor<float>& table,
                                                 uint32_t m, uint32_t columns, uint32_t yPitch) {
    const uint32_t pitch = Pitch(columns);
    const LocalTensor<half> halves = table.template ReinterpretCast<half>();
    for (uint32_t i = 0; i < m; ++i) {
        const float down = table.GetValue(i * tableRow_ + coefficients_ / 2 + 1);
        if (down != 1.0f) Muls(y[i * yPitch], y[i * yPitch], down, static_cast<int32_t>(columns));
    }
    PipeBarrier<PIPE_V>();
    for (uint32_t j = 0; j < rank_; ++j) {
        for (uint32_t i = 0; i < m; ++i) {
            Axpy(y[i * yPitch], w[j * pitch], halves.GetValue(i * tableRow_ * 2 + j), static_cast<int32_t>(columns));
        }
        PipeBarrier<PIPE_V>();
    }
    for (uint32_t i = 0; i < m; ++i) {
        const float up = table.GetValue(i * tableRow_ + coefficients_ / 2);
        if (up != 1.0f) Muls(y[i * yPitch], y[i * yPitch], up, static_cast<int32_t>(columns));
    }
    PipeBarrier<PIPE_V>();
}

template <typename T>
__aicore__ inline void LoraPhases<T>::StoreRows(const Groups& groups, uint32_t g, uint32_t position, uint32_t n, uint32_t column, uint32_t columns) {
    const uint32_t pitch = Pitch(columns);
    LocalTensor<T> out = outQueue_.template DeQue<T>();
    for (uint32_t i = 0; i < n;) {
        const uint32_t run = groups.Run(g, position + i, n - i);
        DataCopyPad(outGm_[static_cast<uint64_t>(groups.Token(g, position + i)) * rowWidth_ + offset_ + column], out[i * pitch],
                    DataCopyExtParams(static_cast<uint16_t>(run), columns * sizeof(T), 0, (rowWidth_ - columns) * sizeof(T), 0));
        i += run;
    }
    outQueue_.FreeTensor(out);
}

template <typename T>
__aicore__ inline void LoraPhases<T>::CopyPart(uint32_t token, uint32_t left, uint32_t right) {
    if (left >= right) return;
    const uint64_t at = static_cast<uint64_t>(token) * rowWidth_ + left;
    LocalTensor<T> part = copyQueue_.template AllocTensor<T>();
    DataCopyPad(part, yGm_[at], DataCopyExtParams(1, (right - left) * sizeof(T), 0, 0, 0),
                DataCopyPadExtParams<T>(false, 0, 0, T()));
    copyQueue_.EnQue(part);
    part = copyQueue_.template DeQue<T>();
    DataCopyPad(outGm_[at], part, DataCopyExtParams(1, (right - left) * sizeof(T), 0, 0, 0));
    copyQueue_.FreeTensor(part);
}

}  // namespace colora
#endif
