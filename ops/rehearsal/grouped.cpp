// Stand-ins of the grouped product and of the product with whole-number weights.
#include <cmath>
#include <cstdint>

#include "call.h"

using rehearsal::Call;
using rehearsal::Type;

// x (rows, in), weight (groups, in, out), group_list int64, group_list_type (0: ends, 1: counts) -> (rows, out); rows
// behind the last group stay unwritten.
STAND_IN(GroupedMatmul, "GroupedMatmulV4") {
    const int64_t rows = call.dim(0, 0), in = call.dim(0, 1), groups = call.dim(1, 0), out = call.dim(1, 2);
    const int64_t* list = static_cast<const int64_t*>(call.data[2]);
    const bool counts = call.whole(3) == 1;
    call.poison(4);
    std::vector<float> weight(size_t(in * out)), turned(size_t(in * out));
    int64_t begin = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t end = counts ? begin + list[g] : list[g];
        if (end < begin || end > rows) {
            return call.fail("group_list[" + std::to_string(g) + "] is " + std::to_string(list[g]) + (counts ? ", expected a count, 0 or more, and all together at most " : ", expected ends that ascend, at most ") +
                             std::to_string(rows) + " rows");
        }
        if (end == begin) continue;
        call.read(1, g * in * out, in * out, weight.data());
        for (int64_t i = 0; i < in; ++i) {
            for (int64_t o = 0; o < out; ++o) turned[size_t(o * in + i)] = weight[size_t(i * out + o)];
        }
        std::vector<float> x(size_t((end - begin) * in)), y(size_t((end - begin) * out));
        call.read(0, begin * in, (end - begin) * in, x.data());
        rehearsal::product(x.data(), turned.data(), y.data(), end - begin, in, out);
        call.write(4, begin * out, (end - begin) * out, y.data());
        begin = end;
    }
    return 0;
}

// x (rows, in), weight (out, in) int8 or (out, in / 2) packed int4 as qint4x2 (low nibble = even column, two's
// complement), scale (out), (1, out) or (groups, out), group size -> (rows, out)
STAND_IN(WeightQuantBatchMatmul, "WeightQuantBatchMatmul") {
    const int64_t rows = call.dim(0, 0), in = call.dim(0, 1), out = call.dim(1, 0), group = call.whole(3);
    const bool packed = call.dim(1, 1) * 2 == in;
    const std::vector<float> x = call.all(0), scale = call.all(2);
    const int8_t* stored = static_cast<const int8_t*>(call.data[1]);
#pragma omp parallel for if (rows * in * out > 1 << 20)
    for (int64_t o = 0; o < out; ++o) {
        std::vector<float> weight(size_t(in), 0.f), y(size_t(rows), 0.f);
        for (int64_t i = 0; i < in; ++i) {
            int value = packed ? stored[o * (in / 2) + i / 2] : stored[o * in + i];
            if (packed) {
                value = (i % 2 ? value >> 4 : value) & 15;
                value = value > 7 ? value - 16 : value;
            }
            weight[size_t(i)] = float(value) * scale[size_t((group ? i / group : 0) * out + o)];
        }
        rehearsal::product(x.data(), weight.data(), y.data(), rows, in, 1);
        for (int64_t r = 0; r < rows; ++r) call.write(4, r * out + o, 1, &y[size_t(r)]);
    }
    return 0;
}
