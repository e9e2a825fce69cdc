// y[t, offset:offset+width] += scale[s] * h[t] . (sum over e of weights[t, e] * up[s, e]), s = slots[t].
// h (tokens, rank) float32, weights (tokens, experts) float32: the router's; up (slots, experts, rank, width), scale (slots)
// float32, slots (tokens) int32, y (tokens, row width). Tokens with a slot outside the bank (-1) keep y's bits. out may be
// y itself. Lily, arXiv 2407.09946.
#include "lily_phase.h"

extern "C" __global__ __aicore__ void lily_mix(GM_ADDR h, GM_ADDR weights, GM_ADDR up, GM_ADDR scale, GM_ADDR slots, GM_ADDR y,
                                               GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);  // the cores never meet
    GET_TILING_DATA(data, tiling);
    AscendC::TPipe pipe;
    colora::LilyPhases<DTYPE_UP> lily;
    lily.Init(&pipe, data, AscendC::GetUserWorkspace(workspace));
    lily.SetScale(scale);
    lily.SetExperts(h, weights, up, y, out);
    AscendC::GlobalTensor<int32_t> slotGm;
    slotGm.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots), lily.tokens_);
    colora::Groups groups;
    for (uint32_t from = 0; from < lily.tokens_; from += lily.window_) {
        const uint32_t n = colora::Smaller(lily.window_, lily.tokens_ - from);
        lily.Sort(groups, slotGm, from, n);
        lily.CopyThrough(from, n, colora::UsedBy(groups, from));
        if (groups.tokens) lily.Mix(groups);
    }
}
