// Stand-ins of the paged cache and of attention for inference: lengths come by name from the graph's inputs.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "call.h"

using rehearsal::Call;
using rehearsal::Type;

namespace {

constexpr float kMasked = -10000.0f;

// The lengths of one name, or a sentence why there are none.
const std::vector<int32_t>* named(const Call& call, const char* name, const char* other = nullptr) {
    const std::vector<int32_t>* found = rehearsal::lengths(name);
    if (!found && other) found = rehearsal::lengths(other);
    if (found) return found;
    const std::string either = std::string("'") + name + (other ? std::string("' or '") + other : "") + "'";
    if (rehearsal::started()) {
        call.fail("the graph has no input named " + either + "; the operator reads its lengths on the host from the input "
                  "of that name of the top Cell's construct (int32), whatever tensor stands in its own arguments");
    } else {
        call.fail("the graph did not start as a Cell, so that its inputs have no names: lengths named " + either +
                  " are read when a Cell's graph starts");
    }
    return nullptr;
}

int64_t total(const std::vector<int32_t>& lengths) {
    int64_t sum = 0;
    for (const int32_t n : lengths) sum += n;
    return sum;
}

bool same(const Call& call, int argument, const std::vector<int32_t>& lengths) {
    if (call.elements(argument) != int64_t(lengths.size())) return false;
    return std::equal(lengths.begin(), lengths.end(), call.ints(argument));
}

// softmax(scores) . values for one query head; scores hold `n` numbers, a value row is `stride` floats from the next.
void mix(std::vector<float>& scores, int64_t n, const float* values, int64_t stride, int64_t dim, float* y) {
    float top = -INFINITY, sum = 0;
    for (int64_t k = 0; k < n; ++k) top = std::max(top, scores[size_t(k)]);
    for (int64_t k = 0; k < n; ++k) sum += scores[size_t(k)] = std::exp(scores[size_t(k)] - top);
    std::fill(y, y + dim, 0.0f);
    for (int64_t k = 0; k < n; ++k) {
        const float weight = scores[size_t(k)] / sum;
        for (int64_t d = 0; d < dim; ++d) y[d] += weight * values[k * stride + d];
    }
}

float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
    return sum;
}

}  // namespace

// key, value (1, tokens, hidden), caches (blocks, block, heads, dim) written in place, slots -> key
STAND_IN(ReshapeAndCache, "ReshapeAndCache") {
    const int64_t tokens = call.elements(4), places = call.dim(2, 0) * call.dim(2, 1), hidden = call.dim(2, 2) * call.dim(2, 3);
    const size_t row = size_t(hidden) * (call.type(2) == Type::i8 ? 1 : 2);
    std::vector<char> taken(size_t(places), 0);
    for (int64_t t = 0; t < tokens; ++t) {
        const int32_t slot = call.ints(4)[t];
        if (slot < -1 || slot >= places) {
            return call.fail("slot_mapping[" + std::to_string(t) + "] is " + std::to_string(slot) + ", expected -1 (skip) or a place 0.." +
                             std::to_string(places - 1) + " of the cache");
        }
        if (slot >= 0 && taken[size_t(slot)]++) {
            return call.fail("slot_mapping has place " + std::to_string(slot) + " twice; which token wins is not defined");
        }
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const int32_t slot = call.ints(4)[t];
        if (slot < 0) continue;
        for (int which = 0; which < 2; ++which) {
            std::memcpy(static_cast<char*>(call.data[2 + which]) + size_t(slot) * row,
                        static_cast<const char*>(call.data[which]) + size_t(t) * row, row);
        }
    }
    std::memcpy(call.data[5], call.data[0], size_t(tokens) * row);
    return 0;
}

