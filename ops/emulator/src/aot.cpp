// The emulated device kernels as ahead-of-time operators of MindSpore on a CPU: the C functions that
// ops.Custom("libcolora_emulator.so:MultiLora", ..., func_type="aot") calls. Inputs come first, the output last. An operator
// with the attribute `exact` has a second function, <Name>Exact, for the value true.
//
// Return values: 0; 1: an input has a wrong shape, dtype or value; 2: the strict emulator had a finding, which is a bug
// of the kernel. colora_emulator_error() has the text. COLORA_EMULATOR_CORES sets the number of cores (48).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/op_host/lora_tiling_core.h"
#include "contrastive_select/op_host/contrastive_select_tiling_core.h"
#include "lily_mix/op_host/lily_mix_tiling_core.h"
#include "multi_lora/op_host/multi_lora_tiling_core.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int emulator_launch(const char* name, int blocks, int cores, int n, void** pointers, const uint64_t* bytes,
                           const int* kinds, uint64_t seed, int flags);
EXPORT const char* emulator_report();

namespace {

thread_local std::string error_text;

int fail(const std::string& text) {
    error_text = text;
    std::fprintf(stderr, "colora emulator: %s\n", text.c_str());
    return 1;
}

// The arguments of one call, with what the operators ask about them.
struct Call {
    int count;
    void** data;
    int* ranks;
    int64_t** shapes;
    const char** dtypes;

    uint32_t dim(int i, int axis) const { return uint32_t(shapes[i][axis]); }
    uint64_t elements(int i) const {
        uint64_t n = 1;
        for (int k = 0; k < ranks[i]; ++k) n *= uint64_t(shapes[i][k]);
        return n;
    }
    std::string dtype(int i) const {
        for (const char* name : {"bfloat16", "float16", "float32", "int32", "uint8"}) {
            if (std::strstr(dtypes[i], name)) return name;
        }
        return dtypes[i];
    }
    uint64_t bytes(int i) const {
        const std::string name = dtype(i);
        return elements(i) * (name == "uint8" ? 1 : name == "float32" || name == "int32" ? 4 : 2);
    }
    std::string shape(int i) const {
        std::string text = "(";
        for (int k = 0; k < ranks[i]; ++k) text += (k ? ", " : "") + std::to_string(shapes[i][k]);
        return text + ")";
    }
};

uint32_t cores() {
    const char* text = std::getenv("COLORA_EMULATOR_CORES");
    const int n = text ? std::atoi(text) : 48;
    return n >= 1 && n <= 64 ? uint32_t(n) : 48;
}

// Launches kernel_<dtype of argument `typed`> with the call's arguments, a workspace and the tiling.
int launch(const std::string& kernel, const Call& call, int typed, uint64_t workspace, const void* tiling, uint64_t size, int outputs = 1) {
    const std::string dtype = call.dtype(typed);
    if (dtype == "int32" || dtype == "uint8") return fail(kernel + ": argument " + std::to_string(typed) + " must be a float tensor");
    std::vector<void*> pointers(call.data, call.data + call.count);
    std::vector<uint64_t> bytes;
    std::vector<int> kinds(size_t(call.count), 0);
    for (int i = 0; i < outputs; ++i) kinds[kinds.size() - 1 - size_t(i)] = 1;
    for (int i = 0; i < call.count; ++i) bytes.push_back(call.bytes(i));
    std::vector<char> scratch(workspace), plan(static_cast<const char*>(tiling), static_cast<const char*>(tiling) + size);
    pointers.insert(pointers.end(), {scratch.data(), plan.data()});
    bytes.insert(bytes.end(), {workspace, size});
    kinds.insert(kinds.end(), {2, 0});
    static uint64_t seed = 0;
    const int found = emulator_launch((kernel + "_" + dtype).c_str(), int(cores()), int(cores()), int(pointers.size()), pointers.data(),
                                      bytes.data(), kinds.data(), ++seed, 3);
    if (found == 0) return 0;
    fail(found < 0 ? kernel + ": no emulated kernel for " + dtype
                   : kernel + ": the emulator reports " + std::string(emulator_report()).substr(0, 2000));
    return 2;
}

int check_slots(const char* name, const Call& call, int argument, uint32_t bank) {
    const int32_t* slots = static_cast<const int32_t*>(call.data[argument]);
    if (call.dtype(argument) != "int32") return fail(std::string(name) + ": slots must be int32, not " + call.dtype(argument));
    for (uint64_t i = 0; i < call.elements(argument); ++i) {
        if (slots[i] < -1 || slots[i] >= int64_t(bank)) {
            return fail(std::string(name) + ": slots[" + std::to_string(i) + "] is " + std::to_string(slots[i]) +
                        ", expected -1.." + std::to_string(bank - 1));
        }
    }
    return 0;
}

int check_count(const char* name, const Call& call, int expected) {
    if (call.count == expected) return 0;
    return fail(std::string(name) + ": " + std::to_string(call.count) + " tensors, expected " + std::to_string(expected));
}

int check_shape(const char* name, const Call& call, int argument, const char* what, std::vector<int64_t> expected) {
    bool same = call.ranks[argument] == int(expected.size());
    for (size_t k = 0; same && k < expected.size(); ++k) same = call.shapes[argument][k] == expected[k];
    return same ? 0 : fail(std::string(name) + ": " + what + " has shape " + call.shape(argument));
}

}  // namespace

