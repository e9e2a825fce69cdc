// What the tiling functions of all operators share: reading the shapes, asking the platform, handing the plan to CANN.
// Nothing is computed here; the arithmetic is in the *_tiling_core.h headers, which need no CANN.
#pragma once
#include <cstdio>
#include <string>

#include "lora_tiling_core.h"
#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace optiling {

inline uint32_t Size(const gert::Shape& shape, size_t axis) { return static_cast<uint32_t>(shape.GetDim(axis)); }

inline const gert::Shape& InputShape(gert::TilingContext* context, size_t input) {
    return context->GetInputShape(input)->GetStorageShape();
}

inline uint32_t VectorCores(gert::TilingContext* context) {
    return platform_ascendc::PlatformAscendC(context->GetPlatformInfo()).GetCoreNumAiv();
}

// Tiling data, block number and workspace of a launch. The data must be set when this is called.
// meet: the kernel calls SyncAll, which waits for every core: all must start together (schedule mode 1).
template <class Tiling>
ge::graphStatus Launch(gert::TilingContext* context, Tiling& tiling, uint32_t cores, uint64_t workspace, bool meet) {
    auto* raw = context->GetRawTilingData();
    tiling.SaveToBuffer(raw->GetData(), raw->GetCapacity());
    raw->SetDataSize(tiling.GetDataSize());
    context->SetBlockDim(cores);
    if (meet) context->SetScheduleMode(1);
    const platform_ascendc::PlatformAscendC platform(context->GetPlatformInfo());
    context->GetWorkspaceSizes(1)[0] = workspace + platform.GetLibApiWorkSpaceSize();
    return ge::GRAPH_SUCCESS;
}

inline ge::graphStatus Refuse(const char* op, const std::string& error) {
    std::fprintf(stderr, "%s: %s\n", op, error.c_str());
    return ge::GRAPH_FAILED;
}

// The sizes of a LoRA launch, as the tiling function of an operator reads them from its inputs. What an initialiser leaves
// out is 0 (CANN's project builds op_host as C++11: no default values in an aggregate).
struct LoraSizes {
    uint32_t tokens, hidden, rank, width, rowWidth, slots;
    bool exact;
};

// The attribute of the operators that write y; they have no other.
inline bool Exact(gert::TilingContext* context) { return *context->GetAttrs()->GetBool(0); }

// The fields of colora::LoraTilingData that the operators' own classes share, from a plan.
template <class Tiling, class Data>
void SetLora(Tiling& tiling, const Data& data) {
    tiling.set_tokens(data.tokens);
    tiling.set_hidden(data.hidden);
    tiling.set_rank(data.rank);
    tiling.set_width(data.width);
    tiling.set_rowWidth(data.rowWidth);
    tiling.set_offset(data.offset);
    tiling.set_slots(data.slots);
    tiling.set_cores(data.cores);
    tiling.set_window(data.window);
    tiling.set_unitIn(data.unitIn);
    tiling.set_unitOut(data.unitOut);
    tiling.set_exact(data.exact);
}

inline uint32_t ElementBytes(ge::DataType type) { return type == ge::DT_FLOAT ? 4 : 2; }

// typed: the input whose dtype the kernel is compiled for. Tiling: a class with the fields of colora::LoraTilingData.
template <class Tiling>
ge::graphStatus LaunchLora(const char* op, gert::TilingContext* context, const LoraSizes& sizes, size_t typed, bool meet) {
    const uint32_t cores = VectorCores(context);
    const ge::DataType type = context->GetInputDesc(typed)->GetDataType();
    const colora::LoraPlan plan =
        colora::plan_lora(sizes.tokens, sizes.hidden, sizes.rank, sizes.width, sizes.rowWidth, 0, sizes.slots,
                          cores, ElementBytes(type), type == ge::DT_FLOAT16, sizes.exact);
    if (!plan.error.empty()) return Refuse(op, plan.error);
    Tiling tiling;
    SetLora(tiling, plan.data);
    return Launch(context, tiling, cores, plan.workspace, meet);
}

}  // namespace optiling
