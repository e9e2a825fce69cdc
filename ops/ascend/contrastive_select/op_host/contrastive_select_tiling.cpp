// Host side tiling of contrastive_select: shapes in, plan out. The arithmetic is in contrastive_select_tiling_core.h.
#include "contrastive_select_tiling.h"

#include "contrastive_select_tiling_core.h"
#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus ContrastiveSelectTiling(gert::TilingContext* context) {
    const uint32_t cores = VectorCores(context);
    const auto& logits = InputShape(context, 0);
    const auto& chosen = InputShape(context, 1);
    const uint32_t bytes = ElementBytes(context->GetInputDesc(0)->GetDataType());
    const colora::ContrastiveSelectPlan plan =
        colora::plan_contrastive_select(Size(logits, 0), Size(logits, 1), Size(chosen, 0), Size(chosen, 1), cores, bytes);
    if (!plan.error.empty()) return Refuse("ContrastiveSelect", plan.error);
    ContrastiveSelectTilingData tiling;
    tiling.set_rows(plan.data.rows);
    tiling.set_vocab(plan.data.vocab);
    tiling.set_requests(plan.data.requests);
    tiling.set_voices(plan.data.voices);
    tiling.set_cores(plan.data.cores);
    tiling.set_parts(plan.data.parts);
    tiling.set_width(plan.data.width);
    tiling.set_resident(plan.data.resident);
    return Launch(context, tiling, cores, plan.workspace, true);
}

IMPL_OP_OPTILING(ContrastiveSelect).Tiling(ContrastiveSelectTiling);

}  // namespace optiling
