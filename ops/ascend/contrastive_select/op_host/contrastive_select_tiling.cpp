// Host side tiling of contrastive_select: shapes in, plan out. The arithmetic is in contrastive_select_tiling_core.h.
#include "contrastive_select_tiling.h"

#include "contrastive_select_tiling_core.h"
#include "tiling_glue.h"

namespace optiling {

static ge::graphStatus ContrastiveSelectTiling(gert::TilingContext* context) {
    const uint32_t cores = VectorCores(context);
    const auto& expert = InputShape(context, 0);
    const auto& mask = InputShape(context, 4);
    const uint32_t maskRows = mask.GetDimNum() == 2 ? Size(mask, 0) : 0;  // (1,) stands for "no mask"
    const colora::ContrastiveSelectPlan plan = colora::plan_contrastive_select(Size(expert, 0), Size(expert, 1), maskRows, cores);
    if (!plan.error.empty()) return Refuse("ContrastiveSelect", plan.error);
    ContrastiveSelectTilingData tiling;
    tiling.set_rows(plan.data.rows);
    tiling.set_vocab(plan.data.vocab);
    tiling.set_cores(plan.data.cores);
    tiling.set_parts(plan.data.parts);
    tiling.set_width(plan.data.width);
    tiling.set_maskRows(plan.data.maskRows);
    return Launch(context, tiling, cores, plan.workspace, true);
}

IMPL_OP_OPTILING(ContrastiveSelect).Tiling(ContrastiveSelectTiling);

}  // namespace optiling
