// Small kernels with one planted bug each, on the line marked BUG: capacity, alignment, ranges, bounds, queues. What
// surrounds the bug is correct. The table is ops/emulator/planted_table.py.
#include "small.h"

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
    s.x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(in));
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
KERNEL(queue_depth) {
    Setup s(in, out, workspace, 2);
    LocalTensor<float> a = s.in.AllocTensor<float>(), b = s.in.AllocTensor<float>();
    DataCopy(a, s.x, 64);
    s.in.EnQue(a);
    DataCopy(b, s.x[64], 64);
    s.in.EnQue(b);  // BUG
    a = s.in.DeQue<float>();
    b = s.in.DeQue<float>();
    s.in.FreeTensor(a);
    s.in.FreeTensor(b);
}
KERNEL(event_ids) {
    Setup s(in, out, workspace);
    TQue<QuePosition::VECIN, 1> many;
    s.pipe.InitBuffer(many, 9, 32);
    for (int i = 0; i < 9; ++i) {
        LocalTensor<float> t = many.AllocTensor<float>();
        many.FreeTensor(t);  // BUG
    }
}
KERNEL(many_buffers) {
    Setup s(in, out, workspace);
    TQue<QuePosition::VECIN, 1> many;
    s.pipe.InitBuffer(many, 61, 32);  // BUG
}
KERNEL(init_twice) {
    Setup s(in, out, workspace);
    s.pipe.InitBuffer(s.in, 1, 4096);  // BUG
}
KERNEL(empty_queue) {
    Setup s(in, out, workspace);
    s.in.DeQue<float>();  // BUG
}
KERNEL(enqueue_twice) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopy(t, s.x, 64);
    s.in.EnQue(t);
    s.in.EnQue(t);  // BUG
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}
KERNEL(free_elsewhere) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    s.out.FreeTensor(t);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(free_while_queued) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopy(t, s.x, 64);
    s.in.EnQue(t);
    s.in.FreeTensor(t);  // BUG
}
KERNEL(never_allocated) {
    Setup s(in, out, workspace);
    LocalTensor<float> t;
    Duplicate(t, 0.0f, 8);  // BUG
}
KERNEL(padding_bytes) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopyPad(t, s.x, DataCopyExtParams(1, 32, 0, 0, 0), DataCopyPadExtParams<float>(true, 0, 9, 0.0f));  // BUG
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}
KERNEL(part_of_an_element) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.in.AllocTensor<float>();
    DataCopyPad(t, s.x, DataCopyExtParams(1, 30, 0, 0, 0), DataCopyPadExtParams<float>());  // BUG
    s.in.EnQue(t);
    t = s.in.DeQue<float>();
    s.in.FreeTensor(t);
}
KERNEL(select_mode) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    LocalTensor<uint8_t> bits = s.other.Get<uint8_t>();
    CompareScalar(bits, t, 1.0f, CMPMODE::GE, 64);
    PipeBarrier<PIPE_V>();
    Select(s.buffer.Get<float>(), bits, t, 0.0f, SELMODE::VSEL_TENSOR_TENSOR_MODE, 64);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(integers_compare_by_size) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    CompareScalar(s.buffer.Get<uint8_t>(), t.ReinterpretCast<int32_t>(), 1, CMPMODE::GE, 64);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(widening_mode) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Cast(s.buffer.Get<float>(), t.ReinterpretCast<half>(), RoundMode::CAST_RINT, 64);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(scratch_over_source) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    ReduceMax(s.buffer.Get<float>(), t, t, 256, false);  // BUG
    s.in.FreeTensor(t);
}
KERNEL(spread_in_place) {
    Setup s(in, out, workspace);
    LocalTensor<float> t = s.load();
    Brcb(t, t, 1, BrcbRepeatParams(1, 8));  // BUG
    s.in.FreeTensor(t);
}
