// Shape and dtype inference of lora_expand.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus LoraExpandInferShape(gert::InferShapeContext* context) {
    *context->GetOutputShape(0) = *context->GetInputShape(3);
    return GRAPH_SUCCESS;
}

static graphStatus LoraExpandInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, context->GetInputDataType(3));
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(LoraExpand).InferShape(LoraExpandInferShape).InferDataType(LoraExpandInferDataType);

}  // namespace ge