// query, caches, block_tables, context_lens, attn_mask, q_seq_lens, head_num, scale, kv_head_num -> query's shape
STAND_IN(PagedAttention, "PagedAttention") {
    const int64_t heads = call.whole(7), kv_heads = call.whole(9), dim = call.dim(1, 3), block = call.dim(1, 1),
                  blocks = call.dim(1, 0), rows = call.dim(3, 0), width = call.dim(3, 1),
                  tokens = call.elements(0) / (heads * dim), hidden = kv_heads * dim;
    const float scale = call.real(8);
    if (rehearsal::started() && !rehearsal::infer_boost()) {
        return call.fail("jit_config has no infer_boost on: there is no kernel of this operator without it");
    }
    const auto* kv = named(call, "batch_valid_length");
    if (!kv) return 1;
    if (int64_t(kv->size()) != rows || !same(call, 4, *kv)) {
        return call.fail("the graph's input batch_valid_length differs from the argument context_lens; pass one tensor as both");
    }
    std::vector<int32_t> queries(size_t(rows), 1);
    const auto* given = rehearsal::lengths("q_seq_lens");
    if (call.given(6)) {
        if (!given && !named(call, "q_seq_lens")) return 1;
        if (!same(call, 6, *given)) return call.fail("the graph's input q_seq_lens differs from the argument; pass one tensor as both");
        queries = *given;
    }
    if (int64_t(queries.size()) != rows || total(queries) != tokens) {
        return call.fail("the query has " + std::to_string(tokens) + " tokens, the lengths of the " + std::to_string(rows) +
                         " rows sum to " + std::to_string(total(queries)) + (call.given(6) ? "" : " (one a row without q_seq_lens)"));
    }
    const bool several = *std::max_element(queries.begin(), queries.end()) > 1, masked = call.given(5);
    const bool plain = masked && call.elements(5) == 1;  // zeros of (1, 1): what a graph passes whose mask is for chunks
    if (several && (!masked || plain)) {
        return call.fail("several query tokens a row need attn_mask (tokens, positions), 0 or -10000: without it a token sees its future");
    }
    const int64_t reach = masked && !plain ? call.dim(5, -1) : 0;
    if (masked && !plain && call.elements(5) != tokens * reach) {
        return call.fail("attn_mask has shape " + call.shape(5) + ", expected (" + std::to_string(tokens) + ", positions)");
    }
    call.poison(10);
    int64_t token = 0;
    std::vector<float> keys, values, mask(size_t(std::max<int64_t>(reach, 1))), q(size_t(heads * dim)), y(size_t(heads * dim)), scores;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = (*kv)[size_t(r)], asked = queries[size_t(r)];
        const std::string row = "row " + std::to_string(r);
        if (asked < 1 || n < asked) {
            return call.fail(row + ": batch_valid_length is " + std::to_string(n) + " with " + std::to_string(asked) +
                             " query tokens, expected at least those and at least 1 (it counts the new tokens; point an idle row at a block of its own)");
        }
        if (n > width * block) {
            return call.fail(row + ": batch_valid_length " + std::to_string(n) + " is above the " + std::to_string(width * block) + " places of block_tables");
        }
        keys.resize(size_t(n * hidden)), values.resize(size_t(n * hidden)), scores.resize(size_t(n));
        for (int64_t p = 0; p < n; ++p) {
            const int32_t at = call.ints(3)[r * width + p / block];
            if (at < 0 || at >= blocks) {
                return call.fail(row + ": block " + std::to_string(at) + " of block_tables, expected 0.." + std::to_string(blocks - 1));
            }
            call.read(1, (at * block + p % block) * hidden, hidden, keys.data() + p * hidden);
            call.read(2, (at * block + p % block) * hidden, hidden, values.data() + p * hidden);
        }
        for (int64_t t = 0; t < asked; ++t, ++token) {
            call.read(0, token * heads * dim, heads * dim, q.data());
            if (masked && !plain) {
                if (reach < n) return call.fail("attn_mask covers " + std::to_string(reach) + " positions, " + row + " has " + std::to_string(n));
                call.read(5, token * reach, reach, mask.data());
                for (int64_t p = 0; p < n; ++p) {
                    const float wanted = p <= n - asked + t ? 0.0f : kMasked, rounded = call.type(5) == Type::bf16 ? rehearsal::from_bf16(rehearsal::to_bf16(wanted)) : wanted;
                    if (mask[size_t(p)] != rounded) {
                        return call.fail("attn_mask[" + std::to_string(token) + ", " + std::to_string(p) + "] is " + std::to_string(mask[size_t(p)]) +
                                         ", expected " + std::to_string(rounded) + " (0 for positions up to the token's own, -10000 behind)");
                    }
                }
            } else if (plain) {
                float zero;
                call.read(5, 0, 1, &zero);
                if (zero != 0) return call.fail("attn_mask of one element must be 0, it is " + std::to_string(zero));
            }
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t at = h / (heads / kv_heads) * dim;
                for (int64_t p = 0; p < n; ++p) {
                    scores[size_t(p)] = scale * dot(q.data() + h * dim, keys.data() + p * hidden + at, dim) + (reach ? mask[size_t(p)] : 0.0f);
                }
                mix(scores, n, values.data() + at, hidden, dim, y.data() + h * dim);
            }
            call.write(10, token * heads * dim, heads * dim, y.data());
        }
    }
    return 0;
}

