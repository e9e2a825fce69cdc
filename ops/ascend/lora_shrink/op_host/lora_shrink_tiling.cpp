// Host side tiling of lora_shrink: which input says what. The rest is in tiling_glue.h, the arithmetic in lora_tiling_core.h.
#include "lora_shrink_tiling.h"

#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus LoraShrinkTiling(gert::TilingContext* context) {
    const auto& x = InputShape(context, 0);
    const auto& down = InputShape(context, 1);
    const LoraSizes sizes{Size(x, 0), Size(x, 1), Size(down, 1), 1, 1, Size(down, 0)};  // writes no y
    return LaunchLora<LoraShrinkTilingData>("LoraShrink", context, sizes, 0, true);
}

IMPL_OP_OPTILING(LoraShrink).Tiling(LoraShrinkTiling);

}  // namespace optiling
