"""The parts of a call as the arrays that the step takes."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from colora_ms.decoding.request import AMATEUR
from colora_ms.decoding.schedule import Part
from colora_ms.decoding.seat import Line
from colora_ms.decoding.step import FlatBatch
from colora_ms.kernels.options import OptionRows


def flat_batch(parts: Sequence[Part], rows: int, blocks: int, capacity: int, eos: Sequence[int],
               steps: int) -> Tuple[FlatBatch, List[Part]]:
    """The batch of some parts.

    Rows are numbered in the order of their adapter slots, so that those of one adapter stand together.

    Args:
        rows: rows and requests that the step has room for; blocks: columns of its tables.
        capacity: steps that it makes at most; steps: how many it is to make now.
        eos: ids that end answers.

    Returns:
        the batch, and the parts whose requests take tokens, in the order of their places.
    """
    lines: List[Tuple[Line, int]] = [(line, count) for part in parts
                                     for line, count in zip(part.seat.lines, part.counts) if count]
    lines.sort(key=lambda one: one[0].job.slots[one[0].number])
    numbers = {id(line): number for number, (line, _) in enumerate(lines)}
    slots, tables = np.full(rows, -1, np.int32), np.full((rows, blocks), -1, np.int32)
    copies = []
    for number, (line, _) in enumerate(lines):
        slots[number] = line.job.slots[line.number]
        tables[number, :len(line.table)] = line.table
        if line.copy is not None:
            copies.append(line.copy)

    takers = [part for part in parts if part.takes]
    options = OptionRows(rows)
    previous, uniforms = np.full(rows, -1, np.int32), np.zeros((rows, capacity), np.float32)
    prompt: List[np.ndarray | None] = [None] * rows
    for place, part in enumerate(takers):
        job = part.seat.job
        options.whole[place], options.real[place] = part.seat.options[0][0], part.seat.options[1][0]
        for line, row in zip(part.seat.lines, job.request.rows):
            options.put(place, "amateur_rows" if row.role == AMATEUR else "expert_rows", numbers[id(line)])
        options.put(place, "budget", job.left)
        uniforms[place] = job.uniforms(capacity)
        if job.tokens:
            previous[place] = job.tokens[-1]
        if job.request.copies:
            prompt[place] = job.request.ids
    ends = [] if takers and all(part.seat.job.request.options.ignore_eos for part in takers) else sorted(eos)
    return FlatBatch(
        tokens=np.concatenate([line.ids(line.filled, line.filled + count) for line, count in lines]).astype(np.int32),
        rows=np.repeat(np.arange(len(lines), dtype=np.int32), [count for _, count in lines]),
        positions=np.concatenate([np.arange(line.filled, line.filled + count, dtype=np.int32)
                                  for line, count in lines]),
        slots=slots, tables=tables, copies=np.array(copies, np.int32).reshape(-1, 2), whole=options.whole,
        real=options.real, previous=previous, uniforms=uniforms,
        eos=np.array(ends + [-1] * (max(len(eos), 1) - len(ends)), np.int32),  # -1 is no token id
        prompt=prompt, steps=steps), takers
