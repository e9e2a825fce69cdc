// Which tokens share an adapter, and which core takes which columns of which adapter. Scalar code, run by every core
// on the same data, so that all cores come to the same plan without talking to each other.
#ifndef COLORA_LORA_GROUPS_H
#define COLORA_LORA_GROUPS_H
#include "kernel_operator.h"

namespace colora {

constexpr uint32_t kGroups = 64;

// Positions 0..tokens-1 are the tokens of one pass, ordered by adapter. Tokens without an adapter have no position.
struct Groups {
    uint32_t count = 0;
    uint32_t tokens = 0;
    uint32_t base = 0;
    bool listed = false;  // true: order[] holds the token of a position; false: token = base + position
    int32_t slot[kGroups];
    uint32_t first[kGroups];
    uint32_t size[kGroups];
    uint32_t start[kGroups];  // not listed: the token of the group's first position
    uint32_t order[kGroups];

    __aicore__ inline uint32_t GroupOf(uint32_t position) const {
        uint32_t g = 0;
        while (g + 1 < count && position >= first[g + 1]) ++g;
        return g;
    }
    __aicore__ inline uint32_t Token(uint32_t group, uint32_t position) const {
        return listed ? order[position] : start[group] + (position - first[group]);
    }
    // How many tokens from this position on lie next to each other in memory, at most limit.
    __aicore__ inline uint32_t Run(uint32_t group, uint32_t position, uint32_t limit) const {
        if (!listed) return limit;
        uint32_t n = 1;
        while (n < limit && order[position + n] == order[position] + n) ++n;
        return n;
    }
    __aicore__ inline void Clear() {
        count = 0;
        tokens = 0;
    }
    __aicore__ inline void AddSegment(int32_t adapter, uint32_t token, uint32_t length) {
        slot[count] = adapter;
        first[count] = tokens;
        size[count] = length;
        start[count] = token;
        tokens += length;
        ++count;
    }
    // Groups the n <= 64 tokens from `from` on by their slots; slots outside 0..slots-1 mean "no adapter".
    template <typename Slots>
    __aicore__ inline void Sort(const Slots& slots, uint32_t from, uint32_t n, uint32_t bank) {
        Clear();
        listed = true;
        for (uint32_t i = 0; i < n; ++i) {
            const int32_t s = slots.GetValue(i);
            if (s < 0 || s >= static_cast<int32_t>(bank)) continue;
            uint32_t g = 0;
            while (g < count && slot[g] != s) ++g;
            if (g == count) {
                slot[count] = s;
                size[count] = 0;
                ++count;
            }
            ++size[g];
        }
        for (uint32_t g = 0; g < count; ++g) {
            first[g] = tokens;
            uint32_t at = tokens;
            for (uint32_t i = 0; i < n; ++i) {
                if (slots.GetValue(i) == slot[g]) order[at++] = from + i;
            }
            tokens = at;
        }
    }
};

// Divides (group x column unit) work over the cores. A unit of group g weighs fixed + each * (its tokens); a core takes
// the units that start inside its equal share of the total weight. When several tokens share the only adapter, the cores
// that would have fewer units than the busiest stay idle: the end is no later, and what is read and written once for each
// core (partial sums, coefficients of all tokens) becomes less.
struct Split {
    uint64_t total = 0;
    uint64_t start[kGroups];
    uint64_t weight[kGroups];
    uint32_t units = 0;
    uint32_t cores = 1;

    __aicore__ inline void Plan(const Groups& groups, uint32_t unitCount, uint32_t coreCount, uint32_t fixed, uint32_t each) {
        units = unitCount;
        cores = coreCount;
        total = 0;
        for (uint32_t g = 0; g < groups.count; ++g) {
            start[g] = total;
            weight[g] = static_cast<uint64_t>(fixed) + static_cast<uint64_t>(each) * groups.size[g];
            total += weight[g] * units;
        }
        if (groups.count == 1 && groups.size[0] > 1) {
            const uint32_t most = (units + cores - 1) / cores;
            cores = (units + most - 1) / most;
        }
    }
    __aicore__ inline uint64_t Boundary(uint32_t core) const { return total * core / cores; }
    __aicore__ inline uint32_t UnitAt(uint32_t g, uint64_t position) const {
        if (position <= start[g]) return 0;
        const uint64_t u = (position - start[g] + weight[g] - 1) / weight[g];
        return u < units ? static_cast<uint32_t>(u) : units;
    }
    __aicore__ inline uint32_t CoreAt(uint64_t position) const {
        uint32_t c = static_cast<uint32_t>(position * cores / total);
        while (c + 1 < cores && Boundary(c + 1) <= position) ++c;
        return c;
    }
    // With a share smaller than a unit, a core has at most one unit of the group: pieces are numbered by unit.
    // Otherwise every core from the first to the last has at least one: they are numbered by core.
    __aicore__ inline bool ByUnit(uint32_t g) const { return total / cores < weight[g]; }
    __aicore__ inline uint32_t Pieces(uint32_t g) const {
        if (ByUnit(g)) return units;
        return CoreAt(start[g] + weight[g] * (units - 1)) - CoreAt(start[g]) + 1;
    }
    __aicore__ inline uint32_t Piece(uint32_t g, uint32_t core, uint32_t fromUnit) const {
        return ByUnit(g) ? fromUnit : core - CoreAt(start[g]);
    }
};

}  // namespace colora
#endif
