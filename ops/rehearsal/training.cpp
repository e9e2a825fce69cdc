// Stand-ins of attention for training: FlashAttentionScore, layout BSH, sparse_mode 2 (causal) and 1 (the whole mask), and
// its gradient.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "call.h"

using rehearsal::Call;

namespace {

struct Shape {
    int64_t rows, tokens, heads, kv_heads, dim, hidden, held;
};

Shape shape_of(const Call& call, int64_t heads) {
    const int64_t hidden = call.dim(0, 2), dim = hidden / heads, held = call.dim(1, 2);
    return {call.dim(0, 0), call.dim(0, 1), heads, held / dim, dim, hidden, held};
}

float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
    return sum;
}

// What query t of row r may see, from a mask (2048, 2048) of sparse_mode 2 or (rows, 1, tokens, tokens) of sparse_mode 1.
struct Sight {
    const uint8_t* mask;
    bool whole;
    int64_t tokens;

    Sight(const Call& call, int argument)
        : mask(static_cast<const uint8_t*>(call.data[argument])), whole(call.ranks[argument] == 4), tokens(call.dim(0, 1)) {}
    bool operator()(int64_t r, int64_t t, int64_t p) const { return whole ? !mask[(r * tokens + t) * tokens + p] : p <= t; }
};

// sparse_mode 2: 1 above the diagonal, whatever the length. sparse_mode 1: 0 and 1, and each query sees a key.
int check_mask(const Call& call, int argument) {
    const Sight sees(call, argument);
    const int64_t side = call.dim(argument, -1), lines = call.elements(argument) / side;
    for (int64_t i = 0; i < lines; ++i) {
        bool any = false;
        for (int64_t j = 0; j < side; ++j) {
            const uint8_t value = sees.mask[i * side + j];
            any |= !value;
            if (sees.whole ? value > 1 : value != (j > i)) {
                return call.fail("attn_mask[" + std::to_string(i) + ", " + std::to_string(j) + "] is " + std::to_string(value) +
                                 (sees.whole ? ", expected 0 or 1" : ", expected " + std::to_string(j > i) +
                                  ": sparse_mode 2 wants 1 above the diagonal and 0 elsewhere"));
            }
        }
        if (!any) return call.fail("query " + std::to_string(i) + " sees no key; its softmax has no value");
    }
    return 0;
}

}  // namespace

// query, key, value, mask, head_num, scale -> softmax_max, softmax_sum (rows, heads, tokens, 8), softmax_out, result
STAND_IN(FlashAttentionScoreBSH, "FlashAttentionScore") {
    const float scale = call.real(5);
    const Shape s = shape_of(call, call.whole(4));
    if (int bad = check_mask(call, 3)) return bad;
    const Sight sees(call, 3);
    const std::vector<float> q = call.all(0), k = call.all(1), v = call.all(2);
    const float nothing = 0;
    call.write(8, 0, 1, &nothing);
    std::vector<float> scores(static_cast<size_t>(s.tokens)), y(static_cast<size_t>(s.dim));
    for (int64_t r = 0; r < s.rows; ++r) {
        for (int64_t h = 0; h < s.heads; ++h) {
            const int64_t at = r * s.tokens * s.held + h / (s.heads / s.kv_heads) * s.dim;
            for (int64_t t = 0; t < s.tokens; ++t) {
                const float* one = q.data() + (r * s.tokens + t) * s.hidden + h * s.dim;
                float top = -INFINITY, sum = 0;
                for (int64_t p = 0; p < s.tokens; ++p) {
                    scores[size_t(p)] = sees(r, t, p) ? scale * dot(one, k.data() + at + p * s.held, s.dim) : -INFINITY;
                    top = std::max(top, scores[size_t(p)]);
                }
                for (int64_t p = 0; p < s.tokens; ++p) sum += scores[size_t(p)] = std::exp(scores[size_t(p)] - top);
                std::fill(y.begin(), y.end(), 0.f);
                for (int64_t p = 0; p < s.tokens; ++p) {
                    for (int64_t d = 0; d < s.dim; ++d) y[size_t(d)] += scores[size_t(p)] / sum * v[size_t(at + p * s.held + d)];
                }
                call.write(9, (r * s.tokens + t) * s.hidden + h * s.dim, s.dim, y.data());
                const float tops[8] = {top, top, top, top, top, top, top, top}, sums[8] = {sum, sum, sum, sum, sum, sum, sum, sum};
                call.write(6, ((r * s.heads + h) * s.tokens + t) * 8, 8, tops);
                call.write(7, ((r * s.heads + h) * s.tokens + t) * 8, 8, sums);
            }
        }
    }
    return 0;
}

// query, key, value, dy, mask, softmax_max, softmax_sum, result, head_num, scale -> dq, dk, dv
STAND_IN(FlashAttentionScoreGrad, "FlashAttentionScoreGrad") {
    const float scale = call.real(9);
    const Shape s = shape_of(call, call.whole(8));
    const Sight sees(call, 4);
    const std::vector<float> q = call.all(0), k = call.all(1), v = call.all(2), dy = call.all(3), top = call.all(5), sum = call.all(6), y = call.all(7);
    std::vector<float> dq(q.size(), 0.f), dk(k.size(), 0.f), dv(v.size(), 0.f);
    for (int64_t r = 0; r < s.rows; ++r) {
        for (int64_t h = 0; h < s.heads; ++h) {
            const int64_t at = r * s.tokens * s.held + h / (s.heads / s.kv_heads) * s.dim;
            for (int64_t t = 0; t < s.tokens; ++t) {
                const int64_t own = (r * s.tokens + t) * s.hidden + h * s.dim, row = ((r * s.heads + h) * s.tokens + t) * 8;
                const float through = dot(dy.data() + own, y.data() + own, s.dim);
                for (int64_t p = 0; p < s.tokens; ++p) {
                    if (!sees(r, t, p)) continue;
                    const int64_t other = at + p * s.held;
                    const float weight = std::exp(scale * dot(q.data() + own, k.data() + other, s.dim) - top[size_t(row)]) / sum[size_t(row)];
                    const float back = scale * weight * (dot(dy.data() + own, v.data() + other, s.dim) - through);
                    for (int64_t d = 0; d < s.dim; ++d) {
                        dq[size_t(own + d)] += back * k[size_t(other + d)];
                        dk[size_t(other + d)] += back * q[size_t(own + d)];
                        dv[size_t(other + d)] += weight * dy[size_t(own + d)];
                    }
                }
            }
        }
    }
    call.write(10, 0, int64_t(dq.size()), dq.data());
    call.write(11, 0, int64_t(dk.size()), dk.data());
    call.write(12, 0, int64_t(dv.size()), dv.data());
    return 0;
}
