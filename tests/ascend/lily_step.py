"""Logits of a decoder with Lily adapters by the device step of the rehearsal, and by its Cells in float32; the largest
difference and the largest logit, as JSON. Run in a process of its own by test_device_step.py."""
import json
import os
import sys
from pathlib import Path

os.environ.update(COLORA_KERNELS="rehearsal", COLORA_ASCEND_DTYPE="float16", COLORA_ASCEND_BLOCK="16")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import numpy as np  # noqa: E402

from mindspore import Tensor  # noqa: E402

from colora_ms import runtime  # noqa: E402
from colora_ms.adapters import LilyConfig, inject  # noqa: E402
from colora_ms.decoding import Generator  # noqa: E402
from rehearsal_case import watched  # noqa: E402
from rehearse_ascend import Words, random_decoder  # noqa: E402


def main():
    decoder = random_decoder(1)
    config = LilyConfig(r=4, num_B=2, target_modules=["q_proj", "up_proj", "down_proj"])
    handle = inject(decoder, config, "one", slots=1, seed=1)
    random = np.random.default_rng(2)
    for parameter in handle.trainable_params():
        parameter.set_data(Tensor(0.1 * random.standard_normal(parameter.shape).astype(np.float32)))
    generator = Generator(decoder, Words(), handle, max_rows=2)
    with watched() as rows:
        generator.generate([[5, 6, 7, 8]] * 2, adapter=["one", None], max_new_tokens=3, ignore_eos=True)
    worst, effect, largest = 0.0, 0.0, 0.0
    for row in rows:
        ids, length = Tensor(row.ids[None].astype(np.int32)), Tensor(np.array([len(row.ids)], np.int32))
        want, base = (runtime.run(decoder, ids, length, Tensor(np.array([slot], np.int32))).asnumpy()[0, -1]
                      for slot in (row.slot, -1))
        worst = max(worst, float(np.abs(row.logits - want).max()))
        effect, largest = max(effect, float(np.abs(want - base).max())), max(largest, float(np.abs(want).max()))
    print(json.dumps({"cache": type(generator._core.graph.cache).__name__, "worst": worst, "effect": effect,
                      "largest": largest, "rows": len(rows)}))


main()
