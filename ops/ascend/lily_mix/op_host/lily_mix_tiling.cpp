// Host side tiling of lily_mix: which input says what. The arithmetic is in lily_mix_tiling_core.h.
#include "lily_mix_tiling.h"

#include "lily_mix_tiling_core.h"
#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus LilyMixTiling(gert::TilingContext* context) {
    const uint32_t cores = VectorCores(context);
    const auto& up = InputShape(context, 2);
    const ge::DataType type = context->GetInputDesc(2)->GetDataType();
    const auto& y = InputShape(context, 5);
    LoraSizes sizes{Size(y, 0), 1, Size(up, 2), Size(up, 3), Size(y, 1), Size(up, 0)};  // reads no x
    sizes.exact = Exact(context);
    const colora::LilyMixPlan plan =
        colora::plan_lily_mix(sizes.tokens, Size(up, 1), sizes.rank, sizes.width, sizes.rowWidth, 0, sizes.slots, cores,
                              ElementBytes(type), type == ge::DT_FLOAT16, sizes.exact);
    if (!plan.error.empty()) return Refuse("LilyMix", plan.error);
    LilyMixTilingData tiling;
    SetLora(tiling, plan.data);
    tiling.set_experts(plan.data.experts);
    return Launch(context, tiling, cores, plan.workspace, false);
}

IMPL_OP_OPTILING(LilyMix).Tiling(LilyMixTiling);

}  // namespace optiling
