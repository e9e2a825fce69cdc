"""One model with a linear of every format is the float32 model of the same values: adapters, contrast, training,
merging."""

import numpy as np
import pytest

from colora_ms.adapters import inject
from colora_ms.adapters.config import LoraConfig
from colora_ms.errors import AdapterError, CheckpointError
from colora_ms.models.formats import (
    FORMATS,
    INT4_ZERO,
    INT4_ZERO_ORDERED,
    INT8_ZERO_ORDERED,
    WEIGHT_FORMATS,
    StoredWeight,
)

#: Formats whose columns have an order, which nothing is packed into by name.
ORDERED = {one.name: one for one in (INT4_ZERO_ORDERED, INT8_ZERO_ORDERED)}


def stored_as(kind, values, random):
    """Values packed; for an ordered format in columns of any order."""
    if kind not in ORDERED:
        return FORMATS[kind].pack(values)
    order = random.permutation(values.shape[1]).astype(np.int32)
    packed = FORMATS[kind.removesuffix("_ordered")].pack(values[:, order])
    return StoredWeight(ORDERED[kind], packed.shape, packed.data, packed.scale, order=order)


@pytest.fixture(scope="module")
def models(mindspore):
    """(config, {name: StoredWeight}, {name: the same values in float32}): the linears take the formats in turn."""
    from colora_ms.models.config import DecoderConfig

    config = DecoderConfig(model_type="llama", vocab_size=97, hidden_size=256, intermediate_size=512,
                           num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                           max_position_embeddings=128, eos_token_ids=(2,), tie_word_embeddings=True)
    random, stored, kinds = np.random.default_rng(7), {}, [*WEIGHT_FORMATS, *ORDERED]
    for name, shape in config.parameter_shapes().items():
        values = (random.standard_normal(shape) * 0.1 + ("norm" in name)).astype(np.float32)
        if name == "model.embed_tokens.weight":
            stored[name] = FORMATS["q6_k"].pack(values)
        elif "_proj" in name:
            stored[name] = stored_as(kinds[len([one for one in stored if "_proj" in one]) % len(kinds)], values, random)
        else:
            stored[name] = FORMATS["float32"].pack(values)
    return config, stored, {name: one.values() for name, one in stored.items()}


def decoder(config, weights):
    from colora_ms.models.decoder import Decoder

    return Decoder(config, weights)


def adapted(net, **more):
    handle = inject(net, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
                                    init_lora_weights=False, **more))
    random = np.random.default_rng(3)
    import mindspore as ms
    for parameter in sorted(net.get_parameters(), key=lambda one: one.name):
        if "lora_" in parameter.name:
            parameter.set_data(ms.Tensor((random.standard_normal(parameter.shape) * 0.05).astype(np.float32)))
    return handle


class Numbers:
    """A tokenizer whose texts are ids with blanks between them."""

    eos_token_id, chat_template = 2, None

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def test_every_format_is_in_the_model_and_stays(models):
    config, stored, _ = models
    net = decoder(config, stored)
    cells = {name: cell for name, cell in net.cells_and_names() if name.endswith("_proj")}
    assert {cell.format.name for cell in cells.values()} == {*WEIGHT_FORMATS, *ORDERED}
    assert net.model.embed_tokens.format.name == net.lm_head.format.name == "q6_k"
    for name, cell in cells.items():
        assert np.array_equal(cell.base_values()["weight"], stored[f"{name}.weight"].values())


def test_training_is_that_of_the_float32_model(models, mindspore):
    """Loss and gradients of the adapter, with the fused loss on a packed head."""
    from colora_ms.training.step import CausalLossCell

    ms = mindspore
    config, stored, values = models
    random = np.random.default_rng(5)
    ids = random.integers(3, 97, (2, 12)).astype(np.int32)
    labels = np.where(np.arange(12) > 2, np.roll(ids, -1, 1), -100).astype(np.int32)
    found = []
    for weights in (stored, values):
        net = decoder(config, weights)
        adapted(net)
        cell = CausalLossCell(net)
        assert cell.fused
        trained = [one for one in net.get_parameters() if one.requires_grad]
        arguments = [ms.Tensor(one) for one in (ids, labels, np.array([12, 9], np.int32), np.zeros(2, np.int32))]
        (loss, count), gradients = ms.value_and_grad(cell, None, trained, has_aux=True)(*arguments)
        found.append((loss.asnumpy(), {one.name: gradient.asnumpy() for one, gradient in zip(trained, gradients)}))
        assert count.asnumpy() == (labels >= 0).sum()
    (loss, gradients), (want, others) = found
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert len(gradients) == 30
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, others[name], rtol=0, atol=2e-5 * np.abs(others[name]).max() + 1e-8)


