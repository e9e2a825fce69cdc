// What is done with a weight in any of its formats; compiled once a format, in products_*.cpp.
#pragma once

#include "gemm.h"
#include "weights.h"

namespace COLORA_ISA_NAMESPACE {

// Outputs [o0, o1) of few rows; see dense_few_rows. The rows of x are rearranged where the weight is nibbles.
void few_rows(const Weight& w, int64_t columns, int64_t block, const float* bias, const Rows& rows, int64_t o0,
              int64_t o1);

// Dequantises the rows [o0, o1) into tiles of kOuts packed rows, `vectors` vectors each; missing rows become zeros.
void make_panel(const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t vectors);

// The columns [k0, k1) of row o as they are counted, float32.
void read_columns(const Weight& w, int64_t o, int64_t k0, int64_t k1, float* to);

// The same of formats that are blocks of a GGUF file.
void few_rows_of_blocks(const Weight& w, int64_t columns, int64_t block, const float* bias, const Rows& rows, int64_t o0,
                        int64_t o1);
void unpack_blocks(const Weight& w, int64_t o0, int64_t o1, float* panel, int64_t vectors);
void read_block_columns(const Weight& w, int64_t o, int64_t k0, int64_t k1, float* to);

}  // namespace COLORA_ISA_NAMESPACE
