// out[t] = x[t] . W^T + scale[s] * (x[t] . down[s]^T) . up[s], W = int4 values times their scales, s = slots[t], in one launch.
// x (tokens, hidden), weight (width, hidden / 2) uint8 with two values a byte, weightScale (width, groups) float32,
// down (slots, rank, hidden), up (slots, rank, width), scale (slots) float32, slots (tokens) int32, out (tokens, width).
// A token whose slot is outside the bank (-1) has the first term only. LR-QAT's export format, arXiv 2406.06385.
#include "w4_phase.h"

extern "C" __global__ __aicore__ void w4_lora(GM_ADDR x, GM_ADDR weight, GM_ADDR weightScale, GM_ADDR down, GM_ADDR up, GM_ADDR scale,
                                              GM_ADDR slots, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with the hardware's SyncAll
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::W4Phases<DTYPE_X> layer;
    layer.Init(&pipe, data, AscendC::GetUserWorkspace(workspace));
    layer.SetInput(x, down);
    layer.SetScale(scale);
    layer.SetOutput(up, out, out);
    layer.SetWeight(weight, weightScale);
    AscendC::GlobalTensor<int32_t> slotGm;
    slotGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots), layer.tokens_);
    colora::Groups groups;
    for (uint32_t from = 0; from < layer.tokens_; from += layer.window_) {
        const uint32_t n = colora::Smaller(layer.window_, layer.tokens_ - from);
        layer.Sort(groups, slotGm, from, n);
        if (groups.tokens) {
            layer.Shrink(groups);
            AscendC::SyncAll();
            layer.Reduce(groups);
            AscendC::SyncAll();
        }
        layer.Multiply(groups, from, n);
    }
}
