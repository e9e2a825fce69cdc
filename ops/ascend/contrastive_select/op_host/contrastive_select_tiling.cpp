// Host side tiling of contrastive_select: shapes in, plan out. All arithmetic is in contrastive_select_tiling_core.h.
#include "contrastive_select_tiling.h"

#include <cstdio>

#include "contrastive_select_tiling_core.h"
#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace optiling {

static uint32_t Size(const gert::Shape& shape, size_t axis) { return static_cast<uint32_t>(shape.GetDim(axis)); }

static ge::graphStatus ContrastiveSelectTiling(gert::TilingContext* context) {
    const auto platform = platform_ascendc::PlatformAscendC(context->GetPlatformInfo());
    const uint32_t cores = platform.GetCoreNumAiv();
    const auto& expert = context->GetInputShape(0)->GetStorageShape();
    const auto& mask = context->GetInputShape(4)->GetStorageShape();
    const uint32_t maskRows = mask.GetDimNum() == 2 ? Size(mask, 0) : 0;  // (1,) stands for "no mask"
    const colora::ContrastiveSelectPlan plan = colora::plan_contrastive_select(Size(expert, 0), Size(expert, 1), maskRows, cores);
    if (!plan.error.empty()) {
        std::fprintf(stderr, "ContrastiveSelect: %s\n", plan.error.c_str());
        return ge::GRAPH_FAILED;
    }
    ContrastiveSelectTilingData tiling;
    tiling.set_rows(plan.data.rows);
    tiling.set_vocab(plan.data.vocab);
    tiling.set_cores(plan.data.cores);
    tiling.set_parts(plan.data.parts);
    tiling.set_width(plan.data.width);
    tiling.set_maskRows(plan.data.maskRows);
    tiling.SaveToBuffer(context->GetRawTilingData()->GetData(), context->GetRawTilingData()->GetCapacity());
    context->GetRawTilingData()->SetDataSize(tiling.GetDataSize());
    context->SetBlockDim(cores);
    context->SetScheduleMode(1);  // all cores start together: the kernel's SyncAll waits for every one of them
    size_t* workspace = context->GetWorkspaceSizes(1);
    workspace[0] = plan.workspace + platform.GetLibApiWorkSpaceSize();
    return ge::GRAPH_SUCCESS;
}

IMPL_OP_OPTILING(ContrastiveSelect).Tiling(ContrastiveSelectTiling);

}  // namespace optiling
