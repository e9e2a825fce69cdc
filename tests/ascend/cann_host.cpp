// C entries over the registry of cann_host.h, for test_host.py.
#include "cann_host.h"

#include <sstream>

#define EXPORT extern "C" __attribute__((visibility("default")))

static std::string text;

static const char* type_name(ge::DataType type) {
    switch (type) {
        case ge::DT_FLOAT: return "float32";
        case ge::DT_FLOAT16: return "float16";
        case ge::DT_BF16: return "bfloat16";
        case ge::DT_UINT8: return "uint8";
        default: return "int32";
    }
}

static void write_tensors(std::ostream& out, const std::vector<std::shared_ptr<ops::OpParamDef>>& list) {
    for (size_t i = 0; i < list.size(); ++i) {
        const ops::OpParamDef& one = *list[i];
        out << (i ? "," : "") << "[\"" << one.name << "\",\"" << (one.presence == ops::REQUIRED ? "required" : "optional") << "\",[";
        for (size_t k = 0; k < one.types.size(); ++k) out << (k ? "," : "") << '"' << type_name(one.types[k]) << '"';
        out << "]," << one.formats.size() << "," << one.unknown.size() << "]";
    }
}

// All that the compiled sources registered, as JSON.
EXPORT const char* host_registered() {
    std::ostringstream out;
    out << "{";
    bool first = true;
    for (const auto& item : cann_host::Registry()) {
        const cann_host::Entry& entry = item.second;
        out << (first ? "" : ",") << '"' << item.first << "\":{\"tiling_classes\":" << entry.tilingClasses << ",\"complete\":"
            << (entry.definition && entry.tiling && entry.inferShape && entry.inferType ? "true" : "false");
        first = false;
        if (entry.definition) {
            out << ",\"inputs\":[";
            write_tensors(out, entry.definition->inputs);
            out << "],\"outputs\":[";
            write_tensors(out, entry.definition->outputs);
            out << "],\"attributes\":[";
            const auto& attributes = entry.definition->attributes;
            for (size_t i = 0; i < attributes.size(); ++i) {
                out << (i ? "," : "") << "[\"" << attributes[i]->name << "\",\""
                    << (attributes[i]->presence == ops::REQUIRED ? "required" : "optional") << "\",\"" << attributes[i]->kind
                    << "\"," << attributes[i]->value << "]";
            }
            out << "],\"units\":[";
            const auto& units = entry.definition->core.units;
            for (size_t i = 0; i < units.size(); ++i) out << (i ? "," : "") << '"' << units[i] << '"';
            out << "]";
        }
        out << "}";
    }
    out << "}";
    text = out.str();
    return text.c_str();
}

static void fill(gert::Context& context, int inputs, const int64_t* ranks, const int64_t* dims, const int32_t* types) {
    for (int i = 0; i < inputs; ++i) {
        gert::StorageShape one;
        one.shape.SetDimNum(ranks[i]);
        for (int64_t k = 0; k < ranks[i]; ++k) one.shape.SetDim(k, *dims++);
        context.inputs.push_back(one);
        context.types.push_back({static_cast<ge::DataType>(types[i])});
    }
}

// facts: bytes of tiling data, blocks, schedule mode, workspace, number of workspaces. Returns the function's status.
EXPORT int host_tiling(const char* op, int inputs, const int64_t* ranks, const int64_t* dims, const int32_t* types,
                       int exact, uint32_t cores, uint32_t* data, uint64_t* facts) {
    gert::TilingContext context;
    fill(context, inputs, ranks, dims, types);
    const cann_host::Entry& entry = cann_host::Registry()[op];
    context.attributes = {exact != 0, {}};
    for (const auto& one : entry.definition->attributes) context.attributes.kinds.push_back(one->kind);
    context.platform.cores = cores;
    context.tiling.size = 0;
    const ge::graphStatus status = entry.tiling(&context);
    if (status != ge::GRAPH_SUCCESS) return 1;
    std::memcpy(data, context.tiling.bytes, context.tiling.size);
    facts[0] = context.tiling.size;
    facts[1] = context.blocks;
    facts[2] = context.schedule;
    facts[3] = context.workspaces.at(0);
    facts[4] = context.workspaces.size();
    return 0;
}

// out: number of dimensions, the dimensions, the dtype.
// The shape and dtype of output `which`.
EXPORT int host_infer(const char* op, int which, int inputs, const int64_t* ranks, const int64_t* dims, const int32_t* types, int64_t* out) {
    gert::InferShapeContext shapes;
    gert::InferDataTypeContext kinds;
    fill(shapes, inputs, ranks, dims, types);
    fill(kinds, inputs, ranks, dims, types);
    const cann_host::Entry& entry = cann_host::Registry()[op];
    if (entry.inferShape(&shapes) != ge::GRAPH_SUCCESS || entry.inferType(&kinds) != ge::GRAPH_SUCCESS) return 1;
    const gert::Shape& shape = shapes.outputs[which];
    *out++ = shape.GetDimNum();
    for (size_t k = 0; k < shape.GetDimNum(); ++k) *out++ = shape.GetDim(k);
    *out = kinds.outputTypes[which];
    return 0;
}
