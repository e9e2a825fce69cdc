// Tiling arithmetic of w4_lora; no CANN header needed.
#pragma once
#include "lora_tiling_core.h"

namespace colora {

constexpr uint32_t kBaseWindow = 32;       // tokens of one pass
constexpr uint32_t kBaseRows = 16;         // weight rows of a tile
constexpr uint32_t kBaseColumns = 2048;    // widest tile: 16 KiB of packed weights
constexpr uint32_t kBaseInput = 8192;      // floats of activations held beside it
constexpr uint32_t kBaseScales = 512;      // scales of a tile, each in a block of its own

struct W4LoraTilingData {
    uint32_t tokens;       // as in LoraTilingData
    uint32_t hidden;
    uint32_t rank;
    uint32_t width;
    uint32_t rowWidth;
    uint32_t offset;
    uint32_t slots;
    uint32_t segments;
    uint32_t cores;
    uint32_t window;
    uint32_t unitIn;
    uint32_t unitOut;
    uint32_t exact;
    uint32_t groups;       // scales of a weight row
    uint32_t group;        // columns of a scale
    uint32_t columns;      // columns of a weight tile, a multiple of 64
};

struct W4LoraPlan {
    W4LoraTilingData data{};
    uint64_t workspace = 0;
    std::string error;
};

// The widest tile whose activations (of `tokens` tokens) and scales fit.
inline uint32_t base_columns(uint32_t tokens, uint32_t hidden, uint32_t groups, uint32_t group) {
    uint32_t columns = kBaseInput / tokens / 64 * 64;
    if (columns > kBaseColumns) columns = kBaseColumns;
    if (columns > round_up(hidden, 64)) columns = round_up(hidden, 64);
    for (; columns > 64 && groups > 1; columns -= 64) {
        const uint32_t touched = columns % group == 0 ? columns / group : columns / group + 2;
        if (round_up(touched, 8) * kBaseRows <= kBaseScales) break;
    }
    return columns;
}

inline W4LoraPlan plan_w4_lora(uint32_t tokens, uint32_t hidden, uint32_t rank, uint32_t width, uint32_t slots,
                               uint32_t groups, uint32_t cores, uint32_t element_bytes, bool half, bool exact) {
    W4LoraPlan plan;
    const LoraPlan lora = plan_lora(tokens, hidden, rank, width, width, 0, slots, 0, cores, element_bytes, half, exact, kBaseWindow);
    plan.error = lora.error;
    if (plan.error.empty() && hidden % 2) {
        plan.error = "hidden " + std::to_string(hidden) + " is odd, but two weights share a byte";
    } else if (plan.error.empty() && (groups < 1 || hidden % groups || (groups > 1 && hidden / groups % 8))) {
        plan.error = std::to_string(groups) + " scales a row of " + std::to_string(hidden) +
                     " weights: one, or groups of a multiple of 8 columns";
    }
    if (!plan.error.empty()) return plan;
    const LoraTilingData& t = lora.data;
    plan.data = W4LoraTilingData{t.tokens, t.hidden, t.rank, t.width, t.rowWidth, t.offset, t.slots, t.segments, t.cores,
                                 t.window, t.unitIn, t.unitOut, t.exact, groups, hidden / groups,
                                 base_columns(t.window, hidden, groups, hidden / groups)};
    plan.workspace = lora.workspace;
    return plan;
}

}  // namespace colora
