"""The loss of preference pairs: formula, log-probabilities, gradients against float64; its reference, its refusals."""

import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mindspore as ms
from mindspore import Tensor, nn, ops

sys.path.insert(0, os.path.dirname(__file__))
from colora_ms.adapters import LilyConfig, LoraConfig, inject  # noqa: E402
from colora_ms.errors import ConfigError  # noqa: E402
from colora_ms.evaluation.decoder_scorer import TokenLosses  # noqa: E402
from colora_ms.models.config import DecoderConfig  # noqa: E402
from colora_ms.models.decoder import Decoder  # noqa: E402
from colora_ms.training.batching import Batch  # noqa: E402
from colora_ms.training.config import OptimizerConfig, PreferenceConfig  # noqa: E402
from colora_ms.training.encoding import IGNORE, EncodedExample  # noqa: E402
from colora_ms.training.preference import PreferenceLossCell, check_reference  # noqa: E402
from colora_ms.training.preference_data import EncodedPair, PairLoader  # noqa: E402
from colora_ms.training.step import CausalLossCell, EvaluationStep, Stepper  # noqa: E402
from test_forward_float64 import forward  # noqa: E402
from training_stand_in import TinyDecoder  # noqa: E402

ms.set_context(mode=ms.GRAPH_MODE)

CONFIG = DecoderConfig(model_type="llama", vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=6, max_position_embeddings=64)
RANK, ALPHA = 3, 6
NAMES = PreferenceLossCell.figures


def weights(seed=0):
    random = np.random.default_rng(seed)
    return {name: (random.normal(size=shape) * 0.4 + ("norm" in name)).astype(np.float32)
            for name, shape in CONFIG.parameter_shapes().items()}


def adapted(start=None, seed=0, **options):
    """(decoder with a LoRA of rank 3, its handle); ``start``: scale of random values for both factors, None leaves up
    0."""
    decoder = Decoder(CONFIG, weights(seed))
    handle = inject(decoder, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **options), seed=1)
    if start is not None:
        random = np.random.default_rng(seed + 1)
        for parameter in handle.trainable_params():
            parameter.set_data(Tensor((random.normal(size=parameter.shape) * start).astype(np.float32)))
    return decoder, handle


def pairs(count, seed=0, longest=9):
    """Pairs of answers of different lengths to prompts of one to four tokens."""
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        prompt = random.integers(0, CONFIG.vocab_size, random.integers(1, 5))
        halves = []
        for _ in range(2):
            answer = random.integers(0, CONFIG.vocab_size, random.integers(1, longest - 3))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            labels = np.where(np.arange(len(ids)) < len(prompt), IGNORE, ids).astype(np.int32)
            halves.append(EncodedExample(ids, labels))
        found.append(EncodedPair(*halves, index))
    return found


def batch_of(items, size=None, bucket=9):
    return next(iter(PairLoader(items, size or len(items), buckets=[bucket], shuffle=False).epoch_batches()))


# -- the whole loss in NumPy float64 -----------------------------------------------------------------------------------


def merged(base, values):
    """The base weights with the adapter in them, float64; values: {parameter's name: array}."""
    result = {name: value.astype(np.float64) for name, value in base.items()}
    for name, down in values.items():
        if name.endswith(".lora_A"):
            up = np.asarray(values[name.replace("lora_A", "lora_B")][0], np.float64)
            result[name.replace("lora_A", "weight")] += ALPHA / RANK * up @ np.asarray(down[0], np.float64)
    return result


def answer_logprobs(tensors, batch):
    """(rows, tokens) log-probabilities of the labels, 0 elsewhere."""
    logits = forward(CONFIG, tensors, batch.ids)
    logits = logits - logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, np.maximum(batch.labels, 0)[..., None], -1)[..., 0]
    return np.where(batch.labels == IGNORE, 0, picked)


def numpy_loss(config, policy, reference, labels):
    """(loss_sum, count, {figure: sum}) by the formulas; policy, reference: (rows, tokens) log-probabilities."""
    counts = (labels != IGNORE).sum(1)
    share = 1 / np.maximum(counts, 1) if config.length_normalised else np.ones(len(counts))
    pi, ref = policy.sum(1) * share, reference.sum(1) * share
    real = counts[0::2] > 0
    delta = (pi[0::2] - pi[1::2]) - (ref[0::2] - ref[1::2])
    z = config.beta * delta
    if config.loss == "ipo":
        losses = (delta - 1 / (2 * config.beta)) ** 2
    else:
        losses = (1 - config.label_smoothing) * np.logaddexp(0, -z) + config.label_smoothing * np.logaddexp(0, z)
    rows = (z > 0, z, config.beta * (pi - ref)[0::2], config.beta * (pi - ref)[1::2], pi[0::2], pi[1::2])
    return losses[real].sum(), real.sum(), {name: row[real].sum() for name, row in zip(NAMES, rows)}


