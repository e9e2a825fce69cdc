"""Adapters on Cell trees: the decoder's and other models'; slots, merging, compilations, training, refusals."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.adapters import LoraConfig, adapters_of, inject, load_adapter
from colora_ms.adapters.matching import value_shapes
from colora_ms.errors import AdapterError
from colora_ms.kernels import ABSENT
from model_gradients import gradients

RANDOM = {"init_lora_weights": False}
BIASED = {"attention_bias": True, "attention_out_bias": True}
IDS = np.array([[3, 14, 15, 92, 65, 35], [8, 9, 7, 9, 3, 2], [27, 18, 28, 18, 28, 4], [1, 41, 42, 13, 56, 2]], np.int32)


def run(net, slots, ids=IDS):
    """Logits of the rows of ids; slots: a Tensor or a list."""
    from mindspore import Tensor

    slots = Tensor(np.array(slots, np.int32)) if isinstance(slots, list) else slots
    return net(Tensor(ids), Tensor(np.full(len(ids), ids.shape[1], np.int32)), slots).asnumpy()


@pytest.fixture(scope="module")
def bank(mindspore, tiny_decoder):
    """(net, its logits before injection, handle) with adapters "a" (all linears), "b" (q, v) and a free slot."""
    net = tiny_decoder()
    base = run(net, [-1] * 4)
    handle = inject(net, LoraConfig(r=4, target_modules="all-linear", **RANDOM), "a", slots=3, max_rank=6)
    handle.add_adapter("b", LoraConfig(r=6, lora_alpha=20, target_modules=["q_proj", "v_proj"], **RANDOM))
    return net, base, handle


# -- rows and slots ---------------------------------------------------------------------------------------------------

def test_base_rows_are_bit_identical_to_the_model_without_adapters(bank):
    net, base, handle = bank
    assert np.array_equal(run(net, handle.slots(4, "__base__")), base)
    mixed = run(net, handle.slots(4, ["a", "__base__", "b", None]))
    assert np.array_equal(mixed[[1, 3]], base[[1, 3]])
    assert np.abs(mixed[0] - base[0]).max() > 1e-3 and np.abs(mixed[2] - base[2]).max() > 1e-3


def test_mixed_batch_equals_each_adapter_alone(bank):
    net, _, handle = bank
    names = ["b", "a", "__base__", "a"]
    mixed = run(net, handle.slots(4, names))
    for row, name in enumerate(names):
        assert np.array_equal(mixed[row], run(net, handle.slots(4, name))[row])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.permutations(range(4)), names=st.lists(st.sampled_from(["a", "b", "__base__"]), min_size=4, max_size=4))
def test_permuting_rows_permutes_results(bank, rows, names):
    net, _, handle = bank
    straight = run(net, handle.slots(4, names))
    permuted = run(net, handle.slots(4, [names[i] for i in rows]), IDS[list(rows)])
    assert np.array_equal(permuted, straight[list(rows)])


def test_low_rank_product_is_what_the_formula_says(bank):
    """One linear against W x + scaling * up (down x) in float64."""
    from mindspore import Tensor

    net, _, handle = bank
    cell = handle.sites["model.layers.1.self_attn.q_proj", "lora"]
    x = np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float32)
    got = cell(Tensor(x), (Tensor(np.array([1, -1, 0], np.int32)), ABSENT)).asnumpy()
    weight = cell.base_layer.weight.asnumpy().astype(np.float64)
    for row, (name, r, scaling) in enumerate([("b", 6, 20 / 6), (None, 0, 0), ("a", 4, 2)]):
        expected = x[row] @ weight.T
        if name:
            values = cell.read(handle.slot(name), {"down": (r, 32), "up": (32, r)})
            expected = expected + scaling * (x[row] @ values["down"].T.astype(np.float64)) @ values["up"].T
        assert np.abs(got[row] - expected).max() < 1e-4


def test_nan_in_another_slot_does_not_leak(bank):
    net, base, handle = bank
    before = run(net, handle.slots(4, ["a", "__base__", "b", "a"]))
    handle.add_adapter("broken", LoraConfig(r=6, target_modules="all-linear", **RANDOM))
    slot = handle.slot("broken")
    for cell in handle.sites.values():
        cell.write(slot, {"down": np.full((6, cell.in_features), np.nan, np.float32),
                          "up": np.full((cell.out_features, 6), np.nan, np.float32)}, 1.0)
    assert np.array_equal(run(net, handle.slots(4, ["a", "__base__", "b", "a"])), before)
    assert np.isnan(run(net, handle.slots(4, "broken"))).any()
    handle.delete_adapter("broken")
    assert np.array_equal(run(net, [slot] * 4), base), "a freed slot must add nothing"


def test_changing_adapters_compiles_nothing(bank, tmp_path):
    net, _, handle = bank
    run(net, handle.slots(4))
    graphs = len(net.compile_cache)
    handle.set_adapter("b")
    run(net, handle.slots(4))
    with handle.disable_adapter():
        run(net, handle.slots(4))
    run(net, handle.slots(4, ["a", "b", None, "a"]))
    handle.add_adapter("c", LoraConfig(r=2, target_modules=["up_proj"], **RANDOM))
    run(net, handle.slots(4, "c"))
    handle.save(tmp_path / "c", "c")
    handle.delete_adapter("c")
    handle.load(tmp_path / "c", "d")
    run(net, handle.slots(4, "d"))
    handle.merge("d")
    run(net, handle.slots(4))
    handle.unmerge()
    run(net, handle.slots(4))
    handle.delete_adapter("d")
    handle.set_adapter("a")
    assert len(net.compile_cache) == graphs


def test_one_graph_is_traced_once(mindspore, tiny_decoder):
    """Counts the runs of a Python function that only the compiler calls."""
    from mindspore import nn
    from mindspore.ops import constexpr

    traced = []

    @constexpr
    def trace():
        traced.append(1)
        return 0

    class Counted(nn.Cell):
        def __init__(self, inner):
            super().__init__(auto_prefix=False)
            self.inner = inner

        def construct(self, ids, lengths, slots):
            return self.inner(ids, lengths, slots) + trace()

    net = tiny_decoder()
    counted = Counted(net)
    handle = inject(net, LoraConfig(r=2, target_modules=["q_proj"], **RANDOM), slots=2)
    run(counted, handle.slots(4))
    first = len(traced)
    assert first > 0
    handle.add_adapter("other", LoraConfig(r=1, target_modules=["q_proj"], **RANDOM))
    for name in ("other", "default", None):
        run(counted, handle.slots(4, [name] * 4))
    assert len(traced) == first
    handle.unload()
    run(counted, [-1] * 4)
    assert len(traced) > first, "the counter must see a compilation"


def test_slots(bank):
    _, _, handle = bank
    handle.set_adapter("a")
    assert handle.slots(3).asnumpy().tolist() == [0, 0, 0]
    assert handle.slots(2, "b").asnumpy().tolist() == [1, 1]
    assert handle.slots(3, ["b", None, "__base__"]).asnumpy().tolist() == [1, -1, -1]
    with handle.disable_adapter():
        assert handle.active is None
        assert handle.slots(2).asnumpy().tolist() == [-1, -1]
    assert handle.active == "a" and handle.names == ("a", "b") and handle.free_slots == 1
    with pytest.raises(AdapterError, match="there is no adapter 'c'; there are: a, b"):
        handle.slots(2, "c")
    with pytest.raises(AdapterError, match="3 adapter names for 2 rows"):
        handle.slots(2, ["a", "a", "a"])


# -- injection --------------------------------------------------------------------------------------------------------

def test_parameters_keep_their_names_and_are_frozen(mindspore, tiny_decoder):
    net = tiny_decoder(tie_word_embeddings=True)
    before = {id(p): p.name for p in net.get_parameters()}
    handle = inject(net, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["norm"]))
    old = [p for p in net.get_parameters() if id(p) in before]
    new = [p for p in net.get_parameters() if id(p) not in before]
    assert {id(p): p.name for p in old} == before and not any(p.requires_grad for p in old)
    assert "model.layers.1.mlp.up_proj.lora_A" in {p.name for p in new}
    assert len({p.name for p in net.get_parameters()}) == len(old) + len(new)
    trainable = handle.trainable_params()
    assert {id(p) for p in trainable} == {id(p) for p in net.trainable_params()}
    assert len(trainable) == 2 * 7 * 2 + 5
    handle.unload()
    assert {id(p): p.name for p in net.get_parameters()} == before and adapters_of(net) is None


def test_new_adapter_changes_nothing_at_first(mindspore, tiny_decoder):
    net = tiny_decoder()
    base = run(net, [-1] * 4)
    handle = inject(net, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    assert np.abs(run(net, handle.slots(4)) - base).max() < 1e-5


def test_initial_values(mindspore, tiny_decoder):
    for start, spread in ((True, 1 / np.sqrt(3 * 32)), ("gaussian", 1 / 16)):
        handle = inject(tiny_decoder(), LoraConfig(r=16, target_modules=["gate_proj"], init_lora_weights=start), seed=1)
        down, up = (p.asnumpy() for p in handle.trainable_params()[:2])
        assert abs(down.std() - spread) < 0.15 * spread and not up.any()
        again = inject(tiny_decoder(), LoraConfig(r=16, target_modules=["up_proj", "gate_proj"],
                                                  init_lora_weights=start), seed=1)
        assert np.array_equal(again.trainable_params()[0].asnumpy(), down), "a module's values depend on others"
        other = inject(tiny_decoder(), LoraConfig(r=16, target_modules=["gate_proj"], init_lora_weights=start), seed=2)
        assert not np.array_equal(other.trainable_params()[0].asnumpy(), down)


def test_refused_injection_leaves_the_model_alone(mindspore, tiny_decoder):
    net = tiny_decoder()
    before = [(p.name, p.requires_grad) for p in net.get_parameters()]
    cells = [type(cell) for _, cell in net.cells_and_names()]
    for arguments, words in [
            (dict(config=LoraConfig(target_modules=["nope"])), "matches no module"),
            (dict(config=LoraConfig(target_modules=["q_proj"]), adapter_name="../x"), "cannot be an adapter's name"),
            (dict(config=LoraConfig(target_modules=["q_proj"]), slots=0), "slots is 0"),
            (dict(config=LoraConfig(target_modules=["q_proj"], r=8), max_rank=4), "max_rank is 4.*rank 8"),
            (dict(config=LoraConfig(target_modules=["q_proj"], init_lora_weights="eva")), "not implemented for a new"),
            (dict(), "needs a config")]:
        with pytest.raises(AdapterError, match=words):
            inject(net, **arguments)
        assert [(p.name, p.requires_grad) for p in net.get_parameters()] == before
        assert [type(cell) for _, cell in net.cells_and_names()] == cells
    inject(net, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="has adapters already"):
        inject(net, LoraConfig(target_modules=["q_proj"]))


def test_adapters_that_do_not_fit_the_bank(bank, tmp_path):
    _, _, handle = bank
    for config, words in [
            (LoraConfig(r=7, target_modules=["q_proj"]), "has room for rank 6, the adapter has rank 7"),
            (LoraConfig(target_modules=["lm_head"], r=1), "lm_head was not prepared for adapters.*reserve"),
            (LoraConfig(target_modules=["q_proj"], r=1, modules_to_save=["norm"]), "not prepared to be saved whole"),
            (LoraConfig(target_modules=["q_proj"], r=1, lora_dropout=0.5), "lora_dropout is 0.5")]:
        with pytest.raises(AdapterError, match=words):
            handle.add_adapter("new", config)
    with pytest.raises(AdapterError, match="there is an adapter 'a' already"):
        handle.add_adapter("a", LoraConfig(r=1, target_modules=["q_proj"]))
    handle.add_adapter("c", LoraConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="no slot is free: the model has 3 and holds a, b, c"):
        handle.add_adapter("d", LoraConfig(r=1, target_modules=["q_proj"]))
    handle.delete_adapter("c")
    assert handle.names == ("a", "b")


def test_a_compiled_enclosing_cell_sees_the_injection(mindspore, tiny_decoder):
    from mindspore import Tensor, nn

    class Outer(nn.Cell):
        def __init__(self, inner):
            super().__init__(auto_prefix=False)
            self.inner = inner

        def construct(self, ids, lengths, slots):
            return self.inner(ids, lengths, slots) + 1

    net = tiny_decoder()
    outer = Outer(net)
    before = run(outer, [-1] * 4)
    handle = inject(net, LoraConfig(r=4, target_modules="all-linear", **RANDOM))
    assert np.abs(run(outer, handle.slots(4)) - before).max() > 1e-3
    handle.unload()
    assert np.array_equal(run(outer, Tensor(np.full(4, -1, np.int32))), before)


# -- embeddings, saved modules, biases ---------------------------------------------------------------------------------

@pytest.mark.parametrize("values, changes", [
    ({"target_modules": ["embed_tokens", "lm_head"]}, {}),
    ({"target_modules": ["embed_tokens", "lm_head"]}, {"tie_word_embeddings": True}),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, {}),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}),
    ({"target_modules": ["q_proj", "up_proj"], "bias": "all"}, {**BIASED, "mlp_bias": True}),
])
def test_everything_that_an_adapter_can_hold_is_chosen_by_row(mindspore, tiny_decoder, tmp_path, values, changes):
    """Two adapters and the base in one batch equal each alone; saved and loaded again they give the same logits."""
    net = tiny_decoder(**changes)
    base = run(net, [-1] * 4)
    config = LoraConfig(r=2, **RANDOM, **values)
    handle = inject(net, config, "a", slots=2)
    handle.add_adapter("b", LoraConfig(r=2, **RANDOM, **values))
    random = np.random.default_rng(3)
    for name in "ab":
        for place, shapes in value_shapes(handle.matched(name), handle.modules).items():
            cell = handle.sites[place]
            new = {key: value + random.standard_normal(value.shape).astype(np.float32) * 0.2
                   for key, value in cell.read(handle.slot(name), shapes).items()}
            cell.write(handle.slot(name), new, 4.0)  # lora_alpha / r
    names = ["a", "b", "__base__", "b"]
    mixed = run(net, handle.slots(4, names))
    alone = {name: run(net, handle.slots(4, name)) for name in set(names)}
    assert np.array_equal(alone["__base__"], base)
    assert np.abs(alone["a"] - alone["b"]).max() > 1e-2 and np.abs(alone["a"] - base).max() > 1e-2
    for row, name in enumerate(names):
        assert np.array_equal(mixed[row], alone[name][row])
    handle.save(tmp_path / "b", "b")
    again = load_adapter(tiny_decoder(**changes), tmp_path / "b")
    assert np.abs(run(again.net, again.slots(4)) - alone["b"]).max() < 1e-4
    handle.delete_adapter("b")
    assert np.array_equal(run(net, [1] * 4), base), "a freed slot must give the base model"


# -- merging ----------------------------------------------------------------------------------------------------------

def weights_of(net):
    """Bytes of the base's parameters."""
    return {p.name: p.asnumpy().tobytes() for p in net.get_parameters() if "lora" not in p.name
            and "saved" not in p.name}


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("values", [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"], "bias": "all"},
])
def test_merge_and_exact_unmerge(mindspore, tiny_decoder, weight_format, values):
    from colora_ms.models.decoder import Decoder

    config = tiny_decoder(**BIASED).config
    weights = {name: p.asnumpy() for name, p in tiny_decoder(**BIASED).parameters_dict().items()}
    net = Decoder(config, weights, weight_format=weight_format)
    kept = weights_of(net)
    handle = inject(net, LoraConfig(r=4, **RANDOM, **values), slots=2)
    unmerged = run(net, handle.slots(4))
    for _ in range(3):
        handle.merge(safe_merge=True)
        assert handle.slots(2).asnumpy().tolist() == [-1, -1]
        merged = run(net, handle.slots(4))
        scale = 1e-4 if weight_format == "float32" else 0.25
        assert np.abs(merged - unmerged).max() < scale * np.abs(unmerged).max()
        assert weights_of(net) != kept
        handle.unmerge()
        assert weights_of(net) == kept
        assert np.array_equal(run(net, handle.slots(4)), unmerged)


