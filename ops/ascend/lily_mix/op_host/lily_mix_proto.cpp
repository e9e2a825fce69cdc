// Shape and dtype inference of lily_mix.
#include "register/op_def_registry.h"

namespace ge {

static graphStatus LilyMixInferShape(gert::InferShapeContext* context) {
    *context->GetOutputShape(0) = *context->GetInputShape(5);
    return GRAPH_SUCCESS;
}

static graphStatus LilyMixInferDataType(gert::InferDataTypeContext* context) {
    context->SetOutputDataType(0, context->GetInputDataType(5));
    return GRAPH_SUCCESS;
}

IMPL_OP_INFERSHAPE(LilyMix).InferShape(LilyMixInferShape).InferDataType(LilyMixInferDataType);

}  // namespace ge
