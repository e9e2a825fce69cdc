// Tiling arithmetic of the LoRA operators. No CANN header is needed: op_host, the emulator and the unit tests share it.
//
// What is decided here depends on shapes only; which token uses which adapter is data and is sorted out on the device.
#pragma once
#include <cstdint>
#include <string>

namespace colora {

constexpr uint32_t kMaxRank = 256;
constexpr uint32_t kMaxGroups = 64;          // adapters in one pass over the cores
constexpr uint32_t kSortWindow = 64;         // tokens that are grouped by adapter at a time
constexpr uint32_t kMaxCores = 64;

struct LoraTilingData {
    uint32_t tokens;       // rows of x and y
    uint32_t hidden;       // width of x
    uint32_t rank;
    uint32_t width;        // outputs of up
    uint32_t rowWidth;     // columns of y
    uint32_t offset;       // first column of y that up adds to
    uint32_t slots;        // adapters in the bank
    uint32_t cores;        // blocks launched
    uint32_t window;       // tokens in one pass
    uint32_t unitIn;       // hidden columns that one core takes at least
    uint32_t unitOut;      // output columns that one core takes at least
    uint32_t exact;        // 1: fp32 coefficients for fp16 weights too
};

inline uint32_t round_up(uint32_t value, uint32_t step) { return (value + step - 1) / step * step; }

// Whole vector repeats (64 lanes) and 128-byte bursts, unless that would leave more than half of the cores idle.
inline uint32_t column_unit(uint32_t columns, uint32_t cores) {
    for (uint32_t unit = 64; unit > 16; unit /= 2) {
        if (round_up(columns, unit) / unit * 2 > cores) return unit;
    }
    return 16;
}

// Bytes of the row in which the coefficients of one token travel from the reduction to the expansion.
inline uint32_t coefficient_row(uint32_t rank, uint32_t element_bytes, bool exact) {
    const bool rounded = element_bytes == 2 && !exact;
    return rounded ? round_up(rank, 16) * 2 + 32 : round_up(rank, 8) * 4;
}

struct LoraPlan {
    LoraTilingData data{};
    uint64_t workspace = 0;
    std::string error;
};

// element_bytes: of x, down, up, y. half: whether they are float16 (the only type with rounded coefficients).
inline LoraPlan plan_lora(uint32_t tokens, uint32_t hidden, uint32_t rank, uint32_t width, uint32_t row_width,
                          uint32_t offset, uint32_t slots, uint32_t cores, uint32_t element_bytes,
                          bool half, bool exact) {
    LoraPlan plan;
    if (rank < 1 || rank > kMaxRank) {
        plan.error = "rank " + std::to_string(rank) + " is outside 1.." + std::to_string(kMaxRank);
    } else if (hidden < 1 || width < 1 || slots < 1) {
        plan.error = "hidden, width and slots must be at least 1";
    } else if (uint64_t(offset) + width > row_width) {
        plan.error = "columns " + std::to_string(offset) + ".." + std::to_string(uint64_t(offset) + width - 1) +
                     " do not fit rows of " + std::to_string(row_width);
    } else if (cores < 1 || cores > kMaxCores) {
        plan.error = "cores must be 1.." + std::to_string(kMaxCores);
    }
    if (!plan.error.empty()) return plan;
    exact = exact || !half;
    LoraTilingData& t = plan.data;
    t = LoraTilingData{tokens, hidden, rank, width, row_width, offset, slots, cores, 0, 0, 0, exact ? 1u : 0u};
    const uint32_t padded = round_up(rank, 8);
    t.window = kSortWindow;
    if (t.window > tokens) t.window = tokens ? tokens : 1;
    t.unitIn = column_unit(hidden, cores);
    t.unitOut = column_unit(width, cores);
    plan.workspace = uint64_t(t.window) * cores * padded * 4 + uint64_t(t.window) * coefficient_row(rank, element_bytes, exact);
    return plan;
}

}  // namespace colora
