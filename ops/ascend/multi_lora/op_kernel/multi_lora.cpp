// y[t, offset:offset+width] += scale[s] * (x[t] . down[s]^T) . up[s], s = slots[t], for all tokens in one launch.
// x (tokens, hidden), down (slots, rank, hidden), up (slots, rank, width), scale (slots) float32, slots (tokens) int32,
// y (tokens, row width). Tokens with a slot outside the bank (-1) keep y's bits. out may be y itself.
#include "lora_phases.h"

extern "C" __global__ __aicore__ void multi_lora(GM_ADDR x, GM_ADDR down, GM_ADDR up, GM_ADDR scale, GM_ADDR slots,
                                                 GM_ADDR y, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with the hardware's SyncAll
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::LoraPhases<DTYPE_X> lora;
    lora.Init(&pipe, data, AscendC::GetUserWorkspace(workspace));
    lora.SetInput(x, down);
    lora.SetScale(scale);
    lora.SetOutput(up, y, out);
    AscendC::GlobalTensor<int32_t> slotGm;
    slotGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots), lora.tokens_);
    AscendC::GlobalTensor<float> none;
    colora::Groups groups;
    for (uint32_t from = 0; from < lora.tokens_; from += lora.window_) {
        const uint32_t n = colora::Smaller(lora.window_, lora.tokens_ - from);
        lora.Sort(groups, slotGm, from, n);
        lora.CopyThrough(from, n, colora::UsedBy(groups, from));
        if (groups.tokens == 0) continue;
        lora.Shrink(groups);
        AscendC::SyncAll();
        lora.Reduce(groups);
        AscendC::SyncAll();
        lora.Expand(groups, false, none);
    }
}
