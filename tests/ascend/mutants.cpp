// Small kernels with one planted bug each, on the line marked BUG, and a few without any. Arguments: input and output of
// 4096 floats, a workspace of 4096 floats, tiling. What surrounds the bug is correct.
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
        x.SetGlobalBuffer(reinterpret_cast<float*>(a), 4096);
        y.SetGlobalBuffer(reinterpret_cast<float*>(b), 4096);
        w.SetGlobalBuffer(reinterpret_cast<float*>(c), 4096);
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

// ---- without a bug ------------------------------------------------------------------------------------------------
KERNEL(clean_copy) {
    Setup s(in, out, workspace);
    s.store(s.load());
}
KERNEL(clean_vector) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load(), a = s.buffer.Get<float>();
    Muls(a, t, 2.0f, 1024);
    PipeBarrier<PIPE_V>();
    Add(a, a, a, 1024);
    PipeBarrier<PIPE_V>();
    Add(t, a, t, 64, 16, {1, 1, 1, 8, 8, 8});
    PipeBarrier<PIPE_V>();
    s.store(t);
}
KERNEL(clean_double_buffer) {
    Setup s(in, out, workspace, 2);
    for (int i = 0; i < 5; ++i) {
        s.store(s.load());
        PipeBarrier<PIPE_MTE3>();
    }
}
KERNEL(clean_scalar) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    order<HardEvent::V_S>();
    order<HardEvent::MTE2_S>();
    const float first = t.GetValue(7);
    t.SetValue(0, first);
    order<HardEvent::S_V>();
    s.store(t);
}
KERNEL(clean_sync) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load(), o = s.out.AllocTensor<float>();
    Adds(o, t, 1.0f, 32);
    s.out.EnQue(o);
    o = s.out.DeQue<float>();
    DataCopy(s.w[GetBlockIdx() * 32], o, 32);
    s.out.FreeTensor(o);
    SyncAll();
    s.in.FreeTensor(t);
    t = s.in.AllocTensor<float>();
    DataCopy(t, s.w[(GetBlockIdx() + 1) % 4 * 32], 32);
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    o = s.out.AllocTensor<float>();
    Adds(o, t, 1.0f, 32);
    s.in.FreeTensor(t);
    s.out.EnQue(o);
    o = s.out.DeQue<float>();
    DataCopy(s.y[GetBlockIdx() * 32], o, 32);
    s.out.FreeTensor(o);
}
KERNEL(clean_atomic) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load(), o = s.out.AllocTensor<float>();
    Adds(o, t, 1.0f, 32);
    s.in.FreeTensor(t);
    s.out.EnQue(o);
    o = s.out.DeQue<float>();
    SetAtomicAdd<float>();
    DataCopy(s.y[0], o, 32);
    SetAtomicNone();
    s.out.FreeTensor(o);
}

KERNEL(clean_nibbles) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load(), wide = s.other.Get<float>();
    const LocalTensor<int16_t> pairs = t.ReinterpretCast<int16_t>(), bits = s.other.Get<int16_t>();
    const LocalTensor<half> values = s.buffer.Get<half>();
    Duplicate(bits, int16_t(0x0f0f), 128);
    PipeBarrier<PIPE_V>();
    And(pairs, pairs, bits, 128, 4, {1, 1, 1, 8, 8, 0});
    PipeBarrier<PIPE_V>();
    Or(pairs, pairs, bits, 128, 4, {1, 1, 1, 8, 8, 0});
    PipeBarrier<PIPE_V>();
    Cast(values, pairs.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, 2048);
    PipeBarrier<PIPE_V>();
    Cast(wide, values, RoundMode::CAST_NONE, 1024);
    PipeBarrier<PIPE_V>();
    Muls(t, wide, 1.0f, 1024);
    PipeBarrier<PIPE_V>();
    s.store(t);
}