def test_answers_with_adapter_and_contrast_are_those_of_the_float32_model(models):
    from colora_ms.decoding import Contrast, Generator

    config, stored, values = models
    answers = []
    for weights in (stored, values):
        net = decoder(config, weights)
        generator = Generator(net, Numbers(), adapted(net))
        answers.append([generator.generate([[5, 9, 40]], max_new_tokens=10, ignore_eos=True, **options)[0].tokens
                        for options in ({}, {"adapter": "default"},
                                        {"adapter": "default", "contrast": Contrast(0.3, 0.7)})])
    assert answers[0] == answers[1] and len(answers[0][2]) == 10


def test_a_head_whose_columns_have_an_order(models):
    """Its contrast at few tokens and the loss through its logits are those of the float32 head; no table is so."""
    import dataclasses

    import mindspore as ms

    from colora_ms.decoding import Contrast, Generator
    from colora_ms.training.step import CausalLossCell

    config, stored, values = models
    config = dataclasses.replace(config, tie_word_embeddings=False)
    random = np.random.default_rng(9)
    matrix = (random.standard_normal((97, 256)) * 0.1).astype(np.float32)
    head = stored_as("int4_zero_ordered", matrix, random)
    ids = ms.Tensor(np.random.default_rng(5).integers(3, 97, (2, 9)).astype(np.int32))
    answers, losses = [], []
    for weights in ({**values, "lm_head.weight": head}, {**values, "lm_head.weight": head.values()}):
        net = decoder(config, weights)
        cell = CausalLossCell(net)
        losses.append(cell(ids, ids, ms.Tensor([9, 9], ms.int32), ms.Tensor([-1, -1], ms.int32))[0].asnumpy())
        generator = Generator(net, Numbers(), adapted(net))
        answers.append([generator.generate([[5, 9, 40]], max_new_tokens=10, ignore_eos=True, adapter="default",
                                           contrast=Contrast(alpha, 0.7))[0].tokens for alpha in (0.3, 0.9)])
    assert answers[0] == answers[1] and len(answers[0][1]) == 10
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    with pytest.raises(CheckpointError, match="model.embed_tokens.*int4_zero_ordered.*only linears"):
        decoder(config, {**values, "lm_head.weight": head, "model.embed_tokens.weight": head})


def test_a_merge_is_refused_by_name_and_made_in_a_float_copy(models):
    config, stored, values = models
    net = decoder(config, stored)
    with pytest.raises(AdapterError, match="stored as.*float32"):
        adapted(net).merge("default")
    copy = decoder(config, values)
    adapted(copy).merge("default")
    name = "model.layers.0.mlp.down_proj"
    cell = dict(copy.cells_and_names())[name]
    merged = cell.base_layer.weight.asnumpy() if hasattr(cell, "base_layer") else cell.weight.asnumpy()
    change = merged - values[f"{name}.weight"]
    assert np.abs(change).max() > 0


def test_rows_of_interleaved_heads_are_moved_whole():
    """llama.cpp's order of q and k rows is undone without unpacking."""
    from colora_ms.models.gguf_names import interleave_rows, restore_rows

    random = np.random.default_rng(2)
    values = random.standard_normal((48, 256)).astype(np.float32)
    for name in ("q4_k", "q6_k", "q8_0", "q5_0"):
        packed = FORMATS[name].pack(values)
        moved = StoredWeight(packed.format, packed.shape, restore_rows(interleave_rows(packed.data, 3), 3))
        assert np.array_equal(moved.data, packed.data)
        turned = StoredWeight(packed.format, packed.shape, interleave_rows(packed.data, 3)).values()
        assert np.array_equal(turned, interleave_rows(packed.values(), 3))


def test_zero_points_are_kept_by_more_rows():
    stored = INT4_ZERO.pack(np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32))
    more = stored.and_rows(np.ones((2, 64), np.float32))
    assert more.scale.shape == (6, 2, 2) and np.allclose(more.values()[4:], 1, atol=1e-6)
