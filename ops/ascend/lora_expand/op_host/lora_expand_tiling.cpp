// Host side tiling of lora_expand: which input says what. The rest is in tiling_glue.h, the arithmetic in lora_tiling_core.h.
#include "lora_expand_tiling.h"

#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus LoraExpandTiling(gert::TilingContext* context) {
    const auto& h = InputShape(context, 0);
    const auto& up = InputShape(context, 1);
    LoraSizes sizes{Size(h, 0), 1, Size(h, 1), Size(up, 2), Size(InputShape(context, 3), 1), Size(up, 0)};  // reads no x
    sizes.exact = Exact(context);
    return LaunchLora<LoraExpandTilingData>("LoraExpand", context, sizes, 1, false);
}

IMPL_OP_OPTILING(LoraExpand).Tiling(LoraExpandTiling);

}  // namespace optiling