#define AOT_ARGUMENTS int nparam, void **params, int *ndims, int64_t **shapes, const char **dtypes, void *, void *
#define AOT_CALL \
    Call { nparam, params, ndims, shapes, dtypes }

EXPORT const char* colora_emulator_error() { return error_text.c_str(); }

// x, down, up (rank-major), scale, slots, y, ends -> y + scale (x . down^T) . up, slice by slice
EXPORT int MultiLora(AOT_ARGUMENTS) {
    const Call call = AOT_CALL;
    const char* name = "MultiLora";
    if (int bad = check_count(name, call, 8)) return bad;
    if (call.ranks[0] != 2 || call.ranks[1] != 3 || call.ranks[2] != 3) return fail("MultiLora: x is (tokens, in), down and up have 3 axes");
    const int64_t tokens = call.shapes[0][0], hidden = call.shapes[0][1], bank = call.shapes[1][0], rows = call.shapes[1][1],
                  rank = call.shapes[2][1], width = call.shapes[2][2], slices = int64_t(call.elements(6));
    if (int bad = check_shape(name, call, 1, "down", {bank, slices * rank, hidden})) return bad;
    if (int bad = check_shape(name, call, 2, "up (rank-major)", {bank, rank, width})) return bad;
    if (int bad = check_shape(name, call, 3, "scale", {bank, slices})) return bad;
    if (int bad = check_shape(name, call, 4, "slots", {tokens})) return bad;
    if (int bad = check_shape(name, call, 5, "y", {tokens, width})) return bad;
    if (int bad = check_shape(name, call, 6, "ends", {slices})) return bad;
    if (int bad = check_shape(name, call, 7, "out", {tokens, width})) return bad;
    for (int i : {1, 2, 5, 7}) {
        if (call.dtype(i) != call.dtype(0)) return fail("MultiLora: x, down, up and y must have one dtype");
    }
    if (call.dtype(3) != "float32" || call.dtype(6) != "int32") return fail("MultiLora: scale must be float32, ends int32");
    if (int bad = check_slots(name, call, 4, uint32_t(bank))) return bad;
    const int32_t* ends = static_cast<const int32_t*>(call.data[6]);
    for (int64_t i = 0; i < slices; ++i) {
        if (ends[i] <= (i ? ends[i - 1] : 0) || (i + 1 == slices && ends[i] != width)) {
            return fail("MultiLora: ends[" + std::to_string(i) + "] is " + std::to_string(ends[i]) + ", expected to ascend to " + std::to_string(width));
        }
    }
    const auto plan = colora::plan_multi_lora(uint32_t(tokens), uint32_t(hidden), uint32_t(rows), uint32_t(rank), uint32_t(width),
                                              uint32_t(bank), uint32_t(slices), cores(), call.dtype(0) == "float32" ? 4 : 2);
    if (!plan.error.empty()) return fail("MultiLora: " + plan.error);
    return launch("multi_lora", call, 0, plan.workspace, &plan.data, sizeof(plan.data));
}
// x, down, scale, slots -> h float32
EXPORT int LoraShrink(AOT_ARGUMENTS) {
    const Call call = AOT_CALL;
    const char* name = "LoraShrink";
    if (int bad = check_count(name, call, 5)) return bad;
    if (call.ranks[0] != 2 || call.ranks[1] != 3) return fail("LoraShrink: x is (tokens, in), down is (slots, rank, in)");
    const int64_t tokens = call.shapes[0][0], hidden = call.shapes[0][1], bank = call.shapes[1][0], rank = call.shapes[1][1];
    if (int bad = check_shape(name, call, 1, "down", {bank, rank, hidden})) return bad;
    if (int bad = check_shape(name, call, 2, "scale", {bank})) return bad;
    if (int bad = check_shape(name, call, 3, "slots", {tokens})) return bad;
    if (int bad = check_shape(name, call, 4, "h", {tokens, rank})) return bad;
    if (call.dtype(1) != call.dtype(0) || call.dtype(2) != "float32" || call.dtype(4) != "float32") {
        return fail("LoraShrink: x and down must have one dtype, scale and h are float32");
    }
    if (int bad = check_slots(name, call, 3, uint32_t(bank))) return bad;
    const auto plan = colora::plan_lora(uint32_t(tokens), uint32_t(hidden), uint32_t(rank), 1, 1, 0, uint32_t(bank), cores(),
                                        call.dtype(0) == "float32" ? 4 : 2, call.dtype(0) == "float16", false);
    if (!plan.error.empty()) return fail("LoraShrink: " + plan.error);
    return launch("lora_shrink", call, 0, plan.workspace, &plan.data, sizeof(plan.data));
}

