// h[t] = scale[s] * (x[t] . down[s]^T) in float32, s = slots[t]; zeros for tokens without an adapter.
// x (tokens, hidden), down (slots, rank, hidden), scale (slots) float32, slots (tokens) int32, h (tokens, rank) float32.
#include "lora_phases.h"

extern "C" __global__ __aicore__ void lora_shrink(GM_ADDR x, GM_ADDR down, GM_ADDR scale, GM_ADDR slots, GM_ADDR h,
                                                  GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with the hardware's SyncAll
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::LoraPhases<DTYPE_X> lora;
    lora.Init(&pipe, data, AscendC::GetUserWorkspace(workspace));
    lora.SetInput(x, down);
    lora.SetScale(scale);
    AscendC::GlobalTensor<int32_t> slotGm;
    slotGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots), lora.tokens_);
    AscendC::GlobalTensor<float> hGm;
    hGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(h), static_cast<uint64_t>(lora.tokens_) * lora.rank_);
    colora::Groups groups;
    for (uint32_t from = 0; from < lora.tokens_; from += lora.window_) {
        const uint32_t n = colora::Smaller(lora.window_, lora.tokens_ - from);
        lora.Sort(groups, slotGm, from, n);
        lora.ZeroInto(hGm, from, n, colora::UsedBy(groups, from));
        if (groups.tokens == 0) continue;
        lora.Shrink(groups);
        AscendC::SyncAll();
        lora.ReduceInto(groups, hGm);
        AscendC::SyncAll();  // the next window's partial sums take the place of these
    }
}
