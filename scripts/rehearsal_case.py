"""A rehearsal: a model's device step on a CPU, watched, and held to a half-type NumPy reference.

Teacher-forced: the reference reads the tokens that the rehearsal made, and says at every step which tokens a rounding
error of the stated tolerance leaves possible. Where that is one token the step is *decided*, and the rehearsal must
have made it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np

from half_reference import UNIT, Adapter, HalfReference

#: Largest error of a logit, in roundings of the largest logit of its row. Two decoders that round at the same places
#: but add in other orders differ by 2 at the median; the largest of 900 rows of a small real model was 14 (bfloat16).
ROUNDINGS = 16.0


@dataclasses.dataclass
class Row:
    """One row of one step: its sequence so far, adapter slot, and the logits behind it."""

    ids: np.ndarray
    slot: int
    logits: np.ndarray


@dataclasses.dataclass
class Wanted:
    """A request: its prompt, adapter, contrast, and what a Generator answered."""

    prompt: List[int]
    adapter: Optional[str] = None
    contrast: Any = None
    tokens: Sequence[int] = ()


@dataclasses.dataclass
class Found:
    """What the comparison says.

    Attributes:
        logits: rows of logits compared; off: the largest error, in roundings of the row's largest logit.
        steps: tokens compared; decided: those that the tolerance decides; equal: of these, those that were made;
        possible: of all, those that the tolerance leaves possible.
        unsettled: rows of logits that were left out because which experts computed them hangs on a rounding; tokens
            behind such rows are taken as open.
    """

    logits: int = 0
    off: float = 0.0
    steps: int = 0
    decided: int = 0
    equal: int = 0
    possible: int = 0
    unsettled: int = 0


@contextlib.contextmanager
def watched() -> Iterator[List[Row]]:
    """The rows of all steps inside the block."""
    from colora_ms.decoding import core
    from colora_ms.decoding.device_step import DeviceGraphs

    rows: List[Row] = []
    former, run = core.flat_batch, DeviceGraphs.run
    shown: List[Any] = []

    def flat_batch(parts: Any, *others: Any) -> Any:
        lines = [(line, count) for part in parts for line, count in zip(part.seat.lines, part.counts) if count]
        lines.sort(key=lambda one: one[0].job.slots[one[0].number])
        shown[:] = [(line.ids(0, line.filled + count).copy(), line.job.slots[line.number]) for line, count in lines]
        return former(parts, *others)

    def seen(self: Any, *arguments: Any) -> Any:
        found = run(self, *arguments)
        rows.extend(Row(ids, slot, values) for (ids, slot), values in zip(shown, found[0].asnumpy()))
        return found

    core.flat_batch, DeviceGraphs.run = flat_batch, seen
    try:
        yield rows
    finally:
        core.flat_batch, DeviceGraphs.run = former, run


def adapters_of(handle: Any) -> List[Adapter]:
    """The adapters of a handle's slots, as the reference takes them."""
    from colora_ms.adapters.slots import get

    slots = {name: handle.slot(name) for name in handle.names}
    return [{path: (get(cell.down, slot), get(cell.up, slot), float(get(cell.scale, slot)))
             for (path, _), cell in handle.sites.items()} for slot in sorted(slots.values())]


def reference_of(decoder: Any, handle: Any, dtype: str) -> HalfReference:
    """The reference of a decoder and its adapters."""
    from colora_ms.models.rope import rope_tables

    weights = {parameter.name: parameter.astype("float32").asnumpy() for parameter in decoder.get_parameters()
               if parameter.name.startswith(("model.", "lm_head.")) and "lora" not in parameter.name}
    adapters = [] if handle is None else adapters_of(handle)
    return HalfReference(decoder.config, weights, rope_tables(decoder.config, decoder.max_positions), adapters, dtype)


