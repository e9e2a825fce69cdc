// Elementwise vector instructions: the "first n elements" form and the repeat form with block and repeat strides.
#pragma once
#include "copy.h"

namespace AscendC {

enum class RoundMode : uint8_t { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class CMPMODE : uint8_t { LT, GT, EQ, LE, GE, NE };
enum class SELMODE : uint8_t { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };

struct UnaryRepeatParams {
    uint16_t dstBlkStride = 1, srcBlkStride = 1;
    uint8_t dstRepStride = 8, srcRepStride = 8;
};
struct BinaryRepeatParams {
    uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1, dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
};
struct BrcbRepeatParams {
    uint16_t dstBlkStride = 1, dstRepStride = 8;
};

template <typename T>
constexpr const char* type_name() {
    if (std::is_same<T, half>::value) return "f16";
    if (std::is_same<T, bfloat16_t>::value) return "bf16";
    if (std::is_same<T, float>::value) return "f32";
    if (std::is_same<T, int32_t>::value) return "i32";
    if (std::is_same<T, uint32_t>::value) return "u32";
    return sizeof(T) == 1 ? "b8" : "b16";
}
template <typename T>
std::string instruction(const char* name) {
    return std::string(name) + "." + type_name<T>();
}
// ragged: the mask is no full repeat, and has to be set and taken back.
inline void tally(int id, uint64_t repeats, uint64_t elements, bool ragged = false) {
    auto& counts = emulator::core->count.vector;
    if (counts.size() <= size_t(id)) counts.resize(size_t(id) + 1);
    ++counts[size_t(id)].instructions;
    counts[size_t(id)].repeats += repeats;
    counts[size_t(id)].elements += elements;
    if (emulator::machine->trace) emulator::trace_size(uint32_t(id), repeats, ragged);
}
inline bool count_valid(int64_t count, Where at) {
    if (count < 0) emulator::report("range", at, "a count of %lld elements", (long long)count);
    return count > 0;
}

// One operand of an instruction in repeat form; a stride counts blocks of 32 bytes.
struct Operand {
    uint32_t address, element, block_stride, repeat_stride;
    uint32_t lane(uint32_t repeat, uint32_t lane) const {
        const uint32_t per_block = 32 / element;
        return address + (repeat * repeat_stride + lane / per_block * block_stride) * 32 + lane % per_block * element;
    }
};
template <typename T>
bool operand(Operand& o, const LocalTensor<T>& t, uint32_t lanes, uint32_t repeats, uint32_t block, uint32_t repeat, Where at) {
    o = Operand{t.address, uint32_t(sizeof(T)), block, repeat};
    const uint64_t last = uint64_t(o.lane(repeats - 1, lanes - 1)) - t.address + sizeof(T);
    return t.usable(0, last, at);
}
// Calls visit(address, bytes, first lane) for each stretch of memory that the operand touches in one repeat.
template <typename Visit>
void stretches(const Operand& o, uint32_t repeat, uint32_t lanes, Visit visit) {
    if (o.block_stride == 1) return visit(o.lane(repeat, 0), lanes * o.element, 0u);
    const uint32_t per_block = 32 / o.element;
    for (uint32_t l = 0; l < lanes; l += per_block) {
        visit(o.lane(repeat, l), (lanes - l < per_block ? lanes - l : per_block) * o.element, l);
    }
}
template <typename T>
const T* gather(const Operand& o, uint32_t repeat, uint32_t lanes, T* scratch, Where at, bool overlap, bool is_dst = false) {
    char* ub = emulator::core->ub.data();
    if (repeat == 0 || o.repeat_stride || is_dst) {  // what stays in place was checked in the first repeat
        stretches(o, repeat, lanes, [&](uint32_t a, uint32_t n, uint32_t) { emulator::read_ub(emulator::V, a, n, at, overlap); });
    }
    if (o.block_stride == 1) return reinterpret_cast<const T*>(ub + o.lane(repeat, 0));
    stretches(o, repeat, lanes, [&](uint32_t a, uint32_t n, uint32_t l) { std::memcpy(scratch + l, ub + a, n); });
    return scratch;
}
inline bool repeat_valid(int mask, int repeats, int lanes, Where at) {
    if (mask < 1 || mask > lanes) emulator::report("range", at, "mask %d, must be 1..%d", mask, lanes);
    if (repeats < 0 || repeats > 255) emulator::report("range", at, "repeatTime %d, must be 0..255", repeats);
    return mask >= 1 && mask <= lanes && repeats > 0 && repeats <= 255;
}

// f(dst, a, b, n) works on n lanes; b equals a for instructions with one source. reads_dst: dst is a source as well.
template <typename D, typename A, typename F>
void run_count(int id, const LocalTensor<D>& dst, const LocalTensor<A>& a, const LocalTensor<A>& b, int64_t n,
               bool reads_dst, Where at, F f) {
    if (!count_valid(n, at)) return;
    emulator::issue(emulator::V);
    const uint64_t size = sizeof(D) > sizeof(A) ? sizeof(D) : sizeof(A);
    tally(id, (uint64_t(n) * size + 255) / 256, uint64_t(n), uint64_t(n) * size % 256 != 0);
    if (!a.usable(0, n * sizeof(A), at) || !b.usable(0, n * sizeof(A), at) || !dst.usable(0, n * sizeof(D), at)) return;
    emulator::read_ub(emulator::V, a.address, uint32_t(n * sizeof(A)), at);
    if (b.address != a.address) emulator::read_ub(emulator::V, b.address, uint32_t(n * sizeof(A)), at);
    if (reads_dst) emulator::read_ub(emulator::V, dst.address, uint32_t(n * sizeof(D)), at);
    for (const LocalTensor<A>* s : {&a, &b}) {
        const int64_t shift = int64_t(dst.address) - int64_t(s->address);
        const int64_t from = shift < 0 ? dst.address : s->address;
        const int64_t reach = from + n * int64_t(shift < 0 ? sizeof(D) : sizeof(A));
        if (shift != 0 && (shift < 0 ? int64_t(s->address) : int64_t(dst.address)) < reach) {
            emulator::report("overlap", at, "source and destination overlap in part");
        }
    }
    emulator::write_ub(emulator::V, dst.address, uint32_t(n * sizeof(D)), at);
    f(dst.data(), a.data(), b.data(), n);
}
template <typename D, typename A, typename F>
void run_repeats(int id, const LocalTensor<D>& dst, const LocalTensor<A>& a, const LocalTensor<A>& b, int mask,
                 int repeats, const BinaryRepeatParams& p, bool reads_dst, bool overlap, Where at, F f) {
    constexpr int lanes = int(256 / (sizeof(D) > sizeof(A) ? sizeof(D) : sizeof(A)));
    if (!repeat_valid(mask, repeats, lanes, at)) return;
    if (p.dstBlkStride == 0) emulator::report("range", at, "dstBlkStride 0: all blocks of a repeat would be written to one place");
    emulator::issue(emulator::V);
    tally(id, uint64_t(repeats), uint64_t(repeats) * uint64_t(mask), mask != lanes);
    Operand od, oa, ob;
    if (!operand(od, dst, mask, repeats, p.dstBlkStride, p.dstRepStride, at) ||
        !operand(oa, a, mask, repeats, p.src0BlkStride, p.src0RepStride, at) ||
        !operand(ob, b, mask, repeats, p.src1BlkStride, p.src1RepStride, at)) return;
    D target[256];
    A left[256], right[256];
    for (uint32_t r = 0; r < uint32_t(repeats); ++r) {
        const A* pa = gather(oa, r, mask, left, at, overlap);
        const A* pb = &a == &b ? pa : gather(ob, r, mask, right, at, overlap);
        if (reads_dst) {
            const D* old = gather(od, r, mask, target, at, overlap, true);
            if (old != target) std::memcpy(target, old, mask * sizeof(D));
        }
        f(target, pa, pb, int64_t(mask));
        stretches(od, r, mask, [&](uint32_t address, uint32_t n, uint32_t l) {
            emulator::write_ub(emulator::V, address, n, at);
            std::memcpy(emulator::core->ub.data() + address, target + l, n);
        });
    }
}

template <typename T, typename F>
auto lanewise(F f) {
    return [f](T* d, const T* a, const T* b, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            if constexpr (emulator::is_small_float<T>) d[i] = T(f(float(a[i]), float(b[i])));
            else d[i] = T(f(a[i], b[i]));
        }
    };
}

#define EMULATOR_BINARY(NAME, EXPRESSION, OVERLAP)                                                                      \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, const int32_t& count,   \
              Where at = EMULATOR_HERE) {                                                                               \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_count(id, dst, src0, src1, count, false, at, lanewise<T>([](auto x, auto y) { return EXPRESSION; }));       \
    }                                                                                                                   \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,          \
              int repeatTime, const BinaryRepeatParams& params, Where at = EMULATOR_HERE) {                             \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_repeats(id, dst, src0, src1, int(mask), repeatTime, params, false, OVERLAP && sizeof(T) >= 2, at,            \
                    lanewise<T>([](auto x, auto y) { return EXPRESSION; }));                                            \
    }