FORMS = [PreferenceConfig(beta=0.7), PreferenceConfig(beta=0.3, label_smoothing=0.2),
         PreferenceConfig(beta=0.5, length_normalised=True), PreferenceConfig(beta=0.4, loss="ipo"),
         PreferenceConfig(beta=1.5, loss="ipo", length_normalised=True)]


@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c.loss}-{c.beta}-{c.label_smoothing}-{c.length_normalised}")
def test_loss_and_all_gradients_follow_float64(config):
    decoder, handle = adapted(start=0.3)
    cell = PreferenceLossCell(decoder, config)
    batch = batch_of(pairs(3), size=4)  # one pair fills up
    slots = Tensor(np.zeros(8, np.int32))
    parameters = handle.trainable_params()

    class Step(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.gradient = ops.value_and_grad(cell, None, parameters, has_aux=True)

        def construct(self, ids, labels, lengths, slots):
            return self.gradient(ids, labels, lengths, slots)

    (loss, count, sums), grads = Step()(Tensor(batch.ids), Tensor(batch.labels), Tensor(batch.lengths), slots)
    base, values = weights(), {item.name: item.asnumpy().astype(np.float64) for item in parameters}
    reference = answer_logprobs(base, batch)

    def value():
        return numpy_loss(config, answer_logprobs(merged(base, values), batch), reference, batch.labels)

    want, number, figures = value()
    assert float(count.asnumpy()) == number == 3
    assert float(loss.asnumpy()) == pytest.approx(want, rel=2e-5)
    assert abs(figures["margin"]) > 0.1, "the adapter must say something"
    np.testing.assert_allclose(sums.asnumpy(), [figures[name] for name in NAMES], rtol=2e-4, atol=2e-5)
    step = 1e-5
    for parameter, grad in zip(parameters, grads):
        array, grad = values[parameter.name], grad.asnumpy()
        assert np.any(grad)
        places = list(np.ndindex(array.shape))
        if config is not FORMS[0]:  # every element once, some of each parameter for the other forms
            places = [places[k] for k in np.random.default_rng(5).choice(len(places), 4, replace=False)]
        for index in places:
            kept = array[index]
            ends = []
            for sign in (1, -1):
                array[index] = kept + sign * step
                ends.append(value()[0])
            array[index] = kept
            slope = (ends[0] - ends[1]) / (2 * step)
            assert grad[index] == pytest.approx(slope, rel=2e-3, abs=2e-4), (parameter.name, index)


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 5), spare=st.integers(0, 2), bucket=st.integers(8, 17), seed=st.integers(0, 99),
       beta=st.floats(0.01, 3), smoothing=st.sampled_from([0.0, 0.1, 0.45]), normalised=st.booleans(),
       loss=st.sampled_from(["sigmoid", "ipo"]), start=st.sampled_from([0.0, 0.05, 0.4]))
def test_any_shape_length_and_setting(count, spare, bucket, seed, beta, smoothing, normalised, loss, start):
    config = PreferenceConfig(beta=beta, label_smoothing=smoothing if loss == "sigmoid" else 0.0,
                              length_normalised=normalised, loss=loss)
    decoder, handle = adapted(start=start, seed=seed)
    batch = batch_of(pairs(count, seed), count + spare, bucket)
    results = EvaluationStep(PreferenceLossCell(decoder, config))(
        *(Tensor(item) for item in (batch.ids, batch.labels, batch.lengths)),
        Tensor(np.zeros(2 * (count + spare), np.int32)))
    base = weights(seed)
    policy = answer_logprobs(merged(base, {item.name: item.asnumpy() for item in handle.trainable_params()}), batch)
    want, number, figures = numpy_loss(config, policy, answer_logprobs(base, batch), batch.labels)
    assert float(results[1].asnumpy()) == number == count
    assert float(results[0].asnumpy()) == pytest.approx(want, rel=1e-4, abs=1e-5)
    got = dict(zip(NAMES, results[2].asnumpy()))
    for name in NAMES[1:]:
        assert got[name] == pytest.approx(figures[name], rel=1e-3, abs=1e-4), name
    assert got["accuracy"] == figures["accuracy"]


