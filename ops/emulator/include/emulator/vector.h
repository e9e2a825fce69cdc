// What vector instructions share: the "first n elements" form and the repeat form with block and repeat strides.
#pragma once
#include "copy.h"

namespace AscendC {

// Built from nothing or from all values, as the device's.
struct BinaryRepeatParams {
    uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1, dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
    BinaryRepeatParams() {}
    BinaryRepeatParams(uint8_t dstBlk, uint8_t src0Blk, uint8_t src1Blk, uint8_t dstRep, uint8_t src0Rep, uint8_t src1Rep)
        : dstBlkStride(dstBlk), src0BlkStride(src0Blk), src1BlkStride(src1Blk),
          dstRepStride(dstRep), src0RepStride(src0Rep), src1RepStride(src1Rep) {}
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

}  // namespace AscendC