EMULATOR_BINARY(Add, x + y, true)
EMULATOR_BINARY(Sub, x - y, true)
EMULATOR_BINARY(Mul, x * y, true)
EMULATOR_BINARY(Max, x > y ? x : y, true)
EMULATOR_BINARY(Min, x < y ? x : y, true)
EMULATOR_BINARY(Div, x / y, false)

#define EMULATOR_BITWISE(NAME, EXPRESSION)                                                                              \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,          \
              int repeatTime, const BinaryRepeatParams& params, Where at = EMULATOR_HERE) {                             \
        static_assert(std::is_same<T, int16_t>::value || std::is_same<T, uint16_t>::value, #NAME ": int16_t or uint16_t"); \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_repeats(id, dst, src0, src1, int(mask), repeatTime, params, false, false, at,                                \
                    lanewise<T>([](auto x, auto y) { return EXPRESSION; }));                                            \
    }
EMULATOR_BITWISE(And, x & y)
EMULATOR_BITWISE(Or, x | y)
#undef EMULATOR_BITWISE
#undef EMULATOR_BINARY

#define EMULATOR_SCALAR(NAME, EXPRESSION)                                                                               \
    template <typename T, typename N>                                                                                   \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const N& scalar, const int32_t& count,               \
              Where at = EMULATOR_HERE) {                                                                               \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        const T rounded = T(scalar);                                                                                    \
        using C = std::conditional_t<emulator::is_small_float<T>, float, T>;                                            \
        const C y = C(rounded);                                                                                         \
        run_count(id, dst, src, src, count, false, at, lanewise<T>([y](auto x, auto) { return EXPRESSION; }));          \
    }
