// Host side tiling of lora_expand: shapes in, plan out. All arithmetic is in lora_tiling_core.h.
#include "lora_expand_tiling.h"

#include <cstdio>

#include "lora_tiling_core.h"
#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace optiling {

static uint32_t Size(const gert::Shape& shape, size_t axis) { return static_cast<uint32_t>(shape.GetDim(axis)); }

static ge::graphStatus LoraExpandTiling(gert::TilingContext* context) {
    const auto platform = platform_ascendc::PlatformAscendC(context->GetPlatformInfo());
    const uint32_t cores = platform.GetCoreNumAiv();
    const auto& h = context->GetInputShape(0)->GetStorageShape();
    const auto& up = context->GetInputShape(1)->GetStorageShape();
    const auto& y = context->GetInputShape(3)->GetStorageShape();
    const uint32_t offset = static_cast<uint32_t>(*context->GetAttrs()->GetInt(0));
    const bool exact = *context->GetAttrs()->GetBool(1);
    const ge::DataType type = context->GetInputDesc(1)->GetDataType();
    const colora::LoraPlan plan = colora::plan_lora(Size(h, 0), 1, Size(h, 1), Size(up, 2), Size(y, 1), offset, Size(up, 0), 0, cores,
                                                    type == ge::DT_FLOAT ? 4 : 2, type == ge::DT_FLOAT16, exact);
    if (!plan.error.empty()) {
        std::fprintf(stderr, "LoraExpand: %s\n", plan.error.c_str());
        return ge::GRAPH_FAILED;
    }
    LoraExpandTilingData tiling;
    tiling.set_tokens(plan.data.tokens);
    tiling.set_hidden(plan.data.hidden);
    tiling.set_rank(plan.data.rank);
    tiling.set_width(plan.data.width);
    tiling.set_rowWidth(plan.data.rowWidth);
    tiling.set_offset(plan.data.offset);
    tiling.set_slots(plan.data.slots);
    tiling.set_segments(plan.data.segments);
    tiling.set_cores(plan.data.cores);
    tiling.set_window(plan.data.window);
    tiling.set_unitIn(plan.data.unitIn);
    tiling.set_unitOut(plan.data.unitOut);
    tiling.set_exact(plan.data.exact);
    tiling.SaveToBuffer(context->GetRawTilingData()->GetData(), context->GetRawTilingData()->GetCapacity());
    context->GetRawTilingData()->SetDataSize(tiling.GetDataSize());
    context->SetBlockDim(cores);
    size_t* workspace = context->GetWorkspaceSizes(1);
    workspace[0] = plan.workspace + platform.GetLibApiWorkSpaceSize();
    return ge::GRAPH_SUCCESS;
}

IMPL_OP_OPTILING(LoraExpand).Tiling(LoraExpandTiling);

}  // namespace optiling
