"""The adapters' dropout: which mask is drawn when, in graphs and in PyNative mode, and what is saved of it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from colora_ms import runtime  # noqa: E402
from colora_ms.adapters import LoraConfig, inject  # noqa: E402
from colora_ms.adapters import dropout as module  # noqa: E402
from colora_ms.adapters.dropout import Dropout, dropout_streams  # noqa: E402
from colora_ms.kernels import ABSENT  # noqa: E402
from test_dropout_kernel import mask  # noqa: E402

RATE, SHAPE = 0.25, (2, 3, 40)


def drawn(cell, x):
    """Which elements one call in training leaves, of x without zeros; checks their values."""
    y = cell(x).asnumpy()
    kept = y != 0
    np.testing.assert_allclose(y, np.where(kept, x.asnumpy() / (1 - RATE), 0), rtol=1e-6)
    assert 0 < kept.mean() < 1
    return kept


@pytest.fixture
def ones(mindspore):
    return mindspore.Tensor(np.ones(SHAPE, np.float32))


@pytest.fixture(params=["graph", "pynative"])
def mode(request, mindspore):
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE if request.param == "graph" else mindspore.PYNATIVE_MODE)
    yield request.param
    mindspore.set_context(mode=before)


def test_masks_follow_from_the_state_and_count_calls_in_training(mode, mindspore, ones):
    cell = Dropout(RATE, 3, "a.b").set_train()
    start = cell.stream.asnumpy().copy()
    offset = 0
    if mode == "pynative":
        mindspore.manual_seed(7)
    for call in range(1, 4):
        kept = drawn(cell, ones)
        # MindSpore's generator counts from 0 in PyNative mode, the stream counts the calls from 1 in a graph.
        key = (start + (call if mode == "graph" else offset)) ^ cell.worker.asnumpy()
        offset += 1
        np.testing.assert_array_equal(kept, mask(SHAPE, key, RATE))
        cell.set_train(False)
        assert np.array_equal(cell(ones).asnumpy(), ones.asnumpy())
        cell.set_train()
    state, place = mindspore.get_rng_state(), mindspore.Tensor(cell.stream.asnumpy().copy())
    following = [drawn(cell, ones) for _ in range(2)]
    again = Dropout(RATE, 99, "elsewhere").set_train()
    mindspore.set_rng_state(state)
    again.stream.set_data(place)
    for one in following:
        np.testing.assert_array_equal(drawn(again, ones), one)


def test_a_compiled_function_in_pynative_mode_counts_in_the_stream(mindspore, ones):
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    try:
        cell = Dropout(RATE, 3, "a.b").set_train()
        start = cell.stream.asnumpy().copy()

        @mindspore.jit
        def compiled(x):
            return cell(x)

        kept = drawn(compiled, ones)
        np.testing.assert_array_equal(cell.stream.asnumpy(), start + 1)
        np.testing.assert_array_equal(kept, mask(SHAPE, (start + 1) ^ cell.worker.asnumpy(), RATE))
    finally:
        mindspore.set_context(mode=before)


def test_seed_place_and_worker_choose_the_masks(mindspore, ones, monkeypatch):
    def first(seed=0, path="p", rank=None):
        if rank is not None:
            monkeypatch.setattr(module.GlobalComm, "INITED", True)
            monkeypatch.setattr(module, "get_rank", lambda: rank)
        return drawn(Dropout(RATE, seed, path).set_train(), ones)

    base = first()
    assert np.array_equal(first(), base)
    others = [first(seed=1), first(path="q"), first(rank=1), first(rank=2)]
    assert np.array_equal(first(rank=0), base), "one process is worker 0"
    for k, one in enumerate(others):
        assert not np.array_equal(one, base) and not any(np.array_equal(one, other) for other in others[:k])
    streams = [Dropout(RATE, 0, "p").stream.asnumpy() for _ in range(2)]
    monkeypatch.setattr(module, "get_rank", lambda: 5)
    streams.append(Dropout(RATE, 0, "p").stream.asnumpy())
    assert all(np.array_equal(one, streams[0]) for one in streams), "what is saved must be equal on all workers"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_drops_the_inputs_of_its_pair_alone(mindspore, tiny_decoder, tmp_path, options):
    """y = W x + s up (down (mask x / (1 - rate))), in NumPy; DoRA: each row's factor on the dropped x alone."""
    net = tiny_decoder()
    handle = inject(net, LoraConfig(r=2, lora_alpha=3, target_modules=["up_proj", "q_proj"], lora_dropout=RATE,
                                    init_lora_weights=False, **options), seed=4)
    streams = {p.name: p.asnumpy().copy() for p in dropout_streams(net)}
    paths = [f"model.layers.{k}.{name}" for k in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert set(streams) == {f"{path}.lora_dropout" for path in paths}
    assert len({value.tobytes() for value in streams.values()}) == 4
    assert not any("dropout" in p.name for p in handle.trainable_params())
    cell = handle.sites[paths[1], "lora"]
    if options:  # lengths of their own, so that the factor is not 1
        values = cell.read(0, {"down": (2, 32), "up": (48, 2), "magnitude": (48,)})
        cell.write(0, {**values, "magnitude": values["magnitude"] * np.linspace(0.5, 2, 48, dtype=np.float32)}, 1.5)
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    cell.set_train()
    rows = (mindspore.Tensor(np.array([0, -1], np.int32)), ABSENT)
    y = runtime.run(cell, mindspore.Tensor(x), rows).asnumpy()
    kept = mask(x.shape, (streams[f"{paths[1]}.lora_dropout"] + 1) ^ cell.dropout.worker.asnumpy(), RATE)
    weight, down, up = (np.float64(value) for value in (cell.base_layer.weight.asnumpy(), cell.down.asnumpy()[0],
                                                        cell.up.asnumpy()[0]))
    dropped = np.where(kept, x / (1 - RATE), 0)
    want = x @ weight.T
    g = cell.magnitude.asnumpy()[0] / np.linalg.norm(weight + 1.5 * up @ down, axis=1) if options else np.ones(48)
    want[0] += ((g - 1) * (dropped @ weight.T) + g * 1.5 * (dropped @ down.T @ up.T))[0]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    handle.save(tmp_path / "a")
    assert {name.rsplit(".lora_", 1)[-1] for name in load_file(tmp_path / "a" / "adapter_model.safetensors")} <= {
        "A.weight", "B.weight", "magnitude_vector"}
