"""Schedule, AdamW, loss and gradients of a step, against NumPy float64."""

import math
import os
import sys

import numpy as np
import pytest

import mindspore as ms
from mindspore import Parameter, Tensor

sys.path.insert(0, os.path.dirname(__file__))
from colora_ms.errors import ConfigError  # noqa: E402
from colora_ms.training.config import OptimizerConfig  # noqa: E402
from colora_ms.training.data import Batch, BatchLoader  # noqa: E402
from colora_ms.training.optimizer import AdamW, is_up_factor, learning_rate  # noqa: E402
from colora_ms.training.step import CausalLossCell, EvaluationStep, Stepper  # noqa: E402
from training_stand_in import TinyDecoder, counting_items, numpy_gradients, numpy_loss, values_of  # noqa: E402

ms.set_context(mode=ms.GRAPH_MODE)


# -- schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps, warmup", [(100, 0.06), (10, 0.0), (1, 0.5), (7, 0.9)])
def test_rate_rises_then_falls(schedule, steps, warmup):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_ratio=warmup,
                             min_ratio=0.1)
    rates = [learning_rate(config, step, steps) for step in range(1, steps + 1)]
    turn = int(warmup * steps)
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:turn + 1] == sorted(rates[:turn + 1])
    assert rates[turn:] == sorted(rates[turn:], reverse=True)
    assert rates[turn] == 2.0
    if schedule == "constant":
        assert set(rates[turn:]) == {2.0}
    else:
        assert rates[-1] >= 0.2


def test_rate_at_chosen_points():
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_ratio=0.0)
    assert [learning_rate(linear, s, 4) for s in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2, min_ratio=0.5)
    assert [learning_rate(cosine, s, 10) for s in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]
    assert learning_rate(cosine, 7, 10) == pytest.approx(0.75)


def test_up_factors_are_told_by_name():
    ups = ["a.lora_B", "a.up", "a.lora_B.weight", "model.embed.lora_embedding_B"]
    others = ["a.lora_A", "a.up_proj.lora_A", "mlp.up_proj.lora_scale", "a.down", "backup"]
    assert all(map(is_up_factor, ups)) and not any(map(is_up_factor, others))


# -- AdamW -----------------------------------------------------------------------------------------


def numpy_adamw(config, values, grads, moments, step, steps):
    """One update in float64, straight from the paper's formulas; clipping over all gradients."""
    norm = math.sqrt(sum(float((grad ** 2).sum()) for grad in grads.values()))
    if config.max_grad_norm:
        factor = min(1.0, config.max_grad_norm / (norm + 1e-6))
        grads = {name: grad * factor for name, grad in grads.items()}
    rate = learning_rate(config, step, steps)
    for name, grad in grads.items():
        mean, square = moments.setdefault(name, [np.zeros_like(grad), np.zeros_like(grad)])
        mean[:] = config.beta1 * mean + (1 - config.beta1) * grad
        square[:] = config.beta2 * square + (1 - config.beta2) * grad ** 2
        mhat = mean / (1 - config.beta1 ** step)
        vhat = square / (1 - config.beta2 ** step)
        own = rate * (config.loraplus_lr_ratio if is_up_factor(name) else 1.0)
        # The decay follows the base rate, so that LoRA+ does not multiply it.
        values[name] -= own * mhat / (np.sqrt(vhat) + config.epsilon) \
            + rate * config.weight_decay * values[name]
    return norm


@pytest.mark.parametrize("settings", [
    {}, {"weight_decay": 0.1}, {"max_grad_norm": None, "epsilon": 1e-3}, {"max_grad_norm": 0.05},
    {"loraplus_lr_ratio": 16.0, "weight_decay": 0.05, "schedule": "linear"},
    {"beta1": 0.0, "beta2": 0.5}])
