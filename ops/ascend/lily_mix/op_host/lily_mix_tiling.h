// Tiling data of lily_mix as CANN wants it: the fields of lily_mix_tiling_core.h, in that order.
#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(LilyMixTilingData)
TILING_DATA_FIELD_DEF(uint32_t, tokens);
TILING_DATA_FIELD_DEF(uint32_t, hidden);
TILING_DATA_FIELD_DEF(uint32_t, rank);
TILING_DATA_FIELD_DEF(uint32_t, width);
TILING_DATA_FIELD_DEF(uint32_t, rowWidth);
TILING_DATA_FIELD_DEF(uint32_t, offset);
TILING_DATA_FIELD_DEF(uint32_t, slots);
TILING_DATA_FIELD_DEF(uint32_t, cores);
TILING_DATA_FIELD_DEF(uint32_t, window);
TILING_DATA_FIELD_DEF(uint32_t, unitIn);
TILING_DATA_FIELD_DEF(uint32_t, unitOut);
TILING_DATA_FIELD_DEF(uint32_t, exact);
TILING_DATA_FIELD_DEF(uint32_t, experts);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(LilyMix, LilyMixTilingData)

}  // namespace optiling
