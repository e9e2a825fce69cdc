"""Packed training: losses, gradients and hidden states are those of each example alone; the loop over packed
batches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspore import Tensor, nn

from colora_ms import runtime
from colora_ms.adapters import LilyConfig, LoraConfig, inject
from colora_ms.errors import AdapterError, ConfigError
from colora_ms.training import run as module
from colora_ms.training.batching import Batch, BatchLoader
from colora_ms.training.config import OptimizerConfig, TrainingConfig
from colora_ms.training.encoding import IGNORE, EncodedExample
from colora_ms.training.report import read_log
from colora_ms.training.step import EvaluationStep, Stepper
from colora_ms.training.trainer import Callback, Trainer


def examples(sizes, seed=0, vocabulary=97):
    random = np.random.default_rng(seed)
    items = []
    for index, size in enumerate(sizes):
        ids = random.integers(3, vocabulary, size).astype(np.int32)
        labels = np.where(np.arange(size) < random.integers(1, size), IGNORE, ids).astype(np.int32)
        items.append(EncodedExample(ids, labels, index))
    return items


def packed_batch(items, rows, length, width=None):
    """One batch whose rows are lists of positions in items."""
    ids, labels = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), IGNORE, np.int32)
    segments = np.zeros((len(rows), width or max(1, *map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        begin = 0
        for place, k in enumerate(row):
            end = begin + len(items[k]) - 1
            ids[number, begin:end], labels[number, begin:end] = items[k].ids[:-1], items[k].labels[1:]
            segments[number, place], begin = end - begin, end
    return Batch(ids, labels, segments.sum(1, dtype=np.int32), segments)


def plain_batch(items, length):
    """A row for each example, not packed."""
    batch = packed_batch(items, [[k] for k in range(len(items))], length)
    return Batch(batch.ids, batch.labels, batch.lengths)


def only(batch, row, begin, end):
    """The batch with the labels of one stretch alone."""
    labels = np.full_like(batch.labels, IGNORE)
    labels[row, begin:end] = batch.labels[row, begin:end]
    return Batch(batch.ids, labels, batch.lengths, batch.segments)


@pytest.fixture(scope="module")
def trained(mindspore, tmp_path_factory):
    """A function that builds a tiny decoder with an adapter that changes much."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    def build(config=None, weight_format="float32", **changes):
        sizes = dict(model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
        sizes.update(changes)
        shape = DecoderConfig(**sizes)
        random = np.random.default_rng(7)
        weights = {name: (random.standard_normal(size) * 0.3 + ("norm" in name)).astype(np.float32)
                   for name, size in shape.parameter_shapes().items()}
        decoder = Decoder(shape, weights, weight_format)
        config = config or LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        inject(decoder, config, seed=1)
        return decoder
    return build


class Sums:
    """Losses and summed gradients of batches, at the parameters as they are."""

    def __init__(self, decoder):
        self.stepper = Stepper(decoder, OptimizerConfig(accumulation_steps=2))

    def __call__(self, batches):
        part = self.stepper.part
        for buffer in part.buffers:
            buffer.set_data(buffer.value() * 0)
        losses = [float(runtime.run(part, *self.stepper.tensors(batch))[0].asnumpy()) for batch in batches]
        return losses, {item.name: item.asnumpy().astype(np.float64) for item in part.buffers}


CASES = {
    "lora": {}, "qwen3, norms of heads": dict(model_type="qwen3", qk_norm=True),
    "dora": dict(config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False,
                                   use_dora=True)),
    "int4 base": dict(weight_format="int4"),
    "lily by token": dict(config=LilyConfig(r=4, stride_A=1, num_B=3, scaling=1.0, init_weights=False,
                                            target_modules=["q_proj", "v_proj", "down_proj"])),
}


@pytest.mark.parametrize("name", CASES)
def test_packed_losses_and_gradients_are_those_of_each_example_alone(trained, name):
    sums = Sums(trained(num_hidden_layers=2 if name == "lora" else 1, **CASES[name]))
    items = examples([9, 2, 17, 5, 30, 12])
    plain = plain_batch(items, 31)
    whole, gradients = sums([plain])
    for rows, length in (([[4, 1], [2, 0], [3, 5]], 31), ([[0, 1, 2, 3, 4, 5]], 69)):
        loss, packed = sums([packed_batch(items, rows, length)])
        assert loss == pytest.approx(whole, rel=1e-5)
        for key, want in gradients.items():
            assert np.abs(packed[key] - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-3), key
    # And each example by itself.
    batch, evaluation = packed_batch(items, [[0, 1, 2, 3, 4, 5]], 69), EvaluationStep(sums.stepper.loss_cell)

    def loss_of(one):
        return float(runtime.run(evaluation, *sums.stepper.tensors(one))[0].asnumpy())
    begin = 0
    for k, size in enumerate(batch.segments[0]):
        assert loss_of(only(batch, 0, begin, begin + size)) == pytest.approx(loss_of(only(plain, k, 0, size)), rel=1e-5)
        begin += size