EMULATOR_SCALAR(Adds, x + y)
EMULATOR_SCALAR(Muls, x * y)
EMULATOR_SCALAR(Maxs, x > y ? x : y)
EMULATOR_SCALAR(Mins, x < y ? x : y)
#undef EMULATOR_SCALAR

template <typename T, typename N>
void ShiftLeft(const LocalTensor<T>& dst, const LocalTensor<T>& src, const N& bits, const int32_t& count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("ShiftLeft"));
    run_count(id, dst, src, src, count, false, at, lanewise<T>([bits](T x, T) { return T(x << bits); }));
}
template <typename T, typename N>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const N& bits, const int32_t& count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("ShiftRight"));
    run_count(id, dst, src, src, count, false, at, lanewise<T>([bits](T x, T) { return T(x >> bits); }));
}

#define EMULATOR_UNARY(NAME, EXPRESSION)                                                                                \
    template <typename T>                                                                                               \
    void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Where at = EMULATOR_HERE) {    \
        static const int id = emulator::intern(instruction<T>(#NAME));                                                  \
        run_count(id, dst, src, src, count, false, at, lanewise<T>([](auto x, auto) { return EXPRESSION; }));           \
    }
EMULATOR_UNARY(Exp, std::exp(float(x)))
EMULATOR_UNARY(Ln, std::log(float(x)))
EMULATOR_UNARY(Abs, std::fabs(float(x)))
EMULATOR_UNARY(Sqrt, std::sqrt(float(x)))
EMULATOR_UNARY(Reciprocal, 1.0f / float(x))
#undef EMULATOR_UNARY

// Exact widening of n values; the bulk of the emulator's time goes through here.
template <typename T>
inline void widen_all(float* d, const T* s, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__) && defined(__AVX__)
    if constexpr (std::is_same<T, half>::value) {
        for (; i + 8 <= n; i += 8) {
            _mm256_storeu_ps(d + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
        }
    }
#endif
    for (; i < n; ++i) d[i] = float(s[i]);
}

template <typename T, typename U>
auto multiply_add() {
    static_assert((std::is_same<T, U>::value && !std::is_same<T, bfloat16_t>::value) ||
                  (std::is_same<T, float>::value && std::is_same<U, half>::value), "MulAddDst: half, float, or float from half");
    return [](T* d, const U* a, const U* b, int64_t n) {
        for (int64_t i = 0; i < n; ++i) d[i] = T(float(d[i]) + float(a[i]) * float(b[i]));
    };
}
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, const int32_t& count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<U>("MulAddDst"));
    run_count(id, dst, src0, src1, count, true, at, multiply_add<T, U>());
}
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, uint64_t mask, int repeatTime,
               const BinaryRepeatParams& params, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<U>("MulAddDst"));
    run_repeats(id, dst, src0, src1, int(mask), repeatTime, params, true, false, at, multiply_add<T, U>());
}

