// Host side tiling of w4_lora: which input says what. The arithmetic is in w4_lora_tiling_core.h.
#include "w4_lora_tiling.h"

#include "tiling_glue.h"
#include "w4_lora_tiling_core.h"

namespace optiling {

static ge::graphStatus W4LoraTiling(gert::TilingContext* context) {
    const uint32_t cores = VectorCores(context);
    const auto& x = InputShape(context, 0);
    const auto& scale = InputShape(context, 2);
    const auto& down = InputShape(context, 3);
    const ge::DataType type = context->GetInputDesc(0)->GetDataType();
    const uint32_t groups = scale.GetDimNum() == 2 ? Size(scale, 1) : 1;
    const colora::W4LoraPlan plan =
        colora::plan_w4_lora(Size(x, 0), Size(x, 1), Size(down, 1), Size(InputShape(context, 1), 0), Size(down, 0), groups, cores,
                             ElementBytes(type), type == ge::DT_FLOAT16, Exact(context));
    if (!plan.error.empty()) return Refuse("W4Lora", plan.error);
    W4LoraTilingData tiling;
    SetLora(tiling, plan.data);
    tiling.set_groups(plan.data.groups);
    tiling.set_group(plan.data.group);
    tiling.set_columns(plan.data.columns);
    return Launch(context, tiling, cores, plan.workspace, true);
}

IMPL_OP_OPTILING(W4Lora).Tiling(W4LoraTiling);

}  // namespace optiling
