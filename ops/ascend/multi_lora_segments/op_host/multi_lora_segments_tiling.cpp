// Host side tiling of multi_lora_segments: which input says what. The rest is in tiling_glue.h, the arithmetic in lora_tiling_core.h.
#include "multi_lora_segments_tiling.h"

#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus MultiLoraSegmentsTiling(gert::TilingContext* context) {
    const auto& x = InputShape(context, 0);
    const auto& down = InputShape(context, 1);
    const auto& up = InputShape(context, 2);
    const auto& y = InputShape(context, 6);
    LoraSizes sizes{Size(x, 0), Size(x, 1), Size(down, 1), Size(up, 2), Size(y, 1), Size(down, 0)};
    sizes.segments = Size(InputShape(context, 5), 0);
    sizes.exact = Exact(context);
    return LaunchLora<MultiLoraSegmentsTilingData>("MultiLoraSegments", context, sizes, 0, true);
}

IMPL_OP_OPTILING(MultiLoraSegments).Tiling(MultiLoraSegmentsTiling);

}  // namespace optiling