template <typename T, typename U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar, const int32_t& count, Where at = EMULATOR_HERE) {
    static_assert((std::is_same<T, U>::value && !std::is_same<T, bfloat16_t>::value) ||
                  (std::is_same<T, float>::value && std::is_same<U, half>::value), "Axpy: half, float, or float from half");
    static const int id = emulator::intern(instruction<U>("Axpy"));
    const float factor = float(scalar);
    run_count(id, dst, src, src, count, true, at, [factor](T* d, const U* a, const U*, int64_t n) {
        float wide[64];
        for (int64_t i = 0; i < n; i += 64) {
            const int64_t m = n - i < 64 ? n - i : 64;
            widen_all(wide, a + i, m);
            for (int64_t k = 0; k < m; ++k) d[i + k] = T(float(d[i + k]) + factor * wide[k]);
        }
    });
}

template <typename D>
D round_to(float v, RoundMode mode) {
    if constexpr (emulator::is_small_float<D>) {
        const D nearest = D(v);
        if (mode == RoundMode::CAST_RINT || std::isnan(v) || std::isinf(float(nearest)) || float(nearest) == v) return nearest;
        const bool up = mode == RoundMode::CAST_CEIL || (mode == RoundMode::CAST_TRUNC && v < 0);
        if (mode == RoundMode::CAST_ROUND) return nearest;
        if (up) return float(nearest) < v ? emulator::step(nearest, 1) : nearest;
        return float(nearest) > v ? emulator::step(nearest, -1) : nearest;
    } else {
        const float r = mode == RoundMode::CAST_FLOOR ? std::floor(v) : mode == RoundMode::CAST_CEIL ? std::ceil(v)
                      : mode == RoundMode::CAST_TRUNC ? std::trunc(v) : mode == RoundMode::CAST_ROUND ? std::round(v)
                      : std::nearbyint(v);
        const double low = double(std::numeric_limits<D>::min()), high = double(std::numeric_limits<D>::max());
        return std::isnan(r) ? D(0) : double(r) <= low ? std::numeric_limits<D>::min()
             : double(r) >= high ? std::numeric_limits<D>::max() : D(r);
    }
}

