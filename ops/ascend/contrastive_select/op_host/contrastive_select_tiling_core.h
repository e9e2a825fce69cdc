// Tiling arithmetic of contrastive_select; no CANN header needed.
#pragma once
#include <cstdint>
#include <string>

namespace colora {

constexpr uint32_t kMostVoices = 8;
constexpr uint32_t kResidentBytes = 114688;  // of a piece of the leading row, kept in the unified buffer

struct ContrastiveSelectTilingData {
    uint32_t rows;      // of the logits
    uint32_t vocab;
    uint32_t requests;
    uint32_t voices;    // rows that a request may have
    uint32_t cores;
    uint32_t parts;     // pieces of a row; piece i of all requests * parts goes to core i % cores
    uint32_t width;     // columns of a piece, a multiple of 64
    uint32_t resident;  // 1: a core has one piece at most, which fits: its logits are read once
};

struct ContrastiveSelectPlan {
    ContrastiveSelectTilingData data{};
    uint64_t workspace = 0;
    std::string error;
};

inline ContrastiveSelectPlan plan_contrastive_select(uint32_t rows, uint32_t vocab, uint32_t requests, uint32_t voices, uint32_t cores,
                                                     uint32_t element_bytes) {
    ContrastiveSelectPlan plan;
    if (vocab < 1 || vocab > 262144) {
        plan.error = "vocabulary of " + std::to_string(vocab) + ", supported are 1..262144";
    } else if (voices < 1 || voices > kMostVoices) {
        plan.error = std::to_string(voices) + " rows a request, supported are 1.." + std::to_string(kMostVoices);
    } else if (cores < 1 || cores > 64) {
        plan.error = "cores must be 1..64";
    }
    if (!plan.error.empty()) return plan;
    // Every request in as many pieces as there are cores for it, as long as pieces keep 1024 columns; with more requests
    // than cores, so many that requests * parts is a multiple of the cores.
    uint32_t a = requests ? requests : 1, b = cores;
    while (b) {
        const uint32_t c = a % b;
        a = b;
        b = c;
    }
    uint32_t parts = requests && requests <= cores ? cores / requests : cores / a;
    const uint32_t most = (vocab + 1023) / 1024;
    if (parts > most) parts = most;
    uint32_t width = (vocab + parts - 1) / parts;
    width = (width + 63) / 64 * 64;
    parts = (vocab + width - 1) / width;
    const bool resident = uint64_t(requests) * parts <= cores && uint64_t(width) * element_bytes <= kResidentBytes;
    plan.data.rows = rows;
    plan.data.vocab = vocab;
    plan.data.requests = requests;
    plan.data.voices = voices;
    plan.data.cores = cores;
    plan.data.parts = parts;
    plan.data.width = width;
    plan.data.resident = resident ? 1 : 0;
    plan.workspace = uint64_t(requests ? requests : 1) * parts * 64;
    return plan;
}

}  // namespace colora