// query, key, value (tokens, hidden), mask (128, 128), head_num, scale -> the result. Layout TH, sequences of new tokens.
STAND_IN(FlashAttentionScore, "FlashAttentionScore") {
    const int64_t heads = call.whole(4), tokens = call.dim(0, 0), dim = call.dim(0, 1) / heads, hidden = call.dim(1, 1),
                  kv_heads = hidden / dim;
    const float scale = call.real(5);
    const auto* queries = named(call, "actual_seq_qlen", "q_seq_lens");
    if (!queries) return 1;
    const auto* keys_of = named(call, "actual_seq_kvlen", "batch_valid_length");
    if (!keys_of) return 1;
    if (*queries != *keys_of) {
        return call.fail("query and key lengths differ: layout TH attends within the call's own tokens; a prompt that continues a cached one goes to PagedAttention");
    }
    if (total(*queries) != tokens || *std::min_element(queries->begin(), queries->end()) < 1) {
        return call.fail("the lengths (each at least 1) sum to " + std::to_string(total(*queries)) + ", query has " + std::to_string(tokens) +
                         " tokens; give tokens that only fill to a sequence of their own");
    }
    const float wanted = call.type(3) == Type::bf16 ? 1.0f : kMasked;
    const std::vector<float> mask = call.all(3);
    for (int64_t i = 0; i < 128; ++i) {
        for (int64_t j = 0; j < 128; ++j) {
            if (mask[size_t(i * 128 + j)] != (j > i ? wanted : 0.0f)) {
                return call.fail("attn_mask[" + std::to_string(i) + ", " + std::to_string(j) + "] is " + std::to_string(mask[size_t(i * 128 + j)]) + ", expected " +
                                 std::to_string(j > i ? wanted : 0.0f) + ": above the diagonal 1 in bfloat16, -10000 in float16; another value attends to the future in silence");
            }
        }
    }
    const std::vector<float> q = call.all(0), k = call.all(1), v = call.all(2);
    int64_t begin = 0;
    for (const int32_t n : *queries) {
#pragma omp parallel for if (tokens * tokens * heads * dim > 1 << 20)
        for (int64_t t = 0; t < n; ++t) {
            std::vector<float> scores(size_t(t) + 1), y(size_t(heads * dim));
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t at = begin * hidden + h / (heads / kv_heads) * dim;
                for (int64_t p = 0; p <= t; ++p) {
                    scores[size_t(p)] = scale * dot(q.data() + (begin + t) * heads * dim + h * dim, k.data() + at + p * hidden, dim);
                }
                mix(scores, t + 1, v.data() + at, hidden, dim, y.data() + h * dim);
            }
            call.write(6, (begin + t) * heads * dim, heads * dim, y.data());
        }
        begin += n;
    }
    return 0;
}