def compare(rows: Sequence[Row], requests: Sequence[Wanted], slots: Dict[Optional[str], int],
            reference: HalfReference) -> Found:
    """Hold what was watched to the reference; slots: {adapter's name: its slot}, None: -1."""
    found = Found()
    whole = {(slot, tuple([*one.prompt, *one.tokens])) for one in requests
             for slot in {slots[one.adapter]} | ({-1} if one.contrast else set())}
    for row in rows:
        sequence = next(ids for slot, ids in whole if slot == row.slot and ids[:len(row.ids)] == tuple(row.ids))
        if not reference.settled(sequence, row.slot)[len(row.ids) - 1]:
            found.unsettled += 1
            continue
        want = reference.logits(sequence, row.slot)[len(row.ids) - 1]
        off = np.abs(row.logits - want).max() / (np.abs(want).max() * UNIT[reference.dtype])
        found.off, found.logits = max(found.off, float(off)), found.logits + 1
    for one in requests:
        sequence = [*one.prompt, *one.tokens]
        expert = reference.logits(sequence, slots[one.adapter])
        amateur = reference.logits(sequence, -1) if one.contrast else None
        settled = reference.settled(sequence, slots[one.adapter])
        if one.contrast:
            settled = settled & reference.settled(sequence, -1)
        for step, token in enumerate(one.tokens):
            at = len(one.prompt) - 1 + step
            found.steps += 1
            if not settled[at]:
                found.possible += 1
                continue
            open_ = possible(expert[at], None if amateur is None else amateur[at], one.contrast, reference.dtype)
            found.possible += bool(open_[token])
            if open_.sum() == 1:
                found.decided += 1
                found.equal += bool(open_[token])
    return found


def possible(expert: np.ndarray, amateur: Optional[np.ndarray], contrast: Any, dtype: str) -> np.ndarray:
    """(vocab,) bool: the tokens that logits within the tolerance of these may make."""
    error = ROUNDINGS * UNIT[dtype] * float(np.abs(expert).max())
    if amateur is None:
        return expert >= expert.max() - 2 * error
    other = ROUNDINGS * UNIT[dtype] * float(np.abs(amateur).max())
    scores = (1 + contrast.beta) * expert - contrast.beta * amateur
    most = (1 + contrast.beta) * error + contrast.beta * other
    least = np.log(contrast.alpha) + expert.max()
    surely, perhaps = expert >= least + 2 * error, expert >= least - 2 * error
    best = scores[surely].max() if surely.any() else -np.inf
    return perhaps & (scores >= best - 2 * most)


def mixed_requests(count: int, vocabulary: int, longest: int, contrasts: Sequence[Any], adapters: Sequence[str],
                   seed: int = 0) -> List[Wanted]:
    """Requests of all kinds: base, each adapter, contrasts; every third one begins with a shared prefix."""
    random = np.random.default_rng(seed)
    shared = random.integers(3, vocabulary, longest // 2).tolist()
    made = []
    for i in range(count):
        prompt = random.integers(3, vocabulary, 1 + int(random.integers(longest // 2))).tolist()
        kind = i % (1 + len(adapters) + len(contrasts))
        adapter = None if kind == 0 else adapters[(kind - 1) % len(adapters)]
        contrast = contrasts[kind - 1 - len(adapters)] if kind > len(adapters) else None
        made.append(Wanted((shared if i % 3 == 0 else []) + prompt, adapter, contrast))
    return made


def rehearse(generator: Any, requests: Sequence[Wanted], tokens: int, dtype: str) -> Found:
    """Answer the requests together and compare; their tokens are put into them."""
    with watched() as rows:
        answers = generator.generate([one.prompt for one in requests], adapter=[one.adapter for one in requests],
                                     contrast=[one.contrast for one in requests], max_new_tokens=tokens,
                                     ignore_eos=True)
    for one, answer in zip(requests, answers):
        one.tokens = list(answer.tokens)
    handle = generator.adapters
    slots: Dict[Optional[str], int] = {None: -1}
    if handle is not None:
        slots.update({name: handle.slot(name) for name in handle.names})
    return compare(rows, requests, slots, reference_of(generator.decoder, handle, dtype))