// ---- capacity, alignment, ranges, bounds ----------------------------------------------------------------------------
KERNEL(capacity) {
    Setup s(in, out, workspace);
    TBuf<QuePosition::VECCALC> large;
    s.pipe.InitBuffer(large, 170000);  // BUG
}
KERNEL(misaligned) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Muls(t[3], t[3], 2.0f, 8);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(cut_copy) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopy(t, s.x, 13);  // BUG
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}
KERNEL(repeat_256) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Add(t, t, t, 64, 256, {1, 1, 1, 0, 0, 0});  // BUG
    s.in.FreeTensor(t);
}
KERNEL(mask_65) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Add(t, t, t, 65, 1, {1, 1, 1, 8, 8, 8});  // BUG
    s.in.FreeTensor(t);
}
KERNEL(negative_count) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Add(t, t, t, -1);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(block_count) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopyPad(t, s.x, DataCopyExtParams(4096, 0, 0, 0, 0), DataCopyPadExtParams<float>());  // BUG
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}
KERNEL(compare_tail) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    CompareScalar(s.buffer.Get<uint8_t>(), t, 1.0f, CMPMODE::GE, 100);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(odd_nibbles) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Cast(s.buffer.Get<half>(), t.ReinterpretCast<uint8_t>().ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, 33);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(nibble_rounding) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Cast(s.buffer.Get<half>(), t.ReinterpretCast<int4b_t>(), RoundMode::CAST_RINT, 64);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(nibbles_past_buffer) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Cast(s.buffer.Get<half>(), t.ReinterpretCast<int4b_t>()[8128], RoundMode::CAST_NONE, 130);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(nibbles_in_place) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Cast(t.ReinterpretCast<half>(), t.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, 64);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(one_block_written) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Add(s.buffer.Get<float>(), t, t, 64, 1, {0, 1, 1, 8, 8, 8});  // BUG
    s.in.FreeTensor(t);
}
KERNEL(rounding_mode) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Cast(s.buffer.Get<bfloat16_t>(), t, RoundMode::CAST_NONE, 64);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(past_buffer) {
    Setup s(in, out, workspace);
    Duplicate(s.buffer.Get<float>()[1024], 0.0f, 1025);  // BUG
}
KERNEL(past_tensor) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopy(t, s.x[4000], 128);  // BUG
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}
KERNEL(past_argument) {
    Setup s(in, out, workspace);
    s.x.SetGlobalBuffer(reinterpret_cast<float*>(in));
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopy(t, s.x[4000], 128);  // BUG
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}
KERNEL(write_input) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load(), o = s.out.AllocTensor<float>();
    Adds(o, t, 1.0f, 1024);
    s.in.FreeTensor(t);
    s.out.EnQue(o);
    o = s.out.DeQue<float>();
    DataCopy(s.x[GetBlockIdx() * 1024], o, 1024);  // BUG
    s.out.FreeTensor(o);
}
KERNEL(never_written) {
    Setup s(in, out, workspace);
    Muls(s.other.Get<float>(), s.buffer.Get<float>(), 1.0f, 64);  // BUG
}
KERNEL(workspace_unwritten) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopy(t, s.w, 64);  // BUG
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}

// ---- queues ---------------------------------------------------------------------------------------------------------
KERNEL(no_enqueue) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();  // BUG
    DataCopy(t, s.x, 64);
    Muls(s.buffer.Get<float>(), t, 1.0f, 64);  // BUG
}
KERNEL(no_free) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();  // BUG
    DataCopy(t, s.x, 64);
    s.in.EnQue(t);
    s.in.DeQue<float>();
}
KERNEL(free_twice) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    s.in.FreeTensor(t);
    s.in.FreeTensor(t);  // BUG
}
KERNEL(use_after_free) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    s.in.FreeTensor(t);
    Muls(s.buffer.Get<float>(), t, 1.0f, 64);  // BUG
}
KERNEL(alloc_twice) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    s.in.AllocTensor<float>();  // BUG
    s.in.FreeTensor(t);
}

