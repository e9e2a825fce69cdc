// y[t] += scale[s, i] (x[t] . down[s, i]^T) . up[s] in the columns of each slice i, s = slots[t], for all tokens in one
// launch. x (tokens, hidden), down (slots, slices x rank, hidden), up (slots, rank, width), scale (slots, slices) float32,
// slots (tokens) int32, y (tokens, width), ends (slices) int32: where the slices end, the last one at width. An adapter of a
// smaller rank is filled up with zeros in down and up. Tokens with a slot outside the bank (-1) keep y's bits. out may be y.
#include "multi_lora_phase.h"

extern "C" __global__ __aicore__ void multi_lora(GM_ADDR x, GM_ADDR down, GM_ADDR up, GM_ADDR scale, GM_ADDR slots, GM_ADDR y,
                                                 GM_ADDR ends, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with the hardware's SyncAll
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::MultiLora<DTYPE_X> lora;
    lora.Init(&pipe, data, AscendC::GetUserWorkspace(workspace));
    lora.SetTensors(x, down, up, scale, slots, y, ends, out);
    uint32_t turn = 0;
    for (uint32_t from = 0; from < lora.tokens_; from += lora.window_) {
        lora.Plan(from, colora::Smaller(lora.window_, lora.tokens_ - from));
        lora.CopyOthers();
        if (lora.Nothing()) continue;
        lora.Shrink(turn);
        lora.Prefetch();
        AscendC::SyncAll();
        lora.Expand(turn);
        turn = 1 - turn;
    }
    lora.End();
}
