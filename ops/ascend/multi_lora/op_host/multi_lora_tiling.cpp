// Host side tiling of multi_lora: shapes in, plan out. The arithmetic is in multi_lora_tiling_core.h.
#include "multi_lora_tiling.h"

#include "multi_lora_tiling_core.h"
#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus MultiLoraTiling(gert::TilingContext* context) {
    const uint32_t cores = VectorCores(context);
    const auto& x = InputShape(context, 0);
    const auto& down = InputShape(context, 1);
    const auto& up = InputShape(context, 2);
    const uint32_t bytes = ElementBytes(context->GetInputDesc(0)->GetDataType());
    const colora::MultiLoraPlan plan = colora::plan_multi_lora(Size(x, 0), Size(x, 1), Size(down, 1), Size(up, 1), Size(up, 2), Size(down, 0),
                                                              Size(InputShape(context, 6), 0), cores, bytes);
    if (!plan.error.empty()) return Refuse("MultiLora", plan.error);
    MultiLoraTilingData tiling;
    tiling.set_tokens(plan.data.tokens);
    tiling.set_hidden(plan.data.hidden);
    tiling.set_rank(plan.data.rank);
    tiling.set_slices(plan.data.slices);
    tiling.set_width(plan.data.width);
    tiling.set_slots(plan.data.slots);
    tiling.set_cores(plan.data.cores);
    tiling.set_window(plan.data.window);
    tiling.set_unitIn(plan.data.unitIn);
    tiling.set_unitOut(plan.data.unitOut);
    tiling.set_most(plan.data.most);
    tiling.set_balance(plan.data.balance);
    return Launch(context, tiling, cores, plan.workspace, true);
}

IMPL_OP_OPTILING(MultiLora).Tiling(MultiLoraTiling);

}  // namespace optiling
