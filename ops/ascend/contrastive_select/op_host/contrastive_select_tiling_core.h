// Tiling arithmetic of contrastive_select; no CANN header needed.
#pragma once
#include <cstdint>
#include <string>

namespace colora {

struct ContrastiveSelectTilingData {
    uint32_t rows;      // requests
    uint32_t vocab;
    uint32_t cores;
    uint32_t parts;     // pieces of a row; piece i of all rows * parts goes to core i % cores
    uint32_t width;     // columns of a piece, a multiple of 64
    uint32_t maskRows;  // 0: no mask, 1: one mask for all requests, rows: one each
};

struct ContrastiveSelectPlan {
    ContrastiveSelectTilingData data{};
    uint64_t workspace = 0;
    std::string error;
};

inline ContrastiveSelectPlan plan_contrastive_select(uint32_t rows, uint32_t vocab, uint32_t mask_rows, uint32_t cores) {
    ContrastiveSelectPlan plan;
    if (vocab < 1 || vocab > 262144) {
        plan.error = "vocabulary of " + std::to_string(vocab) + ", supported are 1..262144";
    } else if (mask_rows > 1 && mask_rows != rows) {
        plan.error = "mask has " + std::to_string(mask_rows) + " rows, expected 1 or " + std::to_string(rows);
    } else if (cores < 1 || cores > 64) {
        plan.error = "cores must be 1..64";
    }
    if (!plan.error.empty()) return plan;
    uint32_t a = rows ? rows : 1, b = cores;
    while (b) {
        const uint32_t c = a % b;
        a = b;
        b = c;
    }
    // rows * parts is a multiple of the cores, as long as pieces keep 1024 columns.
    uint32_t parts = cores / a;
    const uint32_t most = (vocab + 1023) / 1024;
    if (parts > most) parts = most;
    uint32_t width = (vocab + parts - 1) / parts;
    width = (width + 63) / 64 * 64;
    parts = (vocab + width - 1) / width;
    plan.data = ContrastiveSelectTilingData{rows, vocab, cores, parts, width, mask_rows};
    plan.workspace = uint64_t(rows ? rows : 1) * parts * 64;
    return plan;
}

}  // namespace colora