class Hidden(nn.Cell):
    def __init__(self, decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, ids, lengths, slots):
        return self.decoder.hidden(ids, lengths, slots)


def hidden_of(net, batch, slots):
    return runtime.run(net, Tensor(batch.ids), Tensor(batch.parts), Tensor(slots)).asnumpy()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.integers(0, 99), st.booleans())
def test_hidden_states_are_equal_to_the_last_bit_wherever_an_example_stands(hidden_net, sizes, seed, with_adapter):
    items = examples(sizes, seed)
    random = np.random.default_rng(seed)
    table = [[] for _ in range(3)]
    for k in random.permutation(len(items)):
        table[random.integers(3)].append(int(k))
    batch = packed_batch(items, table, 64, 8)
    slots = np.full(3, 0 if with_adapter else -1, np.int32)
    states = hidden_of(hidden_net, batch, slots)
    for number, row in enumerate(table):
        begin = 0
        for k in row:
            end = begin + len(items[k]) - 1
            for alone in (packed_batch(items, [[k], [], []], 64, 8), plain_batch([items[k]], 9)):
                want = hidden_of(hidden_net, alone, slots[:len(alone.ids)])
                assert np.array_equal(states[number, begin:end], want[0, :end - begin])
            begin = end


@pytest.fixture(scope="module")
def hidden_net(trained):
    return Hidden(trained())


def test_a_row_may_be_longer_than_the_models_context(trained):
    sums = Sums(trained(max_position_embeddings=16))
    items = examples([17, 12, 17, 9, 3])
    plain, _ = sums([plain_batch(items, 16)])
    together, _ = sums([packed_batch(items, [[0, 1, 2, 3, 4]], 64)])
    assert together == pytest.approx(plain, rel=1e-5)


def test_other_segments_compile_nothing(trained):
    stepper = Stepper(trained(num_hidden_layers=1), OptimizerConfig())
    loader = BatchLoader(examples(range(2, 40)), 2, buckets=[40], packing=True)
    for step in range(1, 9):
        stepper([loader.next()], step, 9)
    assert runtime.compilations(stepper.whole) == 1


@pytest.mark.parametrize("pool", ["sequence", "batch"])
def test_adapters_that_pool_over_rows_refuse_packing(trained, tmp_path, pool):
    config = LilyConfig(r=4, stride_A=1, num_B=3, router_pool=pool, target_modules=["q_proj"])
    decoder = trained(config)
    items = examples([5, 6, 7])
    with pytest.raises(AdapterError, match='router_pool "sequence" or "batch".*data.packing'):
        hidden_of(Hidden(decoder), packed_batch(items, [[0, 1, 2]], 20), np.zeros(1, np.int32))
    settings_ = TrainingConfig.from_dict({"output": str(tmp_path / "run"), "loop": {"steps": 1, "progress": False},
                                          "data": {"train": "unused", "packing": True}})
    with pytest.raises(ConfigError, match='router_pool "sequence" or "batch".*data.packing'):
        Trainer(decoder, Set(items), settings_, None)
    assert np.isfinite(hidden_of(Hidden(trained(config)), plain_batch(items, 9), np.zeros(3, np.int32))).all()


class Set:
    """What the trainer asks of an EncodedSet."""

    def __init__(self, items):
        self.items = items


# -- the loop ---------------------------------------------------------------------------------------------------------


class LetterTokenizer:
    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [1 + ord(letter) % 40 for letter in text]


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_decoder):
    """A recipe of 21 examples of 8 to 28 tokens, with validation data."""
    monkeypatch.setattr("colora_ms.models.load_model", lambda name, weight_format: (tiny_decoder(), LetterTokenizer()))
    lines = [{"prompt": f"say {k:02d}", "completion": "abcdefgh"[k % 5] * (1 + k)} for k in range(21)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    valid = [{"prompt": f"valid {k}", "completion": "ba" * (k + 1)} for k in range(7)]
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, valid)))

    def make(output, loop, accumulation=1, **data):
        return TrainingConfig.from_dict({
            "output": str(tmp_path / output), "adapter": {"r": 4, "target_modules": ["q_proj", "up_proj"]},
            "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "valid.jsonl"),
                     "template": "{prompt}={completion}", "batch_size": 2, **data},
            "optimizer": {"learning_rate": 0.02, "accumulation_steps": accumulation},
            "loop": {"progress": False, **loop}})
    return make


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, record):
        trainer.stopped_by = "a test" if record["step"] == self.step else ""


