// Tiling arithmetic of multi_lora; no CANN header needed.
#pragma once
#include "lora_tiling_core.h"

namespace colora {

constexpr uint32_t kMaxSlices = 8;

struct MultiLoraTilingData {
    uint32_t tokens;   // rows of x and y
    uint32_t hidden;   // width of x
    uint32_t rank;     // coefficients of one slice
    uint32_t slices;   // of the outputs, each with coefficients of its own
    uint32_t width;    // columns of y and up
    uint32_t slots;    // adapters in the bank
    uint32_t cores;    // blocks launched
    uint32_t window;   // tokens in one pass
    uint32_t unitIn;   // hidden columns that one core takes at least
    uint32_t unitOut;  // output columns that one core takes at least
    uint32_t most;     // tokens of one adapter that a core takes together at most
    uint32_t balance;  // weights of a token's adapter over its partial sums, see Parts in multi_lora_phase.h
};

struct MultiLoraPlan {
    MultiLoraTilingData data{};
    uint64_t workspace = 0;
    std::string error;
};

// down_rows: slices x rank. element_bytes: of x, down, up, y.
inline MultiLoraPlan plan_multi_lora(uint32_t tokens, uint32_t hidden, uint32_t down_rows, uint32_t rank, uint32_t width,
                                     uint32_t slots, uint32_t slices, uint32_t cores, uint32_t element_bytes) {
    MultiLoraPlan plan;
    if (rank < 1 || rank > kMaxRank) {
        plan.error = "rank " + std::to_string(rank) + " is outside 1.." + std::to_string(kMaxRank);
    } else if (hidden < 1 || width < 1 || slots < 1) {
        plan.error = "hidden, width and slots must be at least 1";
    } else if (slices < 1 || slices > kMaxSlices) {
        plan.error = std::to_string(slices) + " slices, supported are 1.." + std::to_string(kMaxSlices);
    } else if (down_rows > 512 || down_rows != slices * rank) {
        plan.error = "down has " + std::to_string(down_rows) + " rows, expected " + std::to_string(slices) + " slices of rank " +
                     std::to_string(rank) + ", at most 512";
    } else if (cores < 1 || cores > kMaxCores) {
        plan.error = "cores must be 1.." + std::to_string(kMaxCores);
    }
    if (!plan.error.empty()) return plan;
    MultiLoraTilingData& t = plan.data;
    const uint32_t padded = slices * round_up(rank, 8);
    t.tokens = tokens;
    t.hidden = hidden;
    t.rank = rank;
    t.slices = slices;
    t.width = width;
    t.slots = slots;
    t.cores = cores;
    t.window = tokens == 0 ? 1 : tokens < kSortWindow ? tokens : kSortWindow;
    t.unitIn = column_unit(hidden, cores);
    t.unitOut = column_unit(width, cores);
    t.most = 8;
    t.balance = static_cast<uint32_t>((uint64_t(hidden) * slices + width) * element_bytes / (8 * slices)) + 1;
    // Two halves in turn: the sums of one pass may still be read while those of the next are written.
    plan.workspace = uint64_t(2) * t.window * cores * padded * 4;
    return plan;
}

}  // namespace colora