// h float32, up (rank-major), slots, y -> y + h . up
static int expand(const char* name, const Call& call, bool exact) {
    if (int bad = check_count(name, call, 5)) return bad;
    if (call.ranks[0] != 2 || call.ranks[1] != 3) return fail(std::string(name) + ": h is (tokens, rank), up is (slots, rank, out)");
    const int64_t tokens = call.shapes[0][0], rank = call.shapes[0][1], bank = call.shapes[1][0], width = call.shapes[1][2];
    if (int bad = check_shape(name, call, 1, "up (rank-major)", {bank, rank, width})) return bad;
    if (int bad = check_shape(name, call, 2, "slots", {tokens})) return bad;
    if (int bad = check_shape(name, call, 3, "y", {tokens, width})) return bad;
    if (int bad = check_shape(name, call, 4, "out", {tokens, width})) return bad;
    if (call.dtype(0) != "float32" || call.dtype(1) != call.dtype(3)) return fail(std::string(name) + ": h is float32, up and y have one dtype");
    if (int bad = check_slots(name, call, 2, uint32_t(bank))) return bad;
    const auto plan = colora::plan_lora(uint32_t(tokens), 1, uint32_t(rank), uint32_t(width), uint32_t(width), 0, uint32_t(bank), cores(),
                                        call.dtype(1) == "float32" ? 4 : 2, call.dtype(1) == "float16", exact);
    if (!plan.error.empty()) return fail(std::string(name) + ": " + plan.error);
    return launch("lora_expand", call, 1, plan.workspace, &plan.data, sizeof(plan.data));
}
EXPORT int LoraExpand(AOT_ARGUMENTS) { return expand("LoraExpand", AOT_CALL, false); }
EXPORT int LoraExpandExact(AOT_ARGUMENTS) { return expand("LoraExpandExact", AOT_CALL, true); }