def test_merged_weight_is_rounded_once_from_float32(mindspore, tiny_decoder):
    net = tiny_decoder()
    handle = inject(net, LoraConfig(r=4, lora_alpha=3, target_modules=["o_proj"], **RANDOM))
    cell = handle.sites["model.layers.0.self_attn.o_proj", "lora"]
    values = cell.read(0, {"down": (4, 32), "up": (32, 4)})
    before = cell.base_layer.weight.asnumpy().copy()
    handle.merge()
    exact = before + 0.75 * values["up"].astype(np.float64) @ values["down"]
    assert np.abs(cell.base_layer.weight.asnumpy() - exact).max() < 1e-6


def test_merged_model_refuses_what_would_be_wrong(bank):
    net, base, handle = bank
    handle.merge("b")
    for action in (lambda: handle.set_adapter("a"), lambda: handle.disable_adapter(), lambda: handle.merge("a"),
                   lambda: handle.slots(2, ["a", "b"]), lambda: handle.slots(2, [None, "b"]),
                   lambda: handle.add_adapter("c", LoraConfig(r=1, target_modules=["q_proj"])),
                   lambda: handle.delete_adapter("b"), lambda: handle.trainable_params("a")):
        with pytest.raises(AdapterError, match="'b' is merged into the base weights; call unmerge"):
            action()
    assert handle.merged == "b"
    raw = run(net, [handle.slot("b")] * 4)
    assert np.array_equal(raw, run(net, handle.slots(4))), "the adapter must not be added twice"
    handle.unmerge()
    with pytest.raises(AdapterError, match="no adapter is merged"):
        handle.unmerge()
    assert np.array_equal(run(net, handle.slots(4, "__base__")), base)
    handle.set_adapter("a")


