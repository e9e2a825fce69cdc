// Shape and dtype inference of multi_lora_segments.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus MultiLoraSegmentsInferShape(gert::InferShapeContext* context) {
    *context->GetOutputShape(0) = *context->GetInputShape(6);
    return GRAPH_SUCCESS;
}

static graphStatus MultiLoraSegmentsInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, context->GetInputDataType(6));
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(MultiLoraSegments).InferShape(MultiLoraSegmentsInferShape).InferDataType(MultiLoraSegmentsInferDataType);

}  // namespace ge