// h float32, weights float32 (the router's), up (slots, experts, rank, out), scale, slots, y -> y + scale h . sum w_e up_e
static int mix(const char* name, const Call& call, bool exact) {
    if (int bad = check_count(name, call, 7)) return bad;
    if (call.ranks[0] != 2 || call.ranks[2] != 4) return fail(std::string(name) + ": h is (tokens, rank), up is (slots, experts, rank, out)");
    const int64_t tokens = call.shapes[0][0], rank = call.shapes[0][1], bank = call.shapes[2][0], experts = call.shapes[2][1],
                  width = call.shapes[2][3];
    if (int bad = check_shape(name, call, 1, "weights", {tokens, experts})) return bad;
    if (int bad = check_shape(name, call, 2, "up (rank-major)", {bank, experts, rank, width})) return bad;
    if (int bad = check_shape(name, call, 3, "scale", {bank})) return bad;
    if (int bad = check_shape(name, call, 4, "slots", {tokens})) return bad;
    if (int bad = check_shape(name, call, 5, "y", {tokens, width})) return bad;
    if (int bad = check_shape(name, call, 6, "out", {tokens, width})) return bad;
    for (int i : {0, 1, 3}) {
        if (call.dtype(i) != "float32") return fail(std::string(name) + ": h, weights and scale must be float32");
    }
    if (call.dtype(2) != call.dtype(5) || call.dtype(2) != call.dtype(6)) return fail(std::string(name) + ": up, y and out must have one dtype");
    if (int bad = check_slots(name, call, 4, uint32_t(bank))) return bad;
    const auto plan = colora::plan_lily_mix(uint32_t(tokens), uint32_t(experts), uint32_t(rank), uint32_t(width), uint32_t(width), 0, uint32_t(bank),
                                            cores(), call.dtype(2) == "float32" ? 4 : 2, call.dtype(2) == "float16", exact);
    if (!plan.error.empty()) return fail(std::string(name) + ": " + plan.error);
    return launch("lily_mix", call, 2, plan.workspace, &plan.data, sizeof(plan.data));
}
EXPORT int LilyMix(AOT_ARGUMENTS) { return mix("LilyMix", AOT_CALL, false); }
EXPORT int LilyMixExact(AOT_ARGUMENTS) { return mix("LilyMixExact", AOT_CALL, true); }

// logits, mix_rows, weights, log_alpha -> ints (token, favourite, valid), floats (score, largest, the rows' logits)
EXPORT int ContrastiveSelect(AOT_ARGUMENTS) {
    const Call call = AOT_CALL;
    const char* name = "ContrastiveSelect";
    if (int bad = check_count(name, call, 6)) return bad;
    if (call.ranks[0] != 2 || call.ranks[1] != 2) return fail("ContrastiveSelect: logits is (rows, vocabulary), mix_rows (requests, voices)");
    const int64_t rows = call.shapes[0][0], vocab = call.shapes[0][1], requests = call.shapes[1][0], voices = call.shapes[1][1];
    if (int bad = check_shape(name, call, 2, "weights", {requests, voices})) return bad;
    if (int bad = check_shape(name, call, 3, "log_alpha", {requests})) return bad;
    if (int bad = check_shape(name, call, 4, "ints", {requests, 3})) return bad;
    if (int bad = check_shape(name, call, 5, "floats", {requests, 2 + voices})) return bad;
    if (call.dtype(1) != "int32" || call.dtype(4) != "int32") return fail("ContrastiveSelect: mix_rows and ints must be int32");
    for (int i : {2, 3, 5}) {
        if (call.dtype(i) != "float32") return fail("ContrastiveSelect: weights, log_alpha and floats must be float32");
    }
    const int32_t* chosen = static_cast<const int32_t*>(call.data[1]);
    for (uint64_t i = 0; i < call.elements(1); ++i) {
        if (chosen[i] < -1 || chosen[i] >= rows) {
            return fail("ContrastiveSelect: mix_rows holds " + std::to_string(chosen[i]) + ", expected -1.." + std::to_string(rows - 1));
        }
    }
    const auto plan = colora::plan_contrastive_select(uint32_t(rows), uint32_t(vocab), uint32_t(requests), uint32_t(voices), cores(),
                                                      call.dtype(0) == "float32" ? 4 : 2);
    if (!plan.error.empty()) return fail("ContrastiveSelect: " + plan.error);
    return launch("contrastive_select", call, 0, plan.workspace, &plan.data, sizeof(plan.data), 2);
}
