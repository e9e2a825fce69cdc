// What the stand-ins share: one call of an ahead-of-time operator, its checks, and half types.
//
// A stand-in returns 0, or 1 when the call breaks the operator's contract; colora_rehearsal_error() has the sentence.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace rehearsal {

// Keeps the sentence for colora_rehearsal_error(), prints it, and returns 1.
int refuse(const std::string& sentence);

// The graph's inputs by name as they were on the host when the graph started; null if there is none of that name.
const std::vector<int32_t>* lengths(const std::string& name);

// Whether a graph was started with its inputs published, so that "no such name" can be told from "not started".
bool started();

// Whether that graph's jit_config has infer_boost on.
bool infer_boost();

enum class Type { half, bf16, f32, i8, u8, i32, i64, f64, other };

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The arguments of one call: inputs first, outputs behind them.
struct Call {
    const char* name;
    int count;
    void** data;
    int* ranks;
    int64_t** shapes;
    const char** dtypes;

    int64_t dim(int i, int axis) const { return shapes[i][axis < 0 ? axis + ranks[i] : axis]; }
    int64_t elements(int i) const {
        int64_t n = 1;
        for (int k = 0; k < ranks[i]; ++k) n *= shapes[i][k];
        return n;
    }
    Type type(int i) const;
    size_t width() const;  // bytes of a number of argument 0
    bool given(int i) const { return !(ranks[i] == 0 && type(i) == Type::f32); }  // else: stands for an argument left out
    std::string shape(int i) const;
    int64_t whole(int i) const { return *static_cast<const int64_t*>(data[i]); }  // a scalar attribute
    float real(int i) const { return *static_cast<const float*>(data[i]); }
    const int32_t* ints(int i) const { return static_cast<const int32_t*>(data[i]); }

    // `n` numbers of argument i from `at` on, as float.
    void read(int i, int64_t at, int64_t n, float* to) const;
    std::vector<float> all(int i) const;
    // Rounds to the argument's own type.
    void write(int i, int64_t at, int64_t n, const float* from) const;
    void poison(int i) const;  // NaN everywhere: what an operator does not write must not look like a result

    int fail(const std::string& sentence) const { return refuse(std::string(name) + ": " + sentence); }
};

// y[rows, out] = x[rows, in] . weight[out, in]^T in float.
void product(const float* x, const float* weight, float* y, int64_t rows, int64_t in, int64_t out);

}  // namespace rehearsal

#define STAND_IN(symbol, title)                                                                                       \
    static int symbol##_body(const rehearsal::Call& call);                                                            \
    EXPORT int symbol(int count, void** data, int* ranks, int64_t** shapes, const char** dtypes, void*, void*) {      \
        return symbol##_body(rehearsal::Call{title, count, data, ranks, shapes, dtypes});                             \
    }                                                                                                                 \
    static int symbol##_body(const rehearsal::Call& call)