def test_merge_that_is_not_finite_is_undone(bank):
    net, base, handle = bank
    handle.add_adapter("broken", LoraConfig(r=1, target_modules=["up_proj"], **RANDOM))
    cell = handle.sites["model.layers.1.mlp.up_proj", "lora"]
    cell.write(handle.slot("broken"), {"down": np.full((1, 32), np.inf, np.float32),
                                       "up": np.ones((48, 1), np.float32)}, 1.0)
    with pytest.raises(AdapterError, match="not finite in 1 modules, 'model.layers.1.mlp.up_proj' first"):
        handle.merge("broken", safe_merge=True)
    assert handle.merged is None and np.array_equal(run(net, handle.slots(4, "__base__")), base)
    handle.delete_adapter("broken")
    handle.set_adapter("a")


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_integer_weights_take_adapters_but_no_merging(mindspore, tiny_decoder, weight_format):
    from colora_ms.models.decoder import Decoder

    weights = {name: p.asnumpy() for name, p in tiny_decoder().parameters_dict().items()}
    net = Decoder(tiny_decoder().config, weights, weight_format=weight_format)
    base = run(net, [-1] * 4)
    handle = inject(net, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"],
                                    **RANDOM))
    adapted = run(net, handle.slots(4))
    assert np.isfinite(adapted).all() and np.abs(adapted - base).max() > 1e-3
    assert np.array_equal(run(net, handle.slots(4, "__base__")), base)
    with pytest.raises(AdapterError, match="stored as integers"):
        handle.merge()


