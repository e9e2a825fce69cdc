// Host side tiling of multi_lora: which input says what. The rest is in tiling_glue.h, the arithmetic in lora_tiling_core.h.
#include "multi_lora_tiling.h"

#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus MultiLoraTiling(gert::TilingContext* context) {
    const auto& x = InputShape(context, 0);
    const auto& down = InputShape(context, 1);
    const auto& up = InputShape(context, 2);
    const auto& y = InputShape(context, 5);
    LoraSizes sizes{Size(x, 0), Size(x, 1), Size(down, 1), Size(up, 2), Size(y, 1), Size(down, 0)};
    sizes.exact = Exact(context);
    return LaunchLora<MultiLoraTilingData>("MultiLora", context, sizes, 0, true);
}

IMPL_OP_OPTILING(MultiLora).Tiling(MultiLoraTiling);

}  // namespace optiling
