"""Requests answered by the device step of the rehearsal, of models with routed experts: held to the half-type reference
and to the Cells in float32, or to the logits of transformers; what a step launches. JSON of {case: what was found}. Run
in a process of its own by test_device_experts.py.

    python experts_step.py [CASE ...]
"""
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.update(COLORA_KERNELS="rehearsal", COLORA_ASCEND_DTYPE="float16", COLORA_ASCEND_BLOCK="16")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import numpy as np  # noqa: E402

from mindspore import Tensor  # noqa: E402

from colora_ms import runtime  # noqa: E402
from colora_ms.decoding import Contrast, Generator  # noqa: E402
from colora_ms.kernels.launches import launches_of  # noqa: E402
from golden_experts import CASES, opened  # noqa: E402
from rehearsal_case import Wanted, compare, mixed_requests, reference_of, watched  # noqa: E402
from rehearse_ascend import Words, with_adapters  # noqa: E402

#: Largest prompt of the requests; tokens of the golden prompt, which is one of them, and of an answer.
LONGEST, GOLDEN, ANSWER = 16, 22, 5


class CellsReference:
    """The logits of the decoder's Cells in float32, all sequences in one run."""

    dtype = "float16"

    def __init__(self, decoder, wanted, half):
        self._kept, self.settled = {}, half.settled
        ids = np.zeros((len(wanted), GOLDEN + ANSWER), np.int32)
        for row, (sequence, _) in enumerate(wanted):
            ids[row, :len(sequence)] = sequence
        lengths = np.array([len(sequence) for sequence, _ in wanted], np.int32)
        slots = np.array([slot for _, slot in wanted], np.int32)
        found = runtime.run(decoder.set_train(False), Tensor(ids), Tensor(lengths), Tensor(slots)).asnumpy()
        for (sequence, slot), length, logits in zip(wanted, lengths, found):
            self._kept[slot, tuple(sequence)] = logits[:length]

    def logits(self, ids, slot):
        """As of ``HalfReference``."""
        return self._kept[slot, tuple(ids)]


def rehearsed(case):
    """What one case gives."""
    decoder, ids, golden = opened(case)
    handle = with_adapters(decoder)
    generator = Generator(decoder, Words(), handle, max_rows=8)
    requests = mixed_requests(6, decoder.config.vocab_size, LONGEST, [Contrast(0.1, 0.5)], ["one", "two"])
    requests[0] = Wanted(ids[:GOLDEN].tolist())
    with watched() as rows:
        answers = generator.generate(
            [one.prompt for one in requests], adapter=[one.adapter for one in requests],
            contrast=[one.contrast for one in requests], max_new_tokens=ANSWER, ignore_eos=True)
    for one, answer in zip(requests, answers):
        one.tokens = list(answer.tokens)
    slots = {None: -1, **{name: handle.slot(name) for name in handle.names}}
    half = reference_of(decoder, handle, "float16")
    graph = generator._core.graph
    found = {"cache": type(graph.cache).__name__, "layers": decoder.config.num_hidden_layers,
             "half": dataclasses.asdict(compare(rows, requests, slots, half))}
    if golden is None:
        wanted = sorted({(tuple([*one.prompt, *one.tokens]), slot) for one in requests
                         for slot in {slots[one.adapter]} | ({-1} if one.contrast else set())})
        found["cells"] = dataclasses.asdict(compare(rows, requests, slots, CellsReference(decoder, wanted, half)))
    else:
        own = [row for row in rows if row.slot < 0 and row.ids.tolist() == ids[:len(row.ids)].tolist()]
        found["golden"] = [[float(np.abs(row.logits - want).max() / np.abs(want).max()), int(row.logits.argmax()),
                            int(want.argmax())] for row, want in zip(own, golden[GOLDEN - 1:])]
    for (phase, adapted, _), cell in graph.device.steps.items():
        counted = launches_of(cell)
        found.setdefault(f"{phase} {adapted}", []).append(
            [dict(counted.by_name()), counted.copied_bytes(), counted.views_refused])
    return found


if __name__ == "__main__":
    print(json.dumps({case: rehearsed(case) for case in sys.argv[1:] or CASES}))
