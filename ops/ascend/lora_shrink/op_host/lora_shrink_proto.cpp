// Shape and dtype inference of lora_shrink.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus LoraShrinkInferShape(gert::InferShapeContext* context) {
    gert::Shape* h = context->GetOutputShape(0);
    h->SetDimNum(2);
    h->SetDim(0, context->GetInputShape(0)->GetDim(0));
    h->SetDim(1, context->GetInputShape(1)->GetDim(1));
    return GRAPH_SUCCESS;
}

static graphStatus LoraShrinkInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, ge::DT_FLOAT);
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(LoraShrink).InferShape(LoraShrinkInferShape).InferDataType(LoraShrinkInferDataType);

}  // namespace ge
