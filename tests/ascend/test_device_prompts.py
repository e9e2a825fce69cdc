"""The pairs of a prefill graph, masked dense and grouped, against the half-type reference; launches and bytes."""
import dataclasses
import sys

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Tensor, nn  # noqa: E402

from colora_ms.adapters import LoraConfig, inject  # noqa: E402
from colora_ms.decoding.device_step import step_inputs  # noqa: E402
from colora_ms.kernels import ascend_builtin  # noqa: E402
from colora_ms.kernels.launches import launches_of  # noqa: E402
from colora_ms.models import device_form  # noqa: E402
from colora_ms.models.device_decoder import DeviceDecoder  # noqa: E402
from test_device_step import SCRIPTS, batch, decoder, form  # noqa: E402, F401

sys.path.append(str(SCRIPTS))
import pair_bytes  # noqa: E402
from rehearsal_case import ROUNDINGS, reference_of  # noqa: E402


class Prompts(nn.Cell):
    """A prefill without a choice of tokens."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache
        self.mask = ms.Parameter(ascend_builtin.prompt_mask(cache.dtype), name="prompt_mask")

    def construct(self, tokens, positions, slots, slot_mapping, groups, batch_valid_length, q_seq_lens, read):
        return self.model(tokens, positions, (slots, groups), batch_valid_length, self.cache.keys, self.cache.values,
                          (slot_mapping, self.mask), read)


def of_pairs(launches):
    """Bytes that the pairs move, and their masks."""
    def moved(found):
        return sum(sum(size for _, size in one.reads) + one.writes for one in found)

    banks = (".down", ".expand", ".shrink")
    pairs = [one for one in launches
             if one.name in ("Select", "Add") or any(name.endswith(banks) for name, _ in one.reads)]
    return moved(pairs), moved([one for one in launches if one.name == "Equal"])


def test_a_prefill_of_two_ranks_and_the_base_is_the_reference(mindspore, emulator, form):  # noqa: F811
    """Four linears; then the inner products of one adapter are beyond float16, which its own rows alone see."""
    ascend_builtin.load()
    net = decoder(num_hidden_layers=1)
    config = {"lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    handle = inject(net, LoraConfig(r=8, **config), "one", slots=2, seed=1)
    handle.add_adapter("two", LoraConfig(r=3, **config))
    device = DeviceDecoder(net, ms.float16)
    cell = Prompts(device, device_form.CacheForm(16, (ms.float16,), True).make(net.config, 4)).set_train(False)
    cell.set_jit_config(ms.JitConfig(jit_level="O0", infer_boost="on"))
    sizes, slots = [5, 4, 3, 4], [1, -1, 0, -1]
    rows = np.repeat(np.arange(4), sizes)
    given = batch(rows, np.concatenate([np.arange(size) for size in sizes]), slots, np.arange(4)[:, None])
    given = dataclasses.replace(given, tokens=np.random.default_rng(2).integers(0, 64, 16).astype(np.int32))
    _, inputs, moved = step_inputs(given, 16, 2, padded=False)
    inputs = [Tensor(one) for one in (*inputs, moved.astype(np.int32))]
    logits, reference = cell(*inputs).asnumpy(), reference_of(net, handle, "float16")
    want = np.concatenate([reference.logits(given.tokens[rows == row], slots[row]) for row in range(4)])
    base = reference.logits(given.tokens[:5], -1)
    unit = 2.0 ** -11 * np.abs(want).max(1)
    assert (np.abs(logits - want).max(1) <= ROUNDINGS * unit).all()
    assert np.abs(want[:5] - base).max() > 4 * ROUNDINGS * unit.max(), "the adapters say something"
    found = launches_of(cell)
    names = found.by_name()
    extra = [names[name] for name in ("MatMul", "GroupedMatmulV4", "Select", "Equal", "Add")]
    assert extra == ([5 + 8, 0, 4, 3, 4] if form == "masked" else [5, 8, 0, 0, 4])
    assert found.copied_bytes() == 0 and found.views_refused == () and names["Cast"] == 1
    shapes = ((128, 256, 3), (128, 128, 1), (128, 320, 2), (160, 128, 1))  # in, out, slices
    if form == "masked":
        want = (sum(pair_bytes.masked(16, width, out, 2 * 8 * slices) for width, out, slices in shapes),
                sum(pair_bytes.mask(16, 2 * 8 * slices) for slices in (3, 1, 2)))
    else:
        want = (sum(pair_bytes.grouped(16, width, out, 8 * slices, 2) for width, out, slices in shapes), 0)
    assert of_pairs(found.launches) == want
    down = getattr(device.layers[0].mlp.gate_up, "down" if form == "masked" else "shrink")
    loud = down.asnumpy()
    loud[0 if form == "masked" else 1] = 6e4
    down.set_data(Tensor(loud))
    again, spoiled = cell(*inputs).asnumpy(), rows == 2
    assert not np.isfinite(again[spoiled]).any(1).all() and np.array_equal(again[~spoiled], logits[~spoiled])
