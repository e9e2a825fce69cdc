// Stand-ins of the operators that look at one token at a time: norms, rotation, activation, products, gather.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "call.h"

using rehearsal::Call;

namespace {

// y = x / sqrt(mean(x^2) + eps) * gamma and 1 / sqrt(...), for one row.
float normalise(const float* x, const float* gamma, float eps, int64_t n, float* y) {
    float sum = 0;
    for (int64_t k = 0; k < n; ++k) sum += x[k] * x[k];
    const float inverse = 1.0f / std::sqrt(sum / float(n) + eps);
    for (int64_t k = 0; k < n; ++k) y[k] = x[k] * inverse * gamma[k];
    return inverse;
}

}  // namespace

// x, gamma, epsilon -> y, rstd
STAND_IN(RmsNorm, "RmsNorm") {
    const int64_t hidden = call.dim(0, -1), rows = call.elements(0) / hidden;
    const float eps = call.real(2);
    if (!(eps > 0 && eps <= 1)) return call.fail("epsilon is " + std::to_string(eps) + ", expected a number in (0, 1]");
    const std::vector<float> gamma = call.all(1);
    std::vector<float> x(size_t(hidden), 0.f), y(size_t(hidden), 0.f);
    for (int64_t r = 0; r < rows; ++r) {
        call.read(0, r * hidden, hidden, x.data());
        const float inverse = normalise(x.data(), gamma.data(), eps, hidden, y.data());
        call.write(3, r * hidden, hidden, y.data());
        call.write(4, r, 1, &inverse);
    }
    return 0;
}

// x1, x2, gamma, epsilon -> y, rstd, x1 + x2; y is that of the sum before it is rounded.
STAND_IN(AddRmsNorm, "AddRmsNorm") {
    const int64_t hidden = call.dim(0, -1), rows = call.elements(0) / hidden;
    const float eps = call.real(3);
    if (!(eps > 0 && eps <= 1)) return call.fail("epsilon is " + std::to_string(eps) + ", expected a number in (0, 1]");
    const std::vector<float> gamma = call.all(2);
    std::vector<float> a(size_t(hidden), 0.f), b(size_t(hidden), 0.f), y(size_t(hidden), 0.f);
    for (int64_t r = 0; r < rows; ++r) {
        call.read(0, r * hidden, hidden, a.data());
        call.read(1, r * hidden, hidden, b.data());
        for (int64_t k = 0; k < hidden; ++k) a[size_t(k)] += b[size_t(k)];
        const float inverse = normalise(a.data(), gamma.data(), eps, hidden, y.data());
        call.write(4, r * hidden, hidden, y.data());
        call.write(5, r, 1, &inverse);
        call.write(6, r * hidden, hidden, a.data());
    }
    return 0;
}

// query, key (tokens, hidden), cos, sin (tokens, head_dim), lengths, cos_format -> query, key. Format 2: one row of
// cos a token, both halves alike, the halves convention.
STAND_IN(ApplyRotaryPosEmb, "ApplyRotaryPosEmb") {
    const int64_t tokens = call.dim(0, 0), dim = call.dim(2, 1), half = dim / 2;
    std::vector<float> cosine(size_t(dim), 0.f), sine(size_t(dim), 0.f), x(size_t(dim), 0.f), y(size_t(dim), 0.f);
    for (int64_t t = 0; t < tokens; ++t) {
        call.read(2, t * dim, dim, cosine.data());
        call.read(3, t * dim, dim, sine.data());
        for (int64_t k = 0; k < half; ++k) {
            if (cosine[size_t(k)] != cosine[size_t(k + half)] || sine[size_t(k)] != sine[size_t(k + half)]) {
                return call.fail("row " + std::to_string(t) + " of cos or sin has two halves that differ; format 2 wants them alike");
            }
        }
        for (int which = 0; which < 2; ++which) {
            const int64_t hidden = call.dim(which, 1);
            for (int64_t head = 0; head < hidden / dim; ++head) {
                const int64_t at = t * hidden + head * dim;
                call.read(which, at, dim, x.data());
                for (int64_t k = 0; k < half; ++k) {
                    const size_t i = size_t(k), j = size_t(k + half);
                    y[i] = x[i] * cosine[i] - x[j] * sine[i];
                    y[j] = x[j] * cosine[j] + x[i] * sine[j];
                }
                call.write(6 + which, at, dim, y.data());
            }
        }
    }
    return 0;
}