def test_adamw_follows_the_formulas(settings):
    config = OptimizerConfig(learning_rate=0.03, warmup_ratio=0.2, **settings)
    random = np.random.default_rng(0)
    shapes = {"x.lora_A": (1, 3, 5), "x.lora_B": (1, 7, 3), "bias": (4,)}
    values = {name: random.normal(size=shape).astype(np.float32).astype(np.float64)
              for name, shape in shapes.items()}
    parameters = [Parameter(Tensor(values[name].astype(np.float32)), name=name) for name in shapes]
    optimizer, moments = AdamW(parameters, config), {}
    for step in range(1, 13):
        divisor = float(random.integers(1, 50))
        grads = {name: (random.normal(size=shape) * divisor * 10.0 ** random.integers(-4, 2))
                 .astype(np.float32) for name, shape in shapes.items()}
        norm = optimizer(ms.mutable(tuple(Tensor(grads[item.name]) for item in optimizer.trained)),
                         Tensor(divisor, ms.float32), optimizer.hyper(step, 12))
        want = numpy_adamw(config, values, {name: grad.astype(np.float64) / divisor
                                            for name, grad in grads.items()}, moments, step, 12)
        assert float(norm.asnumpy()) == pytest.approx(want, rel=1e-5)
        for parameter in parameters:
            # float32's 1 - beta2 is off by 1e-5 of itself, and so is the size of every update.
            np.testing.assert_allclose(parameter.asnumpy(), values[parameter.name], rtol=2e-5,
                                       atol=2e-6 * config.loraplus_lr_ratio, err_msg=f"{parameter.name} at {step}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    parameters = [Parameter(Tensor(np.ones((2, 2), np.float32)), name=name) for name in "ab"]
    optimizer = AdamW(parameters, OptimizerConfig(weight_decay=0.5))
    good = np.full((2, 2), 0.1, np.float32)
    optimizer(ms.mutable((Tensor(good), Tensor(good))), Tensor(1.0, ms.float32), optimizer.hyper(1, 9))
    before = [item.asnumpy().copy() for item in parameters]
    broken = good.copy()
    broken[1, 0] = bad
    norm = optimizer(ms.mutable((Tensor(good), Tensor(broken))), Tensor(1.0, ms.float32),
                     optimizer.hyper(2, 9))
    assert not np.isfinite(norm.asnumpy())
    for item, old in zip(parameters, before):
        np.testing.assert_array_equal(item.asnumpy(), old)
    assert all(np.isfinite(item.asnumpy()).all() for item in (*optimizer.mean, *optimizer.square))


def test_adamw_refuses_what_it_cannot_train():
    with pytest.raises(ConfigError, match="nothing to train"):
        AdamW([], OptimizerConfig())
    half = Parameter(Tensor(np.ones(2, np.float16)), name="half")
    with pytest.raises(ConfigError, match="half is Float16, expected float32"):
        AdamW([half], OptimizerConfig())


# -- loss, gradients, accumulation -----------------------------------------------------------------


def batches_of(count, rows=3, seed=0):
    loader = BatchLoader(counting_items(24), rows, seed, buckets=[12])
    return [loader.next() for _ in range(count)]


@pytest.mark.parametrize("plain_head", [True, False])
def test_loss_counts_answer_tokens_only(plain_head):
    net = TinyDecoder(plain_head=plain_head)
    cell = CausalLossCell(net)
    assert cell.fused == plain_head
    evaluation = EvaluationStep(cell)
    stepper = Stepper(net, OptimizerConfig(), loss_cell=cell)
    for batch in batches_of(2):
        loss, count = (float(item.asnumpy()) for item in evaluation(*stepper.tensors(batch)))
        want, number = numpy_loss(values_of(net), batch)
        assert count == number == batch.answer_tokens
        assert loss == pytest.approx(want, rel=1e-5)
    batches = batches_of(3)
    sums = [numpy_loss(values_of(net), batch) for batch in batches]
    assert evaluation.run(batches, stepper) == \
        pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-5)


def test_padding_and_rows_without_labels_change_nothing():
    net = TinyDecoder()
    stepper = Stepper(net, OptimizerConfig())
    evaluation = EvaluationStep(stepper.loss_cell)
    batch = batches_of(1)[0]
    other = Batch(batch.ids.copy(), batch.labels, batch.lengths)
    for row, length in enumerate(batch.lengths):
        other.ids[row, length:] = 7
    want = evaluation.run([batch], stepper)
    assert evaluation.run([other], stepper) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_updates_follow_float64(accumulation):
    config = OptimizerConfig(learning_rate=0.05, weight_decay=0.01, max_grad_norm=0.2,
                             loraplus_lr_ratio=2.0, accumulation_steps=accumulation)
    net = TinyDecoder()
    stepper = Stepper(net, config)
    values = {name: item.astype(np.float64) for name, item in values_of(net).items()}
    frozen = {name: values[name].copy() for name in ("embed", "head")}
    moments, batches = {}, batches_of(4 * accumulation)
    for step in range(1, 5):
        some = batches[(step - 1) * accumulation:step * accumulation]
        loss, norm = stepper(some, step, 4)
        sums = [numpy_loss(values, batch) for batch in some]
        count = sum(number for _, number in sums)
        assert loss == pytest.approx(sum(total for total, _ in sums) / count, rel=1e-4)
        grads = {name: grad / count for name, grad in numpy_gradients(values, some).items()}
        want = numpy_adamw(config, values, grads, moments, step, 4)
        assert norm == pytest.approx(want, rel=1e-3)
        for name in grads:
            np.testing.assert_allclose(values_of(net)[name], values[name], atol=3e-4)
    for name, item in frozen.items():
        np.testing.assert_array_equal(values_of(net)[name], item)


def test_accumulated_batches_equal_one_large_batch():
    small, large = TinyDecoder(), TinyDecoder()
    config = {"learning_rate": 0.05, "max_grad_norm": 0.2}
    parts = Stepper(small, OptimizerConfig(accumulation_steps=4, **config))
    whole = Stepper(large, OptimizerConfig(**config))
    for step in (1, 2, 3):
        batches = batches_of(4, seed=step)
        joined = Batch(*(np.concatenate([getattr(batch, name) for batch in batches])
                         for name in ("ids", "labels", "lengths")))
        a, b = parts(batches, step, 3), whole([joined], step, 3)
        assert a == pytest.approx(b, rel=1e-5)
    for name, value in values_of(small).items():
        np.testing.assert_allclose(value, values_of(large)[name], atol=1e-5)


def test_weight_decay_with_neighbours_in_the_same_parameter_is_refused():
    net = TinyDecoder()
    net.down = Parameter(Tensor(np.zeros((2, 4, 8), np.float32)), name="layer.lora_A")
    with pytest.raises(ConfigError, match="other adapters.*layer.lora_A"):
        Stepper(net, OptimizerConfig(weight_decay=0.1))
    Stepper(net, OptimizerConfig())