// ---- hazards ----------------------------------------------------------------------------------------------------------
KERNEL(raw_v_mte2) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    DataCopy(a, s.x, 64);
    Muls(s.other.Get<float>(), a, 1.0f, 64);  // BUG
}
KERNEL(raw_mte3_v) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 1.0f, 64);
    DataCopy(s.y[GetBlockIdx() * 64], a, 64);  // BUG
}
KERNEL(war_mte2_v) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    DataCopy(a, s.x, 64);
    order<HardEvent::MTE2_V>();
    Muls(s.other.Get<float>(), a, 1.0f, 64);
    PipeBarrier<PIPE_MTE2>();
    DataCopy(a, s.x, 64);  // BUG
}
KERNEL(waw_v_mte2) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 0.0f, 64);
    DataCopy(a, s.x, 64);  // BUG
}
KERNEL(raw_v_v) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 1.0f, 64);
    Muls(s.other.Get<float>(), a, 1.0f, 64);  // BUG
}
KERNEL(raw_s_v) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 1.0f, 64);
    a.GetValue(0);  // BUG
}
KERNEL(raw_v_s) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    for (int i = 0; i < 8; ++i) a.SetValue(i, 1.0f);
    Muls(s.other.Get<float>(), a, 1.0f, 8);  // BUG
}
KERNEL(war_v_s) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 1.0f, 64);
    order<HardEvent::V_S>();
    a.GetValue(0);
    Duplicate(a, 1.0f, 64);  // BUG
}
KERNEL(gm_raw) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 1.0f, 64);
    order<HardEvent::V_MTE3>();
    DataCopy(s.y[GetBlockIdx() * 64], a, 64);
    DataCopy(s.other.Get<float>(), s.y[GetBlockIdx() * 64], 64);  // BUG
}
KERNEL(partial_overlap) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Muls(t[8], t, 2.0f, 64);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(repeat_overlap) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    MulAddDst(t, t[512], t[768], 64, 4, {1, 1, 1, 0, 8, 8});  // BUG
    s.in.FreeTensor(t);
}

// ---- flags, barriers --------------------------------------------------------------------------------------------------
KERNEL(set_without_wait) {
    SetFlag<HardEvent::V_S>(0);  // BUG
}
KERNEL(wait_without_set) {
    WaitFlag<HardEvent::V_S>(0);  // BUG
}
KERNEL(set_twice) {
    SetFlag<HardEvent::V_S>(1);
    SetFlag<HardEvent::V_S>(1);  // BUG
    WaitFlag<HardEvent::V_S>(1);
}
KERNEL(event_id) {
    SetFlag<HardEvent::V_S>(8);  // BUG
}
KERNEL(system_event) {
    SetFlag<HardEvent::V_S>(6);  // BUG
    WaitFlag<HardEvent::V_S>(6);  // BUG
}
KERNEL(barrier_s) {
    PipeBarrier<PIPE_S>();  // BUG
}

// ---- between cores ----------------------------------------------------------------------------------------------------
static void give(Setup& s, GlobalTensor<float> target) {
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, float(GetBlockIdx() + 1), 32);
    order<HardEvent::V_MTE3>();
    DataCopy(target, a, 32);
}
KERNEL(race_write_read) {
    Setup s(in, out, workspace);
    s.w.SetGlobalBuffer(reinterpret_cast<float*>(out) + 1024, 1024);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 1.0f, 32);
    order<HardEvent::V_MTE3>();
    DataCopy(s.w[GetBlockIdx() * 32], a, 32);  // BUG (seen here when block 0 came first)
    PipeBarrier<PIPE_ALL>();
    if (GetBlockIdx() == 0) {
        LocalTensor<float> b = s.other.Get<float>();
        DataCopy(b, s.w, 128);  // BUG
        order<HardEvent::MTE2_V>();
        for (int i = 1; i < 4; ++i) {
            Add(b, b, b[i * 32], 32);
            PipeBarrier<PIPE_V>();
        }
        order<HardEvent::V_MTE3>();
        DataCopy(s.y, b, 32);
    }
}
KERNEL(race_write_write) {
    Setup s(in, out, workspace);
    LocalTensor<float> a = s.buffer.Get<float>();
    Duplicate(a, 1.0f, 32);
    order<HardEvent::V_MTE3>();
    DataCopy(s.y, a, 32);  // BUG
}
KERNEL(race_read_write) {
    Setup s(in, out, workspace);
    give(s, s.w[GetBlockIdx() * 32]);
    SyncAll();
    DataCopy(s.other.Get<float>(), s.w, 128);
    PipeBarrier<PIPE_ALL>();
    LocalTensor<float> a = s.buffer.Get<float>();
    DataCopy(s.w[GetBlockIdx() * 32], a, 32);  // BUG
    LocalTensor<float> b = s.other.Get<float>()[1024];
    DataCopy(b, s.w[128 - 32 * GetBlockIdx()], 0);
}
KERNEL(stale_scalar) {
    Setup s(in, out, workspace);
    give(s, s.w[GetBlockIdx() * 32]);
    SyncAll();
    s.w.GetValue((GetBlockIdx() + 1) % 4 * 32);  // BUG
}
KERNEL(sync_missing_block) {
    if (GetBlockIdx() != 2) SyncAll();  // BUG
}