#: (loss, beta, label smoothing, ratio, value, slope): torch's logsigmoid and autograd in float64, TRL's formulas.
GOLDEN = [("sigmoid", 0.1, 0.0, 2.0, 0.598138869, -0.0450166), ("sigmoid", 0.1, 0.1, 2.0, 0.618138869, -0.0350166),
          ("sigmoid", 0.5, 0.0, -30.0, 15.000000306, -0.499999847),
          ("sigmoid", 0.5, 0.25, -30.0, 11.250000306, -0.374999847),
          ("sigmoid", 1.0, 0.4, 0.0, 0.693147181, -0.1), ("ipo", 0.1, 0.0, 2.0, 9.0, -6.0),
          ("ipo", 0.5, 0.0, -3.0, 16.0, -8.0),
          ("sigmoid", 1.0, 0.0, 0.0, 0.693147181, -0.5), ("sigmoid", 1.0, 0.0, 500.0, 0.0, 0.0),
          ("sigmoid", 1.0, 0.0, -500.0, 500.0, -1.0), ("sigmoid", 2.0, 0.25, 300.0, 150.0, 0.5)]


@pytest.mark.parametrize("loss, beta, smoothing, ratio, value, slope", GOLDEN)
def test_golden_values_and_slopes_of_the_formula(loss, beta, smoothing, ratio, value, slope):
    cell = PreferenceLossCell(adapted()[0], PreferenceConfig(beta=beta, loss=loss, label_smoothing=smoothing))

    class Step(nn.Cell):
        def construct(self, ratio):
            return ops.value_and_grad(cell.pair_losses)(ratio)

    got, gradient = Step()(Tensor(np.array([ratio], np.float32)))
    np.testing.assert_allclose([got.asnumpy()[0], gradient.asnumpy()[0]], [value, slope], rtol=1e-6, atol=1e-6)


# -- the reference -----------------------------------------------------------------------------------------------------


class Losses(nn.Cell):
    """The token losses of the cell, with the adapter and without."""

    def __init__(self, cell):
        super().__init__(auto_prefix=False)
        self.cell = cell

    def construct(self, ids, labels, lengths, slots):
        return self.cell.token_losses(ids, labels, lengths, slots)


def lora(**options):
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **options)


ADAPTERS = {
    "lora": lora(), "dropout": lora(lora_dropout=0.3), "dora": lora(use_dora=True),
    "saved": lora(modules_to_save=["norm", "input_layernorm"]),
    "head": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "lm_head"]),
    "saved head": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"],
                         trainable_token_indices=[1, 2, 5, 8, 13, 21]),
    "lily": LilyConfig(r=RANK, target_modules=["q_proj", "v_proj"], num_B=2),
}


@pytest.mark.parametrize("name, weight_format", [*((name, "float32") for name in ADAPTERS), ("lora", "bfloat16"),
                                                 ("dropout", "int8")])
def test_the_reference_is_the_model_without_an_adapter_bit_for_bit(name, weight_format):
    plain = Decoder(CONFIG, weights(), weight_format)
    batch = batch_of(pairs(3), size=4)
    tensors = [Tensor(item) for item in (batch.ids, batch.labels, batch.lengths)]
    handle = inject(Decoder(CONFIG, weights(), weight_format), ADAPTERS[name], seed=1)
    decoder, random = handle.net, np.random.default_rng(3)
    for parameter in handle.trainable_params():
        noise = random.normal(size=parameter.shape) * 0.3
        parameter.set_data(Tensor((parameter.asnumpy() + noise).astype(np.float32)))
    cell = PreferenceLossCell(decoder, PreferenceConfig())
    cell.set_train(True)
    losses, reference = Losses(cell)(*tensors, Tensor(np.zeros(8, np.int32)))
    want = TokenLosses(plain)(*tensors, Tensor(np.full(8, -1, np.int32))).asnumpy()
    if cell.fused == CausalLossCell(plain).fused:  # the same way through the head
        np.testing.assert_array_equal(reference.asnumpy(), want)
    np.testing.assert_allclose(reference.asnumpy(), want, rtol=1e-5, atol=1e-5)
    assert np.abs(losses.asnumpy() - want).max() > 0.01, "the adapter must say something"


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize("loss, expected", [("sigmoid", np.log(2)), ("ipo", 25.0)])
def test_an_adapter_that_says_nothing_has_margin_0(options, loss, expected):
    decoder = Decoder(CONFIG, weights())
    inject(decoder, LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **options}), seed=1)
    cell = PreferenceLossCell(decoder, PreferenceConfig(beta=0.1, loss=loss))
    batch = batch_of(pairs(5))
    loss, count, sums = EvaluationStep(cell.set_train(True))(
        *(Tensor(item) for item in (batch.ids, batch.labels, batch.lengths)), Tensor(np.zeros(10, np.int32)))
    assert float(loss.asnumpy()) / float(count.asnumpy()) == pytest.approx(expected, abs=1e-6 * max(expected, 1))
    assert not sums.asnumpy()[:4].any(), "no pair is right, and all rewards are 0 exactly"