class Keep(Callback):
    def on_end(self, trainer, result):
        self.trainer = trainer


def test_a_packed_run_learns_what_a_padded_one_does_and_evaluates_alike(recipe):
    """One update from all examples, packed or in buckets: the same adapter, the same validation loss."""
    found = {}
    for packing in (False, True):
        keep = Keep()
        result = module.train(recipe(f"run{packing}", {"epochs": 1}, 64, packing=packing), callbacks=[keep])
        rows = [row for row in read_log(keep.trainer.folder / "log.jsonl") if row["kind"] != "data"]
        found[packing] = (result, rows, {item.name: item.asnumpy() for item in keep.trainer.stepper.optimizer.trained})
        assert result.steps == 1 and result.tokens == rows[0]["tokens"] == sum(6 + 1 + k + 1 for k in range(21))
    (plain, _, before), (packed, _, after) = found[False], found[True]
    assert packed.losses == pytest.approx(plain.losses, rel=1e-5)
    assert [loss for _, loss in packed.validation] == pytest.approx([loss for _, loss in plain.validation], rel=1e-5)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=2e-5, err_msg=name)


def test_packing_needs_fewer_batches_and_one_shape(recipe):
    keep = Keep()
    module.train(recipe("packed", {"epochs": 1}, packing=True), callbacks=[keep])
    loader, plain = keep.trainer.loader, recipe("padded", {"epochs": 1})
    shapes = {batch.ids.shape for batch in loader.epoch_batches()}
    assert len(shapes) == 1 and all(rows * tokens <= 2 * 32 for rows, tokens in shapes)
    assert runtime.compilations(keep.trainer.stepper.whole) == 1
    module.train(plain, callbacks=[keep])
    assert loader.batches_per_epoch < keep.trainer.loader.batches_per_epoch
    # The evaluation has the training's shape.
    assert {batch.ids.shape[1] for batch in keep.trainer.validation.epoch_batches()} <= set(keep.trainer.loader.buckets)


@pytest.mark.parametrize("packing, loop", [(False, {"epochs": 1.5}), (True, {"epochs": 1.5}), (True, {"steps": 5})])
def test_a_stopped_run_with_windows_resumes_exactly(recipe, packing, loop):
    settings_ = dict(accumulation=4, packing=packing, buckets=[32])
    keep = Keep()
    whole = module.train(recipe("a", loop, **settings_), callbacks=[keep])
    assert keep.trainer.loader.batches_per_epoch % 4, "an epoch must end within a window"
    with pytest.raises(KeyboardInterrupt):
        module.train(recipe("b", loop, **settings_), callbacks=[Stop(2)])
    rest = module.train(recipe("b", loop, **settings_), resume=True)
    assert rest.losses == whole.losses[2:] and rest.steps == whole.steps > 2
    a, b = (run.adapter.parent / "adapter" / "adapter_model.safetensors" for run in (whole, rest))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("accumulation, tokens", [(3, [24, 8]), (64, [32]), (1, [8, 8, 8, 8]), (4, [32])])
def test_the_last_window_of_an_epoch_is_a_smaller_update(recipe, tmp_path, accumulation, tokens):
    """4 batches of a row each; no batch of a second epoch is read, and only real tokens are counted."""
    lines = [{"prompt": "say", "completion": 4 * letter} for letter in "abcd"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen = []

    class Watch(Callback):
        def on_step(self, trainer, record):
            seen.append((record["tokens"], trainer.loader.state()["epoch"]))
    result = module.train(recipe("run", {"epochs": 1}, accumulation, batch_size=1), callbacks=[Watch()])
    assert [one for one, _ in seen] == tokens and {epoch for _, epoch in seen} == {0}
    assert result.steps == len(tokens) and result.tokens == 32


def test_rows_that_fill_a_batch_count_no_token(recipe):
    result = module.train(recipe("run", {"epochs": 1}, batch_size=8, buckets=[32]))
    rows = [row for row in read_log(result.adapter.parent / "log.jsonl") if row["kind"] == "step"]
    assert len(rows) == 3 and sum(row["tokens"] for row in rows) == result.tokens == sum(8 + k for k in range(21))
