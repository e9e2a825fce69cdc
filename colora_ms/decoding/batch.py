"""The parts of a call as the arrays that the step takes."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from colora_ms.decoding.schedule import Part
from colora_ms.decoding.seat import Line
from colora_ms.decoding.step import FlatBatch
from colora_ms.kernels.options import OptionRows


def flat_batch(parts: Sequence[Part], blocks: int, capacity: int, eos: Sequence[int],
               steps: int) -> Tuple[FlatBatch, List[Part]]:
    """The batch of some parts.

    Rows are numbered in the order of their adapter slots, so that those of one adapter stand together.

    Args:
        blocks: columns of its tables.
        capacity: steps that a call makes at most; steps: how many it is to make now.
        eos: ids that end answers.

    Returns:
        the batch, and the parts whose requests take tokens, in the order of their places.
    """
    lines: List[Tuple[Line, int]] = [(line, count) for part in parts
                                     for line, count in zip(part.seat.lines, part.counts) if count]
    lines.sort(key=lambda one: one[0].job.slots[one[0].number])
    numbers = {id(line): number for number, (line, _) in enumerate(lines)}
    tables = np.full((len(lines), blocks), -1, np.int32)
    for number, (line, _) in enumerate(lines):
        tables[number, :len(line.table)] = line.table

    takers = [part for part in parts if part.takes]
    options = OptionRows(len(takers))
    uniforms = np.zeros((len(takers), capacity), np.float32)
    for place, part in enumerate(takers):
        job = part.seat.job
        options.whole[place], options.real[place] = part.seat.options[0][0], part.seat.options[1][0]
        options.put_rows(place, [numbers[id(line)] for line in part.seat.lines],
                         [row.weight for row in job.request.rows])
        options.put(place, "min_tokens", job.adjusting.min_tokens)
        options.put(place, "budget", job.left)
        uniforms[place] = job.uniforms(capacity)
    jobs = [part.seat.job for part in takers]
    nothing = np.zeros(0, np.int32)
    extras = [job.adjusting.extras() if job.adjusting.any else {} for job in jobs]
    adjustments = {name: [one.get(name) for one in extras] for name in ("entries", "bias", "mask") if any(extras)}
    prompts = [job.request.ids if job.request.copies else nothing for job in jobs]
    ends = () if jobs and all(job.request.options.ignore_eos for job in jobs) else sorted(eos)
    return FlatBatch(
        tokens=np.concatenate([line.ids(line.filled, line.filled + count) for line, count in lines]),
        rows=np.repeat(np.arange(len(lines), dtype=np.int32), [count for _, count in lines]),
        positions=np.concatenate([np.arange(line.filled, line.filled + count, dtype=np.int32)
                                  for line, count in lines]),
        slots=np.array([line.job.slots[line.number] for line, _ in lines], np.int32), tables=tables,
        copies=np.array([line.copy for line, _ in lines if line.copy is not None], np.int32).reshape(-1, 2),
        strengths=np.array([line.job.request.rows[line.number].scale for line, _ in lines], np.float32),
        whole=options.whole, real=options.real, mix_rows=options.mix_rows, mix_weights=options.mix_weights,
        previous=np.array([job.tokens[-1] if job.tokens else -1 for job in jobs], np.int32), uniforms=uniforms,
        eos=np.array(ends, np.int32), steps=steps, prompts=prompts if any(map(len, prompts)) else None,
        adjustments=adjustments), takers
