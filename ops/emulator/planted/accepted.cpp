// One call of each function and type that the kernels use, in the form that the public headers declare. All must compile;
// the names after API are those of the table in ops/emulator/README.md. What must not compile is in refused.cpp.
#include "kernel_operator.h"

using namespace AscendC;

struct Tensors {
    LocalTensor<float> f, g;
    LocalTensor<half> h;
    LocalTensor<bfloat16_t> b;
    LocalTensor<int16_t> s;
    LocalTensor<int32_t> i;
    LocalTensor<int8_t> c;
    LocalTensor<uint8_t> u;
    GlobalTensor<float> gm;
};

void accepted(GM_ADDR p, const GlobalTensor<float>& constant) {
    GlobalTensor<float> gm;
    gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(p), 64);  // API GlobalTensor::SetGlobalBuffer
    gm.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(p));
    const float value = constant.GetValue(0);                    // API GlobalTensor::GetValue
    const GlobalTensor<float> part = constant[8];                // API GlobalTensor::operator[]
    (void)value, (void)part;
}
void accepted_local(const LocalTensor<float>& constant) {
    const LocalTensor<float> part = constant[8];                          // API LocalTensor::operator[]
    const LocalTensor<half> other = constant.ReinterpretCast<half>();     // API LocalTensor::ReinterpretCast
    constant.SetValue(0, constant.GetValue(1));                           // API LocalTensor::GetValue, LocalTensor::SetValue
    constant.ReinterpretCast<int32_t>().SetValue(0, 1);
    other.SetValue(0, 1.0f);
    (void)part;
}
void accepted_queues() {
    TPipe pipe;                                              // API TPipe
    TQue<QuePosition::VECIN, 1> in;                          // API TQue
    TQueBind<QuePosition::VECIN, QuePosition::VECOUT, 2> through;  // API TQueBind
    TBuf<QuePosition::VECCALC> buffer;                       // API TBuf
    const bool first = pipe.InitBuffer(in, 2, 32), second = pipe.InitBuffer(buffer, 32);  // API TPipe::InitBuffer
    pipe.InitBuffer(through, 2, 32);
    LocalTensor<float> t = in.AllocTensor<float>();          // API TQueBind::AllocTensor
    const bool queued = in.EnQue(t);                         // API TQueBind::EnQue
    t = in.DeQue<float>();                                   // API TQueBind::DeQue
    in.FreeTensor(t);                                        // API TQueBind::FreeTensor
    const LocalTensor<half> whole = buffer.Get<half>(), some = buffer.Get<half>(8);  // API TBuf::Get
    const TEventID id = pipe.FetchEventID(HardEvent::V_S);   // API TPipe::FetchEventID
    SetFlag<HardEvent::V_S>(id);                             // API SetFlag
    WaitFlag<HardEvent::V_S>(id);                            // API WaitFlag
    PipeBarrier<PIPE_V>();                                   // API PipeBarrier
    SyncAll();                                               // API SyncAll
    const int64_t where = GetBlockIdx();                     // API GetBlockIdx
    (void)first, (void)second, (void)queued, (void)where, (void)whole, (void)some;
}
void accepted_copies(Tensors& o) {
    const DataCopyPadExtParams<float> pad(true, 0, 1, 0.0f), none;           // API DataCopyPadExtParams
    DataCopyPad(o.f, o.gm, DataCopyExtParams(1, 28, 0, 0, 0), pad);          // API DataCopyPad, DataCopyExtParams
    DataCopyPad(o.gm, o.f, DataCopyExtParams(1, 28, 0, 0, 0));
    DataCopyPad(o.gm, o.f, DataCopyExtParams());
    DataCopy(o.f, o.gm, 64);                                                 // API DataCopy
    DataCopy(o.gm, o.f, 64);
    (void)none;
}
void accepted_arithmetic(Tensors& o, uint32_t n) {
    const BinaryRepeatParams strides{1, 1, 1, 8, static_cast<uint8_t>(n / 8), 0};  // API BinaryRepeatParams
    Add(o.f, o.f, o.g, static_cast<int32_t>(n));                              // API Add
    Sub(o.s, o.s, o.s, static_cast<uint64_t>(128), static_cast<uint8_t>(1), strides);  // API Sub
    Mul(o.f, o.f, o.g, static_cast<uint64_t>(64), static_cast<uint8_t>(n), strides);   // API Mul
    And(o.s, o.s, o.s, static_cast<uint64_t>(128), static_cast<uint8_t>(1), strides);  // API And
    Or(o.s, o.s, o.s, static_cast<uint64_t>(128), static_cast<uint8_t>(1), strides);   // API Or
    Muls(o.f, o.g, 2.0f, static_cast<int32_t>(n));                            // API Muls
    Muls<float>(o.f, o.g, 2, 64);
    Adds(o.i, o.i, 2, 64);                                                    // API Adds
    MulAddDst(o.f, o.h, o.h, static_cast<uint64_t>(64), static_cast<uint8_t>(n), strides);  // API MulAddDst
    Axpy(o.f, o.h, static_cast<half>(2.0f), static_cast<int32_t>(n));         // API Axpy
    Axpy(o.f, o.g, 2.0f, 64);
    Abs(o.f, o.g, static_cast<int32_t>(n));                                   // API Abs
    Cast(o.f, o.b, RoundMode::CAST_NONE, n);                                  // API Cast
    Cast(o.b, o.f, RoundMode::CAST_RINT, n);
    Cast(o.h, o.c.ReinterpretCast<int4b_t>(), RoundMode::CAST_NONE, n);
    Duplicate(o.h, static_cast<half>(0.0f), static_cast<int32_t>(n));         // API Duplicate
    Brcb(o.f, o.g, static_cast<uint8_t>(n), BrcbRepeatParams{1, 8});          // API Brcb, BrcbRepeatParams
    BlockReduceSum(o.f, o.g, static_cast<int32_t>(n), 64, 1, 1, 8);           // API BlockReduceSum
    WholeReduceSum(o.f, o.g, 64, static_cast<int32_t>(n), 1, 1, 8);           // API WholeReduceSum
    ReduceMax(o.f, o.g, o.f, static_cast<int32_t>(n), true);                  // API ReduceMax
    CompareScalar(o.u, o.f, 1.0f, CMPMODE::GE, n);                            // API CompareScalar
    Compare(o.u, o.f, o.g, CMPMODE::GE, n);                                   // API Compare
    Select(o.f, o.u, o.g, 0.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, n);         // API Select
}
