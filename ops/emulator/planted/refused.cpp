// Calls that the public headers refuse, each on a line of its own with its name. None may compile; the table is
// ops/emulator/planted_table.py. What the headers take is in accepted.cpp.
#include "kernel_operator.h"

using namespace AscendC;

struct Operands {
    TPipe pipe;
    TQue<QuePosition::VECIN, 1> in;
    TBuf<QuePosition::VECCALC> buffer;
    LocalTensor<float> f, g;
    LocalTensor<half> h;
    LocalTensor<bfloat16_t> b;
    LocalTensor<int32_t> i;
    LocalTensor<int8_t> c;
    LocalTensor<uint8_t> u;
    GlobalTensor<float> gm;
};
const BinaryRepeatParams binary;

// ---- queues and buffers
void refused(Operands& o, const LocalTensor<float>& constant) { o.in.FreeTensor(constant); }  // REFUSED free_const
void refused_1(Operands& o) { o.in.FreeTensor(o.in.DeQue<float>()); }  // REFUSED free_returned
void refused_2(const TBuf<QuePosition::VECCALC>& buffer) { buffer.Get<float>(); }  // REFUSED const_buffer
void refused_3(const TQue<QuePosition::VECIN, 1>& queue) { queue.AllocTensor<float>(); }  // REFUSED const_queue
void refused_4(Operands& o) { o.in.AllocTensor(); }  // REFUSED alloc_without_type
void refused_5(Operands& o) { o.pipe.InitBuffer(o.buffer, 2, 32); }  // REFUSED numbered_buffer
// ---- names of the compiler
void refused_6() { uint32_t half = 2; (void)half; }  // REFUSED variable_half
void refused_7() { int64_t block_idx = 0; (void)block_idx; }  // REFUSED variable_block_idx
void refused_8() { int64_t block_num = 0; (void)block_num; }  // REFUSED variable_block_num
// ---- types of scalars and of numbers that name something
void refused_9(Operands& o) { Muls(o.f, o.g, 2, 64); }  // REFUSED scalar_of_another_type
void refused_10(Operands& o) { Adds(o.h, o.h, 1.0f, 64); }  // REFUSED float_beside_half
void refused_11(Operands& o) { Duplicate(o.h, 0.0f, 64); }  // REFUSED duplicate_of_another_type
void refused_12(Operands& o) { Axpy(o.f, o.h, 2.0f, 64); }  // REFUSED axpy_scalar_of_another_type
void refused_13(Operands& o) { CompareScalar(o.u, o.f, 1, CMPMODE::GE, 64); }  // REFUSED compare_scalar_of_another_type
void refused_15() { PipeBarrier<1>(); }  // REFUSED numbered_pipe
void refused_16() { SetFlag<8>(0); }  // REFUSED numbered_event
void refused_17(Operands& o) { Cast(o.f, o.h, 0, 64); }  // REFUSED numbered_rounding
// ---- types of elements that an instruction does not take on Atlas A2/A3
void refused_18(Operands& o) { Muls(o.b, o.b, bfloat16_t(2), 64); }  // REFUSED muls_bfloat16
void refused_19(Operands& o) { Add(o.b, o.b, o.b, 64); }  // REFUSED add_bfloat16
void refused_20(Operands& o) { Add(o.c, o.c, o.c, 64); }  // REFUSED add_int8
void refused_21(Operands& o) { And(o.f, o.f, o.f, 64, 1, binary); }  // REFUSED and_float
void refused_22(Operands& o) { Abs(o.i, o.i, 64); }  // REFUSED abs_int32
void refused_23(Operands& o) { Div(o.i, o.i, o.i, 64); }  // REFUSED div_int32
void refused_24(Operands& o) { Axpy(o.b, o.b, bfloat16_t(2), 64); }  // REFUSED axpy_bfloat16
void refused_25(Operands& o) { MulAddDst(o.h, o.f, o.f, 64); }  // REFUSED mul_add_into_half
void refused_26(Operands& o) { Cast(o.h, o.b, RoundMode::CAST_RINT, 64); }  // REFUSED bfloat16_to_half
void refused_27(Operands& o) { Cast(o.f, o.c, RoundMode::CAST_NONE, 64); }  // REFUSED int8_to_float
void refused_28(Operands& o) { Duplicate(o.c, int8_t(0), 64); }  // REFUSED duplicate_int8
void refused_29(Operands& o) { Brcb(o.c, o.c, 1, BrcbRepeatParams(1, 8)); }  // REFUSED brcb_int8
void refused_30(Operands& o) { Compare(o.i, o.f, o.g, CMPMODE::GE, 64); }  // REFUSED compare_into_int32
void refused_31(Operands& o) { CompareScalar(o.c, o.f, 1.0f, CMPMODE::GE, 64); }  // REFUSED compare_scalar_into_int8
void refused_32(Operands& o) { Select(o.i, o.u, o.i, 0, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64); }  // REFUSED select_int32
void refused_33(Operands& o) { ReduceMax(o.i, o.i, o.i, 64); }  // REFUSED largest_int32
void refused_34(Operands& o) { BlockReduceSum(o.b, o.b, 1, 64, 1, 1, 8); }  // REFUSED block_sum_bfloat16
// ---- tensors of two types, pointers
void refused_35(Operands& o) { DataCopy(o.h, o.gm, 64); }  // REFUSED copy_into_another_type
void refused_36(Operands& o) { Add(o.f, o.f, o.h, 64); }  // REFUSED add_two_types
void refused_37(Operands& o, GM_ADDR p) { o.gm.SetGlobalBuffer(p, 64); }  // REFUSED bytes_as_float
void refused_38(Operands& o) { LocalTensor<half> t = o.f; (void)t; }  // REFUSED tensor_of_another_type
// ---- structs of parameters: all values or none, and none that is cut
DataCopyExtParams refused_39() { return DataCopyExtParams(1, 32, 0); }  // REFUSED some_copy_parameters
DataCopyPadExtParams<float> refused_40() { return DataCopyPadExtParams<float>(true, 0); }  // REFUSED some_pad_parameters
BinaryRepeatParams refused_41() { return {1, 1, 1}; }  // REFUSED some_repeat_parameters
BinaryRepeatParams refused_42(uint32_t n) { return {1, 1, 1, 8, n, 8}; }  // REFUSED cut_repeat_parameter
BrcbRepeatParams refused_43() { return BrcbRepeatParams(1); }  // REFUSED some_brcb_parameters
