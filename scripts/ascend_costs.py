"""Cycles of a launch, from the emulator's trace: four in-order pipes a core, and the cores that meet.

A small simulation. The scalar unit runs in program order and sends vector instructions and transfers to their pipes;
each begins when its pipe is free and everything it waits for (flags, queues, barriers: the trace has the numbers) has
ended. A vector instruction pays its start-up when the pipe was empty, and its result is there some cycles after its
last repeat, which a dependent instruction feels. A transfer costs by its size. At SyncAll all cores wait for the last.
The numbers are those of ascend_constants.py. Not priced: arithmetic of the scalar unit, bank conflicts beyond the
table's, the instruction cache.
"""
from typing import Any, Dict, List, Sequence, Tuple

import ascend_constants as constants

SCALAR, VECTOR, READS, WRITES, MEET = range(5)


def vector_costs(names: Sequence[str]) -> List[Tuple[int, int, int]]:
    """(cycles a repeat, start-up, interval) by number of instruction.

    Raises:
        KeyError: an instruction has no price.
    """
    found = []
    for name in names:
        parts = name.split(".")
        keys = [name, ".".join(parts[:2]), parts[0]]
        if parts[0] == "Cast":  # the emulator names the source first: Cast.<from>.<to>
            keys = [name]
        price = next((constants.VECTOR[key] for key in keys if key in constants.VECTOR), None)
        if price is None:
            raise KeyError(f"{name} has no price in ascend_constants.VECTOR; add one with its source")
        found.append(price)
    return found


def bandwidth(cores: int) -> float:
    """Bytes a cycle of one core that reads global memory while ``cores`` do."""
    known = sorted(constants.GM_TO_UB)
    low = max(k for k in known if k <= max(cores, 1))
    high = min(k for k in known if k >= min(max(cores, 1), known[-1]))
    a, b = constants.GM_TO_UB[low], constants.GM_TO_UB[high]
    rate = a if low == high else a + (b - a) * (cores - low) / (high - low)
    return rate / constants.CLOCK_GHZ


def read_cycles(size: int, bursts: int, rate: float) -> float:
    """Cycles of a transfer into the unified buffer."""
    moved = max(constants.SMALLEST_READ, bursts * max(size / max(bursts, 1), constants.SMALLEST_BURST))
    return moved / rate / min(1.0, constants.READ_SHARE_SLOPE * moved + constants.READ_SHARE_LEAST)


def write_cycles(size: int, bursts: int) -> float:
    """Cycles of a transfer out of the unified buffer."""
    moved = bursts * max(size / max(bursts, 1), constants.SMALLEST_BURST)
    return constants.CLOCK_GHZ * (constants.WRITE_LATENCY_US * 1e3 + moved / constants.UB_TO_L2)


class _Core:
    """One core's clocks."""

    def __init__(self) -> None:
        self.scalar = 0.0
        self.free = [0.0] * 4
        self.finish: List[List[float]] = [[0.0], [0.0], [0.0], [0.0]]
        self.lines: set = set()
        self.busy = [0.0] * 4

    def run(self, entries: Any, start: int, costs: Sequence[Tuple[int, int, int]], rate: float) -> Tuple[int, bool]:
        """Until the next meeting or the end; returns the place behind it, and whether it was a meeting."""
        finish, free, busy = self.finish, self.free, self.busy
        for place in range(start, len(entries)):
            pipe, what, size, parts, *waits = entries[place]
            if pipe == MEET:
                return place + 1, True
            stall = max(finish[q][waits[4 + q]] for q in (1, 2, 3))
            now = max(self.scalar, stall)
            if pipe == SCALAR:
                cost = float(constants.SCALAR_UB)
                if what:
                    cost = constants.SCALAR_CACHED if what in self.lines else constants.SCALAR_GM
                    self.lines.add(what)
                self.scalar = now + cost
                busy[SCALAR] += cost
                finish[SCALAR].append(self.scalar)
                continue
            self.scalar = now + constants.SCALAR_ISSUE
            busy[SCALAR] += constants.SCALAR_ISSUE
            ready = max(self.scalar, *(finish[q][waits[q]] for q in range(4)))
            begin, after = max(ready, free[pipe]), 0
            if size == 0:
                cost = 0.0
            elif pipe == VECTOR:
                each, head, after = costs[what]
                cost = float(each * size + parts * constants.RAGGED_MASK + (head if ready > free[pipe] else 0))
            else:
                cost = read_cycles(size, parts, rate) if pipe == READS else write_cycles(size, parts)
            free[pipe] = begin + cost
            busy[pipe] += cost
            finish[pipe].append(begin + cost + after)
        return len(entries), False

    def end(self) -> float:
        return max(self.scalar, *(done[-1] for done in self.finish))

    def go_on(self, time: float) -> None:
        self.scalar = time
        self.free = [max(time, one) for one in self.free]


def simulate(traces: Sequence[Any], names: Sequence[str], sync_all: float = constants.SYNC_ALL) -> Dict[str, Any]:
    """Cycles of a launch.

    Args:
        traces, names: what ``Emulator.trace`` gave.
        sync_all: cycles of a meeting of all cores.

    Returns:
        ``cycles`` until the last core ends, ``meetings``, and of the core that works longest the cycles that its pipes
        are ``busy`` (scalar, vector, reads, writes) and its ``vector`` instructions.
    """
    costs = vector_costs(names)
    lists = [trace.tolist() for trace in traces]
    rate = bandwidth(sum(any(one[0] in (READS, WRITES) and one[2] for one in entries) for entries in lists))
    cores = [_Core() for _ in lists]
    places, meetings = [0] * len(cores), 0
    while True:
        stops = [core.run(entries, place, costs, rate) for core, entries, place in zip(cores, lists, places)]
        places = [place for place, _ in stops]
        if not any(met for _, met in stops):
            break
        meetings += 1
        time = max(core.end() for core in cores) + sync_all
        for core in cores:
            core.go_on(time)
    last = max(cores, key=lambda core: sum(core.busy))
    return {"cycles": max(core.end() for core in cores), "meetings": meetings,
            "busy": [round(one) for one in last.busy],
            "vector": max(sum(1 for one in entries if one[0] == VECTOR) for entries in lists)}