template <typename D, typename A>
void Cast(const LocalTensor<D>& dst, const LocalTensor<A>& src, const RoundMode& mode, const uint32_t count, Where at = EMULATOR_HERE) {
    constexpr bool widening = std::is_same<D, float>::value || (std::is_same<D, half>::value && sizeof(A) == 1);
    static_assert(widening || std::is_same<A, float>::value || (std::is_same<A, half>::value && sizeof(D) <= 4), "no such Cast");
    static const int id = emulator::intern(instruction<D>((std::string("Cast.") + type_name<A>()).c_str()));
    if (widening && std::is_same<A, int32_t>::value == false && mode != RoundMode::CAST_NONE) {
        emulator::report("range", at, "a widening Cast takes CAST_NONE");
    }
    if (!widening && (mode == RoundMode::CAST_NONE || (std::is_same<D, bfloat16_t>::value && mode == RoundMode::CAST_ODD))) {
        emulator::report("range", at, "this Cast has no such rounding mode");
    }
    const RoundMode how = mode;
    run_count(id, dst, src, src, count, false, at, [how](D* d, const A* a, const A*, int64_t n) {
        if constexpr (std::is_same<D, float>::value) {
            widen_all(d, a, n);
        } else if constexpr (widening) {
            for (int64_t i = 0; i < n; ++i) d[i] = D(float(a[i]));
        } else {
            if (emulator::is_small_float<D> && how == RoundMode::CAST_RINT) {
                for (int64_t i = 0; i < n; ++i) d[i] = D(float(a[i]));
            } else {
                for (int64_t i = 0; i < n; ++i) d[i] = round_to<D>(float(a[i]), how);
            }
        }
    });
}

// Four-bit integers, two in a byte, to half. The count is one of values.
inline void Cast(const LocalTensor<half>& dst, const LocalTensor<int4b_t>& src, const RoundMode& mode, const uint32_t count,
                 Where at = EMULATOR_HERE) {
    static const int id = emulator::intern("Cast.i4.f16");
    if (mode != RoundMode::CAST_NONE) emulator::report("range", at, "a widening Cast takes CAST_NONE");
    if (count % 2) emulator::report("range", at, "a Cast of %u int4b_t: the count must be even", count);
    if (!count_valid(count, at)) return;
    emulator::issue(emulator::V);
    tally(id, (uint64_t(count) * sizeof(half) + 255) / 256, count);
    const uint32_t from = (count + 1) / 2, to = count * uint32_t(sizeof(half));
    if (!src.usable(0, from, at) || !dst.usable(0, to, at)) return;
    if (src.address < dst.address + to && dst.address < src.address + from) {
        emulator::report("overlap", at, "source and destination overlap");
    }
    emulator::read_ub(emulator::V, src.address, from, at);
    emulator::write_ub(emulator::V, dst.address, to, at);
    static const half values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    const uint8_t* pairs = reinterpret_cast<const uint8_t*>(src.data());
    for (uint32_t i = 0; i < count; ++i) dst.data()[i] = values[pairs[i / 2] >> (i % 2 * 4) & 15];
}

template <typename T, typename N>
void Duplicate(const LocalTensor<T>& dst, const N& value, const int32_t& count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("Duplicate"));
    if (!count_valid(count, at)) return;
    emulator::issue(emulator::V);
    tally(id, (uint64_t(count) * sizeof(T) + 255) / 256, uint64_t(count));
    if (!dst.usable(0, uint64_t(count) * sizeof(T), at)) return;
    emulator::write_ub(emulator::V, dst.address, uint32_t(count * sizeof(T)), at);
    for (int32_t i = 0; i < count; ++i) dst.data()[i] = T(value);
}