def test_a_pair_does_not_depend_on_its_neighbours():
    decoder, _ = adapted(start=0.3)
    losses = Losses(PreferenceLossCell(decoder, PreferenceConfig()))
    batch = batch_of(pairs(4))
    slots = Tensor(np.zeros(8, np.int32))

    def of(order):
        return [item.asnumpy() for item in losses(Tensor(batch.ids[order]), Tensor(batch.labels[order]),
                                                  Tensor(batch.lengths[order]), slots)]
    order = np.array([6, 7, 0, 1, 4, 5, 2, 3])
    for straight, turned in zip(of(np.arange(8)), of(order)):
        np.testing.assert_array_equal(straight[order], turned)


# -- steps -------------------------------------------------------------------------------------------------------------


def stepper_of(**options):
    decoder, handle = adapted(start=0.1)
    cell = PreferenceLossCell(decoder, PreferenceConfig(beta=0.5))
    return Stepper(decoder, OptimizerConfig(learning_rate=0.02, **options), loss_cell=cell), handle


def test_accumulated_pairs_equal_one_large_batch():
    (parts, few), (whole, many) = stepper_of(accumulation_steps=2), stepper_of()
    items = pairs(7, seed=4)
    for step in (1, 2, 3):
        first, second = batch_of(items[:4]), batch_of(items[4:], size=4)
        joined = Batch(*(np.concatenate([getattr(first, name), getattr(second, name)])
                         for name in ("ids", "labels", "lengths")))
        assert parts([first, second], step, 3) == pytest.approx(whole([joined], step, 3), rel=1e-4)
        assert parts.figures == pytest.approx(whole.figures, rel=1e-3, abs=1e-5) and set(parts.figures) == set(NAMES)
        assert parts.tokens == whole.tokens == joined.tokens
    for one, other in zip(few.trainable_params(), many.trainable_params()):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=2e-5)


def test_updates_lower_the_loss_and_leave_the_base_alone():
    stepper, handle = stepper_of()
    items = pairs(6, seed=2)
    batch = batch_of(items)
    before = {parameter.name: parameter.asnumpy().copy() for parameter, _ in handle.frozen}
    first = stepper([batch], 1, 40)[0]
    for step in range(2, 41):
        last = stepper([batch], step, 40)[0]
    assert last < 0.2 * first and stepper.figures["accuracy"] == 1.0 and stepper.figures["margin"] > 1
    evaluation = EvaluationStep(stepper.loss_cell)
    assert evaluation.run([batch], stepper) < 0.2 * first and evaluation.figures["accuracy"] == 1.0
    for parameter, _ in handle.frozen:
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_models_without_a_base_to_compare_with_are_refused():
    with pytest.raises(ConfigError, match="no adapter; inject one first"):
        check_reference(TinyDecoder())
    for start in ("pissa", "olora"):
        decoder = Decoder(CONFIG, weights())
        inject(decoder, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], init_lora_weights=start))
        with pytest.raises(ConfigError, match=f"'default' started from the base weights.*'{start}'"):
            PreferenceLossCell(decoder, PreferenceConfig())
    decoder, handle = adapted(start=0.1)
    handle.merge()
    with pytest.raises(ConfigError, match="'default' is merged"):
        check_reference(decoder)
    handle.unmerge()
    check_reference(decoder)
    decoder.model.norm.weight.requires_grad = True
    with pytest.raises(ConfigError, match="model.norm.weight .1 such parameters. of the base model is trained"):
        check_reference(decoder)


def test_cells_that_take_no_slots_are_refused():
    class Foreign(nn.Cell):
        def __init__(self):
            super().__init__()
            self.dense = nn.Dense(4, 4)

    net = Foreign()
    inject(net, LoraConfig(r=2, lora_alpha=2, target_modules=["dense"]))
    with pytest.raises(ConfigError, match="dense .1 such modules. takes no slot for each row"):
        check_reference(net)
