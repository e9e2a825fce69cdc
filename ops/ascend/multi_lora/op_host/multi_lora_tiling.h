// Tiling data of multi_lora as CANN wants it: the fields of multi_lora_tiling_core.h, in that order.
#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(MultiLoraTilingData)
TILING_DATA_FIELD_DEF(uint32_t, tokens);
TILING_DATA_FIELD_DEF(uint32_t, hidden);
TILING_DATA_FIELD_DEF(uint32_t, rank);
TILING_DATA_FIELD_DEF(uint32_t, slices);
TILING_DATA_FIELD_DEF(uint32_t, width);
TILING_DATA_FIELD_DEF(uint32_t, slots);
TILING_DATA_FIELD_DEF(uint32_t, cores);
TILING_DATA_FIELD_DEF(uint32_t, window);
TILING_DATA_FIELD_DEF(uint32_t, unitIn);
TILING_DATA_FIELD_DEF(uint32_t, unitOut);
TILING_DATA_FIELD_DEF(uint32_t, most);
TILING_DATA_FIELD_DEF(uint32_t, balance);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(MultiLora, MultiLoraTilingData)

}  // namespace optiling