def test_tied_weights_are_not_merged(mindspore, tiny_decoder):
    net = tiny_decoder(tie_word_embeddings=True)
    handle = inject(net, LoraConfig(r=2, target_modules=["embed_tokens"], **RANDOM))
    with pytest.raises(AdapterError, match="tied to another module"):
        handle.merge()


def test_unload_after_merge_leaves_the_merged_weights(mindspore, tiny_decoder):
    net = tiny_decoder()
    handle = inject(net, LoraConfig(r=4, target_modules="all-linear", **RANDOM))
    expected = run(net, handle.slots(4))
    handle.merge()
    handle.unload()
    assert np.abs(run(net, [-1] * 4) - expected).max() < 1e-3 * np.abs(expected).max()


# -- training ---------------------------------------------------------------------------------------------------------

def noise_of(net):
    return np.random.default_rng(0).standard_normal((4, 6, net.config.vocab_size)).astype(np.float32)


@pytest.mark.parametrize("values", [
    {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"], "bias": "lora_only"},
])
def test_gradients_are_those_of_finite_differences(mindspore, tiny_decoder, values):
    net = tiny_decoder(**BIASED)
    handle = inject(net, LoraConfig(r=2, **RANDOM, **values))
    slots = handle.slots(4)
    noise = noise_of(net)
    _, found = gradients(net, handle, IDS, noise, slots)
    random = np.random.default_rng(1)
    parameters = handle.trainable_params()
    assert len(parameters) == len(found)
    for parameter, gradient in list(zip(parameters, found.values()))[::3]:
        start = parameter.asnumpy().copy()
        direction = random.standard_normal(start.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        step, ends = 1e-2, []
        for sign in (1, -1):
            parameter.set_data(mindspore.Tensor(start + np.float32(sign * step) * direction))
            ends.append((run(net, slots).astype(np.float64) * noise).sum())
        parameter.set_data(mindspore.Tensor(start))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs((gradient * direction).sum() - slope) < 2e-2 * max(abs(slope), np.linalg.norm(gradient) * 0.1,
                                                                      1e-3), \
            parameter.name


def test_padded_ranks_and_other_slots_get_no_gradient(mindspore, tiny_decoder):
    net = tiny_decoder()
    handle = inject(net, LoraConfig(r=2, target_modules=["q_proj"], **RANDOM), slots=2, max_rank=5)
    handle.add_adapter("other", LoraConfig(r=5, target_modules=["q_proj"], **RANDOM))
    _, found = gradients(net, handle, IDS, noise_of(net), handle.slots(4, "default"))
    for gradient, axis in zip(found.values(), [0, 1] * 2):
        own = np.moveaxis(gradient[0], axis, 0)
        assert own[:2].any() and not own[2:].any() and not gradient[1].any()


def test_dropout_acts_in_training_only(mindspore, tiny_decoder):
    net = tiny_decoder()
    handle = inject(net, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, **RANDOM))
    net.set_train(False)
    calm = run(net, handle.slots(4))
    assert np.array_equal(run(net, handle.slots(4)), calm)
    net.set_train(True)
    first, second = run(net, handle.slots(4)), run(net, handle.slots(4))
    base = run(net, handle.slots(4, "__base__"))
    net.set_train(False)
    assert not np.array_equal(first, second) and np.abs(first - calm).max() > 1e-3
    assert np.allclose(base, run(net, handle.slots(4, "__base__")), atol=1e-5), "base rows must not be dropped"


def test_adapters_for_inference_have_nothing_to_train(mindspore, tiny_decoder, tmp_path):
    inject(tiny_decoder(), LoraConfig(r=2, target_modules=["q_proj"])).save(tmp_path / "x")
    net = tiny_decoder()
    handle = load_adapter(net, tmp_path / "x")
    assert net.trainable_params() == []
    with pytest.raises(AdapterError, match="trainable=True"):
        handle.trainable_params()
    assert len(load_adapter(tiny_decoder(), tmp_path / "x", trainable=True).trainable_params()) == 4
