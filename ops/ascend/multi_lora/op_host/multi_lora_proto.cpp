// Shape and dtype inference of multi_lora.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus MultiLoraInferShape(gert::InferShapeContext* context) {
    *context->GetOutputShape(0) = *context->GetInputShape(5);
    return GRAPH_SUCCESS;
}

static graphStatus MultiLoraInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, context->GetInputDataType(5));
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(MultiLora).InferShape(MultiLoraInferShape).InferDataType(MultiLoraInferDataType);

}  // namespace ge