// Each repeat takes 8 elements and fills a block of 32 bytes with each of them.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, int repeatTime, const BrcbRepeatParams& p, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("Brcb"));
    if (!repeat_valid(1, repeatTime, 1, at)) return;
    if (p.dstBlkStride == 0) emulator::report("range", at, "Brcb with dstBlkStride 0");
    emulator::issue(emulator::V);
    tally(id, uint64_t(repeatTime), uint64_t(repeatTime) * 8);
    const uint32_t per_block = 32 / sizeof(T);
    const uint64_t reach = (uint64_t(repeatTime - 1) * p.dstRepStride + 7u * p.dstBlkStride + 1) * 32;
    if (!src.usable(0, uint64_t(repeatTime) * 8 * sizeof(T), at) || !dst.usable(0, reach, at)) return;
    emulator::read_ub(emulator::V, src.address, uint32_t(repeatTime * 8 * sizeof(T)), at);
    for (int r = 0; r < repeatTime; ++r) {
        for (uint32_t e = 0; e < 8; ++e) {
            const uint32_t offset = (uint32_t(r) * p.dstRepStride + e * p.dstBlkStride) * 32;
            emulator::write_ub(emulator::V, dst.address + offset, 32, at);
            for (uint32_t i = 0; i < per_block; ++i) dst.data(offset)[i] = src.data()[uint32_t(r) * 8 + e];
        }
    }
}

template <typename T>
bool compares(T a, T b, CMPMODE mode) {
    const float x = float(a), y = float(b);
    switch (mode) {
        case CMPMODE::LT: return x < y;
        case CMPMODE::GT: return x > y;
        case CMPMODE::EQ: return x == y;
        case CMPMODE::LE: return x <= y;
        case CMPMODE::GE: return x >= y;
        default: return x != y;
    }
}
template <typename T, typename U, typename Right>
void compare(int id, const LocalTensor<U>& dst, const LocalTensor<T>& src0, Right right, CMPMODE mode, uint32_t count, Where at) {
    static_assert(sizeof(U) == 1, "the mask of a comparison is int8 or uint8");
    emulator::issue(emulator::V);
    if (!count_valid(count, at)) return;
    tally(id, (uint64_t(count) * sizeof(T) + 255) / 256, count);
    if (count * sizeof(T) % 256) {
        emulator::report("range", at, "a comparison of %u elements: the bytes must be a multiple of 256", count);
    }
    if (!src0.usable(0, count * sizeof(T), at) || !dst.usable(0, (count + 7) / 8, at)) return;
    emulator::read_ub(emulator::V, src0.address, count * sizeof(T), at);
    emulator::write_ub(emulator::V, dst.address, (count + 7) / 8, at);
    uint8_t* bits = reinterpret_cast<uint8_t*>(dst.data());
    for (uint32_t i = 0; i < count; i += 8) {
        uint8_t byte = 0;
        for (uint32_t k = 0; k < 8 && i + k < count; ++k) byte |= uint8_t(compares<T>(src0.data()[i + k], right(i + k), mode) << k);
        bits[i / 8] = byte;
    }
}
template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE mode, uint32_t count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("Compare"));
    if (!src1.usable(0, count * sizeof(T), at)) return;
    const T* right = src1.data();
    compare<T>(id, dst, src0, [right](uint32_t i) { return right[i]; }, mode, count, at);
    emulator::read_ub(emulator::V, src1.address, count * sizeof(T), at);
}
template <typename T, typename U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const T scalar, CMPMODE mode, uint32_t count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("CompareScalar"));
    compare<T>(id, dst, src0, [scalar](uint32_t) { return scalar; }, mode, count, at);
}
// Where the mask's bit is 1 the result is src0, elsewhere the scalar. (The tensor/scalar mode of Select.)
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& src0, T scalar, SELMODE mode, uint32_t count, Where at = EMULATOR_HERE) {
    static const int id = emulator::intern(instruction<T>("Select"));
    if (mode != SELMODE::VSEL_TENSOR_SCALAR_MODE) emulator::report("range", at, "Select with a scalar needs the tensor/scalar mode");
    if (!mask.usable(0, (count + 7) / 8, at)) return;
    const uint8_t* bits = reinterpret_cast<const uint8_t*>(mask.data());
    run_count(id, dst, src0, src0, count, false, at, [=](T* d, const T* a, const T*, int64_t n) {
        for (int64_t i = 0; i < n; ++i) d[i] = bits[i / 8] >> (i % 8) & 1 ? a[i] : scalar;
    });
    emulator::read_ub(emulator::V, mask.address, (count + 7) / 8, at);
}

}  // namespace AscendC
