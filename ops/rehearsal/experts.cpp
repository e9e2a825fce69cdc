// Stand-ins of the operators around routed experts: who computes a token, tokens by expert, and back.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

#include "call.h"

using rehearsal::Call;

namespace {

constexpr int32_t kGarbage = std::numeric_limits<int32_t>::min();  // what is not written must not look like a number

// "name[t, j] is value" of the call's argument.
std::string is_at(const std::string& name, int64_t t, int64_t j, const std::string& value) {
    return name + "[" + std::to_string(t) + ", " + std::to_string(j) + "] is " + value;
}

std::string below(int64_t end) { return ", expected 0.." + std::to_string(end - 1) + " (the device does not check)"; }

int32_t* ints_of(const Call& call, int i) { return static_cast<int32_t*>(call.data[i]); }

}  // namespace

// x (tokens, experts), k -> the k largest numbers of the softmax, their experts, and row_idx (j * tokens + i). Equal
// ones in the experts' order, which the operator does not promise.
STAND_IN(MoeGatingTopKSoftmax, "MoeGatingTopKSoftmax") {
    const int64_t tokens = call.dim(0, 0), experts = call.dim(0, 1), k = call.whole(1);
    std::vector<float> x(static_cast<size_t>(experts));
    std::vector<int32_t> order(static_cast<size_t>(experts));
    for (int64_t t = 0; t < tokens; ++t) {
        call.read(0, t * experts, experts, x.data());
        for (int64_t e = 0; e < experts; ++e) {
            if (!std::isfinite(x[size_t(e)])) {
                return call.fail(is_at("x", t, e, std::to_string(x[size_t(e)])) +
                                 ", expected finite numbers: which experts the row gets is not told otherwise");
            }
        }
        const float most = *std::max_element(x.begin(), x.end());
        float sum = 0;
        for (float& value : x) sum += value = std::exp(value - most);
        for (float& value : x) value /= sum;
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[size_t(a)] > x[size_t(b)]; });
        for (int64_t j = 0; j < k; ++j) {
            call.write(2, t * k + j, 1, &x[size_t(order[size_t(j)])]);
            ints_of(call, 3)[t * k + j] = order[size_t(j)];
            ints_of(call, 4)[t * k + j] = int32_t(j * tokens + t);
        }
    }
    return 0;
}

// x (tokens, hidden), expert_idx (tokens, k), expert_num -> expanded_x (tokens * k, hidden) sorted by expert,
// expanded_row_idx (tokens * k), how many each expert has, and what is written in the dropping mode alone.
STAND_IN(MoeInitRoutingV2, "MoeInitRoutingV2") {
    const int64_t k = call.dim(1, 1), rows = call.elements(1), hidden = call.dim(0, 1), experts = call.whole(2);
    const int32_t* chosen = call.ints(1);
    int32_t *places = ints_of(call, 4), *sizes = ints_of(call, 5);
    std::fill(sizes, sizes + experts, 0);
    std::fill(ints_of(call, 6), ints_of(call, 6) + experts, kGarbage);
    std::vector<int64_t> order(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
        if (chosen[i] < 0 || chosen[i] >= experts) {
            return call.fail(is_at("expert_idx", i / k, i % k, std::to_string(chosen[i])) + below(experts));
        }
        ++sizes[chosen[i]];
        order[size_t(i)] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return chosen[a] < chosen[b]; });
    const size_t row = size_t(hidden) * call.width();
    for (int64_t i = 0; i < rows; ++i) {
        places[order[size_t(i)]] = int32_t(i);
        std::memcpy(static_cast<char*>(call.data[3]) + size_t(i) * row,
                    static_cast<const char*>(call.data[0]) + size_t(order[size_t(i)] / k) * row, row);
    }
    return 0;
}

// permuted_tokens (tokens * k, hidden), sorted_indices (tokens * k), probs (tokens, k) -> (tokens, hidden)
STAND_IN(MoeTokenUnpermute, "MoeTokenUnpermute") {
    const int64_t tokens = call.dim(2, 0), k = call.dim(2, 1), hidden = call.dim(0, 1), rows = tokens * k;
    const int32_t* places = call.ints(1);
    std::vector<bool> seen(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
        if (places[i] < 0 || places[i] >= rows) {
            return call.fail("sorted_indices[" + std::to_string(i) + "] is " + std::to_string(places[i]) + below(rows));
        }
        if (seen[size_t(places[i])]) {
            return call.fail("sorted_indices has " + std::to_string(places[i]) + " twice, also at " +
                             std::to_string(i));
        }
        seen[size_t(places[i])] = true;
    }
    const std::vector<float> shares = call.all(2);
    std::vector<float> y(static_cast<size_t>(hidden)), sum(static_cast<size_t>(hidden));
    for (int64_t t = 0; t < tokens; ++t) {
        std::fill(sum.begin(), sum.end(), 0.f);
        for (int64_t j = 0; j < k; ++j) {
            call.read(0, places[t * k + j] * hidden, hidden, y.data());
            for (int64_t c = 0; c < hidden; ++c) sum[size_t(c)] += y[size_t(c)] * shares[size_t(t * k + j)];
        }
        call.write(3, t * hidden, hidden, sum.data());
    }
    return 0;
}

// x (rows, columns), factors (rows, 1) -> their product, rounded once.
STAND_IN(Mul, "Mul") {
    const int64_t rows = call.dim(0, 0), columns = call.dim(0, 1);
    const std::vector<float> factors = call.all(1);
    std::vector<float> x = call.all(0);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) x[size_t(r * columns + c)] *= factors[size_t(r)];
    }
    call.write(2, 0, rows * columns, x.data());
    return 0;
}
