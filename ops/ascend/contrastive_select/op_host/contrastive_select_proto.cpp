// Shape and dtype inference of contrastive_select.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus ContrastiveSelectInferShape(gert::InferShapeContext* context) {
    const gert::Shape* chosen = context->GetInputShape(1);
    const int64_t columns[2] = {3, chosen->GetDim(1) < 0 ? -1 : 2 + chosen->GetDim(1)};
    for (size_t i = 0; i < 2; ++i) {
        gert::Shape* out = context->GetOutputShape(i);
        out->SetDimNum(2);
        out->SetDim(0, chosen->GetDim(0));
        out->SetDim(1, columns[i]);
    }
    return GRAPH_SUCCESS;
}

static graphStatus ContrastiveSelectInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, ge::DT_INT32);
    context->SetOutputDataType(1, ge::DT_FLOAT);
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(ContrastiveSelect).InferShape(ContrastiveSelectInferShape).InferDataType(ContrastiveSelectInferDataType);

}  // namespace ge
