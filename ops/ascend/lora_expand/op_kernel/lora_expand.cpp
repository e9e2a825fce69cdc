// y[t, offset:offset+width] += h[t] . up[s], s = slots[t]: the second half alone (tensor parallel ranks sum
// h between the halves). h (tokens, rank) float32, up (slots, rank, width), slots (tokens) int32.
#include "lora_phases.h"

extern "C" __global__ __aicore__ void lora_expand(GM_ADDR h, GM_ADDR up, GM_ADDR slots, GM_ADDR y, GM_ADDR out,
                                                  GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);  // the cores never meet
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::LoraPhases<DTYPE_UP> lora;
    lora.Init(&pipe, data, AscendC::GetUserWorkspace(workspace));
    lora.SetOutput(up, y, out);
    AscendC::GlobalTensor<int32_t> slotGm;
    slotGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots), lora.tokens_);
    AscendC::GlobalTensor<float> hGm;
    hGm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(h), static_cast<uint64_t>(lora.tokens_) * lora.rank_);
    colora::Groups groups;
    for (uint32_t from = 0; from < lora.tokens_; from += lora.window_) {
        const uint32_t n = colora::Smaller(lora.window_, lora.tokens_ - from);
        lora.Sort(groups, slotGm, from, n);
        lora.CopyThrough(from, n, colora::UsedBy(groups, from));
        if (groups.tokens) lora.Expand(groups, hGm);
    }
}
