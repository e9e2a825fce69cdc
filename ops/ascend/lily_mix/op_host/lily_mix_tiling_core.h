// Tiling arithmetic of lily_mix; no CANN header needed.
#pragma once
#include "lora_tiling_core.h"

namespace colora {

constexpr uint32_t kMixedBytes = 16384;  // coefficients of one token, all experts

struct LilyMixTilingData {
    uint32_t tokens;       // as in LoraTilingData
    uint32_t hidden;
    uint32_t rank;
    uint32_t width;
    uint32_t rowWidth;
    uint32_t offset;
    uint32_t slots;
    uint32_t cores;
    uint32_t window;
    uint32_t unitIn;
    uint32_t unitOut;
    uint32_t exact;
    uint32_t experts;      // matrices of a slot
};

struct LilyMixPlan {
    LilyMixTilingData data{};
    uint64_t workspace = 0;
    std::string error;
};

inline LilyMixPlan plan_lily_mix(uint32_t tokens, uint32_t experts, uint32_t rank, uint32_t width, uint32_t row_width,
                                 uint32_t offset, uint32_t slots, uint32_t cores, uint32_t element_bytes, bool half, bool exact) {
    LilyMixPlan plan;
    const LoraPlan lora = plan_lora(tokens, 1, rank, width, row_width, offset, slots, cores, element_bytes, half, exact);
    plan.error = lora.error;
    if (plan.error.empty() && experts < 1) plan.error = "experts must be at least 1";
    if (plan.error.empty() && uint64_t(experts) * coefficient_row(rank, element_bytes, lora.data.exact != 0) > kMixedBytes) {
        plan.error = std::to_string(experts) + " experts of rank " + std::to_string(rank) + " need " +
                     std::to_string(uint64_t(experts) * coefficient_row(rank, element_bytes, lora.data.exact != 0)) +
                     " bytes of coefficients a token, at most " + std::to_string(kMixedBytes) + " fit";
    }
    if (!plan.error.empty()) return plan;
    const LoraTilingData& t = lora.data;
    plan.data = LilyMixTilingData{t.tokens, t.hidden, t.rank, t.width, t.rowWidth, t.offset, t.slots, t.cores,
                                  t.window, t.unitIn, t.unitOut, t.exact, experts};
    plan.workspace = lora.workspace;
    return plan;
}

}  // namespace colora