// input (..., 2 n), dim -> silu(first half) * second half
STAND_IN(Swiglu, "Swiglu") {
    const int64_t width = call.dim(0, -1), n = width / 2, rows = call.elements(0) / width;
    std::vector<float> x(size_t(width), 0.f), y(size_t(n), 0.f);
    for (int64_t r = 0; r < rows; ++r) {
        call.read(0, r * width, width, x.data());
        for (int64_t k = 0; k < n; ++k) y[size_t(k)] = x[size_t(k)] / (1.0f + std::exp(-x[size_t(k)])) * x[size_t(k + n)];
        call.write(2, r * n, n, y.data());
    }
    return 0;
}

// x (rows, in), weight (out, in) -> (rows, out)
STAND_IN(MatMul, "MatMul") {
    const int64_t rows = call.dim(0, 0), in = call.dim(0, 1), out = call.dim(1, 0), block = 64;
    const std::vector<float> x = call.all(0);
#pragma omp parallel for if (rows * in * out > 1 << 20)
    for (int64_t from = 0; from < out; from += block) {
        const int64_t width = std::min(block, out - from);
        std::vector<float> weight(size_t(width * in)), y(size_t(rows * width));
        call.read(1, from * in, width * in, weight.data());
        rehearsal::product(x.data(), weight.data(), y.data(), rows, in, width);
        for (int64_t r = 0; r < rows; ++r) call.write(2, r * out + from, width, y.data() + r * width);
    }
    return 0;
}

// x (rows, in), matrix (in, out) -> (rows, out)
STAND_IN(Product, "MatMul") {
    const int64_t rows = call.dim(0, 0), in = call.dim(0, 1), out = call.dim(1, 1);
    const std::vector<float> x = call.all(0), matrix = call.all(1);
    std::vector<float> y(size_t(rows * out), 0.f);
#pragma omp parallel for if (rows * in * out > 1 << 20)
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < in; ++k) {
            const float factor = x[size_t(r * in + k)];
            for (int64_t c = 0; c < out; ++c) y[size_t(r * out + c)] += factor * matrix[size_t(k * out + c)];
        }
    }
    call.write(2, 0, rows * out, y.data());
    return 0;
}

// mask, x of one shape, other (1,) -> x where the mask is true, other elsewhere
STAND_IN(Select, "Select") {
    const int64_t n = call.elements(1);
    const uint8_t* mask = static_cast<const uint8_t*>(call.data[0]);
    std::vector<float> x = call.all(1);
    const float other = call.all(2)[0];
    for (int64_t k = 0; k < n; ++k) {
        if (!mask[k]) x[size_t(k)] = other;
    }
    call.write(3, 0, n, x.data());
    return 0;
}

// table (rows, width), indices -> table[indices]
STAND_IN(Gather, "Gather") {
    const int64_t rows = call.dim(0, 0), width = call.elements(0) / rows, count = call.elements(1);
    const size_t each = call.width();
    for (int64_t k = 0; k < count; ++k) {
        const int32_t row = call.ints(1)[k];
        if (row < 0 || row >= rows) {
            return call.fail("index " + std::to_string(row) + " at place " + std::to_string(k) + ", expected 0.." +
                             std::to_string(rows - 1) + " (the device does not check)");
        }
        std::memcpy(static_cast<char*>(call.data[2]) + size_t(k * width) * each,
                    static_cast<const char*>(call.data[0]) + size_t(row * width) * each, size_t(width) * each);
    }
    return 0;
}

// a, b of one shape -> a + b, rounded once.
STAND_IN(Add, "Add") {
    const int64_t n = call.elements(0);
    std::vector<float> a = call.all(0);
    const std::vector<float> b = call.all(1);
    for (int64_t k = 0; k < n; ++k) a[size_t(k)] += b[size_t(k) % b.size()];  // a row is added to each
    call.write(2, 0, n, a.data());
    return 0;
}

// x, then one axis after another -> x's numbers in that shape; a view on the device.
STAND_IN(Reshape, "Reshape") {
    std::memcpy(call.data[call.count - 1], call.data[0], size_t(call.elements(0)) * call.width());
    return 0;
}

// x (..., sum of the sizes), sizes -> one tensor a size
STAND_IN(SplitWithSize, "SplitWithSize") {
    const int parts = (call.count - 1) / 2;
    const int64_t all = call.dim(0, -1), rows = call.elements(0) / all;
    const size_t each = call.width();
    for (int64_t r = 0; r < rows; ++r) {
        int64_t from = r * all;
        for (int i = 0; i < parts; ++i) {
            const int64_t n = call.whole(1 + i);
            std::memcpy(static_cast<char*>(call.data[1 + parts + i]) + size_t(r * n) * each,
                        static_cast<const char*>(call.data[0]) + size_t(from) * each, size_t(n) * each);
            from += n;
        }
    }
    return 0;
}
