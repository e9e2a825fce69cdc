// Shape and dtype inference of w4_lora.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus W4LoraInferShape(gert::InferShapeContext* context) {
    gert::Shape* out = context->GetOutputShape(0);
    out->SetDimNum(2);
    out->SetDim(0, context->GetInputShape(0)->GetDim(0));
    out->SetDim(1, context->GetInputShape(1)->GetDim(0));
    return GRAPH_SUCCESS;
}

static graphStatus W4LoraInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, context->GetInputDataType(0));
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(W4Lora).InferShape(W4LoraInferShape).InferDataType(W4LoraInferDataType);

}  // namespace ge
