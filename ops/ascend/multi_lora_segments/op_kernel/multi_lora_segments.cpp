// The prefill form of multi_lora: tokens [starts[k], starts[k + 1]) use adapter slots[k] (-1: none). A weight tile is
// loaded once for all tokens of a segment. starts (segments + 1) int32, ascending; slots (segments) int32; the rest as
// in multi_lora. Tokens outside all segments keep y's bits.
#include "lora_phases.h"

#ifndef COLORA_SEGMENT_WALK  // the emulator includes this file once for each dtype
#define COLORA_SEGMENT_WALK
namespace colora {

// Walks the segments in passes of at most `window` tokens and 64 groups. Every core walks alike.
class SegmentWalk {
  public:
    __aicore__ inline void Init(GM_ADDR starts, GM_ADDR slots, uint32_t segments, uint32_t tokens, uint32_t window, uint32_t bank) {
        starts_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(starts), segments + 1);
        slots_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots), segments);
        segments_ = segments;
        tokens_ = tokens;
        window_ = window;
        bank_ = bank;
        Enter(0);
    }
    // Fills groups with the next pass; false when no token is left.
    __aicore__ inline bool Next(Groups& groups) {
        groups.Clear();
        groups.listed = false;
        while (segment_ < segments_ && groups.count < kGroups && groups.tokens < window_) {
            if (slot_ >= 0 && token_ < end_) {
                const uint32_t n = Smaller(end_ - token_, window_ - groups.tokens);
                groups.AddSegment(slot_, token_, n);
                token_ += n;
            }
            if (slot_ < 0 || token_ >= end_) Enter(segment_ + 1);
        }
        return groups.tokens > 0;
    }
    // The k-th stretch of tokens, for what has to be copied; stretch `segments` is the tail after the last segment.
    __aicore__ inline bool Stretch(uint32_t k, uint32_t& from, uint32_t& to) const {
        from = k == 0 ? 0 : Clamp(starts_.GetValue(k));
        to = k == segments_ ? tokens_ : Clamp(starts_.GetValue(k + 1));
        const int32_t slot = k == segments_ ? -1 : slots_.GetValue(k);
        return slot >= 0 && slot < static_cast<int32_t>(bank_);
    }
    __aicore__ inline uint32_t Head() const { return segments_ ? Clamp(starts_.GetValue(0)) : tokens_; }
    __aicore__ inline uint32_t Count() const { return segments_; }

  private:
    __aicore__ inline uint32_t Clamp(int32_t value) const {
        return value < 0 ? 0 : Smaller(static_cast<uint32_t>(value), tokens_);
    }
    __aicore__ inline void Enter(uint32_t segment) {
        segment_ = segment;
        if (segment_ >= segments_) return;
        token_ = Clamp(starts_.GetValue(segment_));
        end_ = Clamp(starts_.GetValue(segment_ + 1));
        slot_ = slots_.GetValue(segment_);
        if (slot_ >= static_cast<int32_t>(bank_)) slot_ = -1;
    }
    GlobalTensor<int32_t> starts_, slots_;
    uint32_t segments_ = 0, tokens_ = 0, window_ = 1, bank_ = 0, segment_ = 0, token_ = 0, end_ = 0;
    int32_t slot_ = -1;
};

}  // namespace colora
#endif

extern "C" __global__ __aicore__ void multi_lora_segments(GM_ADDR x, GM_ADDR down, GM_ADDR up, GM_ADDR scale, GM_ADDR starts,
                                                          GM_ADDR slots, GM_ADDR y, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with the hardware's SyncAll
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::LoraPhases<DTYPE_X> lora;
    lora.Init(&pipe, data, AscendC::GetUserWorkspace(workspace));
    lora.SetInput(x, down);
    lora.SetScale(scale);
    lora.SetOutput(up, y, out);
    colora::SegmentWalk walk;
    walk.Init(starts, slots, data.segments, lora.tokens_, lora.window_, lora.bank_);
    if (y != out) {
        colora::Used used;
        lora.CopyThrough(0, walk.Head(), used);
        for (uint32_t k = 0; k <= walk.Count() && walk.Count(); ++k) {
            uint32_t from = 0, to = 0;
            used.all = walk.Stretch(k, from, to);
            if (k == 0) from = walk.Head();
            if (from < to) lora.CopyThrough(from, to - from, used);
        }
    }
    AscendC::GlobalTensor<float> none;
    colora::Groups groups;
    while (walk.Next(groups)) {
        lora.Shrink(groups);
        AscendC::SyncAll();
        lora.Reduce(groups);
        AscendC::SyncAll();
        lora.Expand(groups, false, none);
    }
}
