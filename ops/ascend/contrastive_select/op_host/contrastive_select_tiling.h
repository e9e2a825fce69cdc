// Tiling data of contrastive_select as CANN wants it: the fields of contrastive_select_tiling_core.h, in that order.
#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(ContrastiveSelectTilingData)
TILING_DATA_FIELD_DEF(uint32_t, rows);
TILING_DATA_FIELD_DEF(uint32_t, vocab);
TILING_DATA_FIELD_DEF(uint32_t, requests);
TILING_DATA_FIELD_DEF(uint32_t, voices);
TILING_DATA_FIELD_DEF(uint32_t, cores);
TILING_DATA_FIELD_DEF(uint32_t, parts);
TILING_DATA_FIELD_DEF(uint32_t, width);
TILING_DATA_FIELD_DEF(uint32_t, resident);
END_TILING_DATA_DEF;

REGISTER_TILING_DATA_CLASS(ContrastiveSelect, ContrastiveSelectTilingData)

}  // namespace optiling
