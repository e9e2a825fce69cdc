// Shape and dtype inference of contrastive_select.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus ContrastiveSelectInferShape(gert::InferShapeContext* context) {
    gert::Shape* token = context->GetOutputShape(0);
    token->SetDimNum(1);
    token->SetDim(0, context->GetInputShape(0)->GetDim(0));
    return GRAPH_SUCCESS;
}

static graphStatus ContrastiveSelectInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, ge::DT_INT32);
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(ContrastiveSelect).InferShape(ContrastiveSelectInferShape).InferDataType(ContrastiveSelectInferDataType);

}  // namespace ge
