// What the small kernels share: input and output of 4096 floats, a workspace of 4096 floats, tiling; load and store.
#pragma once
#include "kernel_operator.h"

#define KERNEL(name) \
    extern "C" __global__ __aicore__ void name(GM_ADDR in, GM_ADDR out, GM_ADDR workspace, GM_ADDR tiling)

using namespace AscendC;

namespace {

struct Setup {
    TPipe pipe;
    TQue<QuePosition::VECIN, 1> in;
    TQue<QuePosition::VECOUT, 1> out;
    TBuf<QuePosition::VECCALC> buffer, other;
    GlobalTensor<float> x, y, w;
    Setup(GM_ADDR a, GM_ADDR b, GM_ADDR c, int number = 1) {
        x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a), 4096);
        y.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(b), 4096);
        w.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(c), 4096);
        pipe.InitBuffer(in, number, 4096);
        pipe.InitBuffer(out, number, 4096);
        pipe.InitBuffer(buffer, 8192);
        pipe.InitBuffer(other, 8192);
    }
    LocalTensor<float> load(uint32_t at = 0) {
        LocalTensor<float> t = in.AllocTensor<float>();
        DataCopy(t, x[at], 1024);
        in.EnQue(t);
        return in.DeQue<float>();
    }
    // Writes t + 1 at block's own place and frees t.
    void store(LocalTensor<float> t) {
        LocalTensor<float> o = out.AllocTensor<float>();
        Adds(o, t, 1.0f, 1024);
        in.FreeTensor(t);
        out.EnQue(o);
        o = out.DeQue<float>();
        DataCopy(y[uint64_t(GetBlockIdx()) * 1024], o, 1024);
        out.FreeTensor(o);
    }
};
template <HardEvent e>
void order() {
    SetFlag<e>(0);
    WaitFlag<e>(0);
}

}  // namespace

