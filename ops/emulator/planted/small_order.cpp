// Small kernels with one planted bug each, on the line marked BUG: hazards, flags, barriers, several cores; and kernels
// without any. What surrounds the bug is correct. The table is ops/emulator/planted_table.py.
#include "small.h"

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
    s.w.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(out) + 1024, 1024);
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
KERNEL(sync_of_some_cores) {
    SyncAll();  // BUG
}
KERNEL(sync_in_turns) {
    SyncAll();  // BUG
}
