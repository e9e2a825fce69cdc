"""``trainable_token_indices`` and ``ensure_weight_tying``: against peft on torch; rows, slots, merging, gradients,
files."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from colora_ms.adapters import LoraConfig, adapters_of, digest, inject, load_adapter, load_adapters
from colora_ms.adapters.inject import modules_of
from colora_ms.adapters.matching import match
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from colora_ms.errors import AdapterError, AdapterWarning
from colora_ms.kernels import ABSENT
from model_gradients import gradients

GOLDENS = {"tokens": "llama", "tokens_tied": "llama_linear", "tokens_both": "llama",
           "tokens_tied_apart": "llama_linear",
           "tokens_tied_head": "qwen2", "tokens_tied_ensured": "qwen2", "save_tied": "llama_linear",
           "save_tied_embedding": "qwen2"}
#: peft merges these, too, and gets another model: one weight cannot hold two sets of rows.
NOT_MERGEABLE = ("tokens_tied_apart", "tokens_tied_head")
TOLERANCE = 2e-4
ROWS = [3, 90, 7]
RANDOM = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


def build(goldens, base):
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(goldens / "tiny" / base)
    return Decoder(checkpoint.config, checkpoint.tensors)


def run(net, slots, ids):
    from mindspore import Tensor

    ids = np.asarray(ids, np.int32)
    slots = Tensor(np.array(slots, np.int32)) if isinstance(slots, list) else slots
    return net(Tensor(ids), Tensor(np.full(len(ids), ids.shape[1], np.int32)), slots).asnumpy()


@pytest.fixture(params=GOLDENS)
def golden(request, mindspore, goldens):
    return request.param, build(goldens, GOLDENS[request.param]), goldens / "peft" / request.param


@pytest.mark.parametrize("trainable", [False, True])
def test_logits_equal_pefts_and_base_rows_are_untouched(golden, trainable):
    name, net, folder = golden
    stored = np.load(folder / "logits.npz")
    ids = stored["ids"]
    plain = run(net, [-1, -1], ids)
    handle = load_adapter(net, folder, trainable=trainable)
    ours = run(net, handle.slots(2), ids)
    assert np.abs(ours[:, stored["positions"]] - stored["logits"]).max() < TOLERANCE
    assert (ours.argmax(-1) == stored["argmax"]).all()
    if not trainable:
        assert np.array_equal(run(net, handle.slots(2, "__base__"), ids), plain)
        mixed = run(net, handle.slots(2, [name, "__base__"]), ids)
        assert np.array_equal(mixed[0], ours[0]) and np.array_equal(mixed[1], plain[1])
    assert np.abs(plain[:, stored["positions"]] - stored["base"]).max() < TOLERANCE


def test_saved_again_it_has_pefts_tensors(golden, tmp_path):
    _, net, folder = golden
    handle = load_adapter(net, folder)
    handle.save(tmp_path / "again")
    ours, theirs = load_file(tmp_path / "again" / WEIGHTS_FILE), load_file(folder / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    values = json.loads((tmp_path / "again" / CONFIG_FILE).read_text())
    before = json.loads((folder / CONFIG_FILE).read_text())
    for name in ("trainable_token_indices", "ensure_weight_tying", "modules_to_save"):
        assert values[name] == before[name]


def test_merging_and_exact_unmerging(golden):
    name, net, folder = golden
    stored = np.load(folder / "logits.npz")
    handle = load_adapter(net, folder)
    kept = {p.name: p.asnumpy().tobytes() for p in handle.net.get_parameters()}
    if name in NOT_MERGEABLE:
        with pytest.raises(AdapterError, match="tied to another module"):
            handle.merge()
        assert {p.name: p.asnumpy().tobytes() for p in handle.net.get_parameters()} == kept
        return
    for _ in range(2):
        handle.merge(safe_merge=True)
        assert np.abs(run(net, handle.slots(2), stored["ids"])[:, stored["positions"]]
                      - stored["logits"]).max() < TOLERANCE
        handle.unmerge()
        assert {p.name: p.asnumpy().tobytes() for p in handle.net.get_parameters()} == kept
    handle.merge()
    handle.unload()
    assert np.abs(run(net, [-1, -1], stored["ids"])[:, stored["positions"]] - stored["logits"]).max() < TOLERANCE


# -- several slots ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def mixed(request, mindspore, tiny_decoder):
    """(net, its logits before, handle): token rows of different ids and numbers, a saved head, plain LoRA, a free
    slot."""
    net = tiny_decoder(tie_word_embeddings=request.param)
    ids = np.random.default_rng(0).integers(0, 12, (4, 6))
    base = run(net, [-1] * 4, ids)
    tables = {"a": {"trainable_token_indices": [3, 11, 7]}, "b": {"trainable_token_indices": {"embed_tokens": [5]}},
              "c": {"trainable_token_indices": {"lm_head": [3, 1]}}, "d": {"modules_to_save": ["lm_head"]}, "e": {}}
    configs = {name: LoraConfig(**RANDOM, **table) for name, table in tables.items()}
    reserve = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    both = LoraConfig(r=2, target_modules=["q_proj"],
                      trainable_token_indices={"embed_tokens": [0, 1, 2], "lm_head": [0, 1, 3]})
    handle = inject(net, both, "both", slots=7, max_rank=2, trainable=False, reserve=reserve)
    handle.delete_adapter("both")
    random = np.random.default_rng(1)
    for name, config in configs.items():
        handle.add_adapter(name, config)
        for place in [place for place in handle.sites if place in handle.values(name)]:
            own = handle.values(name)[place]
            if place[1] != "lora":
                source = handle.matched(name).ties.get(place[0])
                noise = np.random.default_rng(len(name)) if source else random
                new = {field: value + noise.standard_normal(value.shape).astype(np.float32)
                       for field, value in own.items()}
                if source:
                    new = handle.values(name)[source, place[1]]
                if place[1] == "tokens":
                    new["ids"] = handle.matched(name).tokens[place[0]]
                handle.sites[place].write(handle.slot(name), new, 1.0)
    return net, base, handle, ids


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(["a", "b", "c", "d", "e", "__base__"]), min_size=4, max_size=4),
       order=st.permutations(range(4)))
def test_a_batch_mixes_adapters(mixed, names, order):
    net, base, handle, ids = mixed
    got = run(net, handle.slots(4, names), ids)
    for row, name in enumerate(names):
        alone = run(net, handle.slots(4, name), ids)
        assert np.array_equal(got[row], alone[row])
        if name == "__base__":
            assert np.array_equal(got[row], base[row])
    order = list(order)
    assert np.array_equal(run(net, handle.slots(4, [names[i] for i in order]), ids[order]), got[order])


def test_each_slot_sees_its_own_rows(mixed):
    """One step of an adapter with rows against the base's own weights with these rows put in, in float64."""
    net, base, handle, ids = mixed
    for name in "abc":
        weights = {"model.embed_tokens": net.model.embed_tokens, "lm_head": net.lm_head}
        tables = {path: handle.cells[path].weight.asnumpy().astype(np.float64) for path in weights}
        for path, own in handle.matched(name).tokens.items():
            tables[path][list(own)] = handle.values(name)[path, "tokens"]["rows"]
        from mindspore import Tensor
        slots = handle.slots(4, name)
        seen = net.model.embed_tokens(Tensor(ids.astype(np.int32)), (slots, ABSENT)).asnumpy()
        assert np.array_equal(seen, tables["model.embed_tokens"][ids].astype(np.float32))
        hidden = np.random.default_rng(3).standard_normal((4, 6, 32)).astype(np.float32)
        got = net.lm_head(Tensor(hidden), (slots, ABSENT)).asnumpy()
        assert np.abs(got - hidden @ tables["lm_head"].T).max() < 1e-4
        one = net.lm_head(Tensor(hidden[:, 0]), (slots, ABSENT)).asnumpy()
        assert np.abs(one - got[:, 0]).max() < 1e-5


def test_a_freed_slot_gives_the_base_and_foreign_values_do_not_leak(mixed):
    net, base, handle, ids = mixed
    handle.add_adapter("broken", LoraConfig(**RANDOM, trainable_token_indices={"embed_tokens": [3], "lm_head": [3]}))
    slot = handle.slot("broken")
    before = run(net, handle.slots(4, ["a", "c", "__base__", "d"]), ids)
    for path in ("model.embed_tokens", "lm_head"):
        handle.sites[path, "tokens"].write(slot, {"rows": np.full((1, 32), np.nan, np.float32), "ids": (3,)}, 1.0)
    assert np.array_equal(run(net, handle.slots(4, ["a", "c", "__base__", "d"]), ids), before)
    assert np.isnan(run(net, handle.slots(4, "broken"), ids)).any()
    handle.delete_adapter("broken")
    assert np.array_equal(run(net, [slot] * 4, ids), base)


def test_changing_rows_compiles_nothing(mixed, tmp_path):
    net, _, handle, ids = mixed
    run(net, handle.slots(4, "a"), ids)
    graphs = len(net.compile_cache)
    handle.save(tmp_path / "b", "b")
    handle.load(tmp_path / "b", "again")
    assert np.array_equal(run(net, handle.slots(4, "again"), ids), run(net, handle.slots(4, "b"), ids))
    handle.delete_adapter("again")
    assert len(net.compile_cache) == graphs


def test_several_folders_in_one_model(mindspore, goldens):
    folders = {name: goldens / "peft" / name for name in ("tokens", "tokens_both", "qv_r8", "save_lm_head")}
    handle = load_adapters(build(goldens, "llama"), folders)
    stored = {name: np.load(folder / "logits.npz") for name, folder in folders.items()}
    ids = np.concatenate([one["ids"][:1] for one in stored.values()])
    ours = run(handle.net, handle.slots(4, list(folders)), ids)
    for row, one in zip(ours, stored.values()):
        assert np.abs(row[one["positions"]] - one["logits"][0]).max() < TOLERANCE


def test_tied_and_untied_copies_in_one_model(mindspore, goldens, tmp_path):
    """For answers each slot has its own copies; trained together they are refused."""
    inject(build(goldens, "llama_linear"), LoraConfig(**RANDOM, modules_to_save=["lm_head"])).save(tmp_path / "own")
    folders = {"tied": goldens / "peft" / "save_tied", "rows": goldens / "peft" / "tokens_tied",
               "own": tmp_path / "own"}
    handle = load_adapters(build(goldens, "llama_linear"), folders)
    for name in ("tied", "rows"):
        stored = np.load(folders[name] / "logits.npz")
        ours = run(handle.net, handle.slots(2, name), stored["ids"])
        assert np.abs(ours[:, stored["positions"]] - stored["logits"]).max() < TOLERANCE
    net = build(goldens, "llama_linear")
    with pytest.raises(AdapterError, match="lm_head is tied in some of these adapters and not in others"):
        load_adapters(net, folders, trainable=True)
    assert adapters_of(net) is None
    handle = load_adapter(net, folders["tied"], trainable=True, slots=2)
    with pytest.raises(AdapterError, match="lm_head is not tied to another module's values in this adapter"):
        handle.load(folders["own"], "own")


# -- training ---------------------------------------------------------------------------------------------------------

TRAINED = [({"trainable_token_indices": [3, 11, 7]}, False), ({"trainable_token_indices": [3, 11, 7]}, True),
           ({"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [2, 5, 3]}}, True),
           ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, True)]


@pytest.mark.parametrize("values, is_tied", TRAINED)
def test_gradients_are_those_of_finite_differences(mindspore, tiny_decoder, values, is_tied):
    net = tiny_decoder(tie_word_embeddings=is_tied)
    ids = np.random.default_rng(0).integers(0, 12, (4, 6)).astype(np.int32)
    handle = inject(net, LoraConfig(**RANDOM, **values), slots=2, max_rank=2)
    slots = handle.slots(4)
    noise = np.random.default_rng(0).standard_normal((4, 6, net.config.vocab_size)).astype(np.float32)
    _, found = gradients(net, handle, ids, noise, slots)
    parameters = handle.trainable_params()
    assert [p.name for p in parameters if "lora" not in p.name] == [
        name for name in found if "lora" not in name] and len(parameters) == len(found)
    random = np.random.default_rng(1)
    for parameter, gradient in zip(parameters, found.values()):
        if "lora" in parameter.name:
            continue
        start = parameter.asnumpy().copy()
        direction = random.standard_normal(start.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        step, ends = 1e-2, []
        for sign in (1, -1):
            parameter.set_data(mindspore.Tensor(start + np.float32(sign * step) * direction))
            ends.append((run(net, slots, ids).astype(np.float64) * noise).sum())
        parameter.set_data(mindspore.Tensor(start))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs((gradient * direction).sum() - slope) < 2e-2 * max(abs(slope), np.linalg.norm(gradient) * 0.1,
                                                                      1e-3), \
            parameter.name
        assert gradient[0].any()
        if gradient.ndim == 3:
            assert not gradient[1].any(), "another slot's rows get no gradient"


def test_fillers_of_a_wider_slot_get_no_gradient(mindspore, tiny_decoder):
    """A slot with one id in Cells for three: its row's gradient counts once."""
    ids = np.random.default_rng(0).integers(0, 12, (4, 6)).astype(np.int32)
    noise = np.random.default_rng(0).standard_normal((4, 6, 97)).astype(np.float32)
    found = {}
    for name, wider in (("alone", []), ("wide", [1, 2])):
        net = tiny_decoder(tie_word_embeddings=True)
        first = LoraConfig(**RANDOM, trainable_token_indices=[9, *wider])
        handle = inject(net, first, "first", slots=2, max_rank=2)
        handle.add_adapter("one", LoraConfig(**RANDOM, trainable_token_indices=[3]))
        _, grads = gradients(net, handle, ids, noise, handle.slots(4, "one"))
        found[name] = next(value for key, value in grads.items() if "token_rows" in key)[1]
    assert np.abs(found["alone"][0] - found["wide"][0]).max() < 1e-3 and not found["wide"][1:].any()


def test_a_new_adapter_changes_nothing_at_first(mindspore, tiny_decoder):
    for is_tied in (False, True):
        net = tiny_decoder(tie_word_embeddings=is_tied)
        ids = np.arange(24).reshape(4, 6)
        base = run(net, [-1] * 4, ids)
        handle = inject(net, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 11, 90]))
        assert np.abs(run(net, handle.slots(4), ids) - base).max() < 1e-5
        assert handle.matched().ties == ({"lm_head": "model.embed_tokens"} if is_tied else {})


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8", "int4"])
def test_on_other_weight_formats(mindspore, tiny_decoder, weight_format):
    from colora_ms.models.decoder import Decoder

    weights = {name: p.asnumpy() for name, p in tiny_decoder().parameters_dict().items()}
    net = Decoder(tiny_decoder().config, weights, weight_format=weight_format)
    ids = np.arange(24).reshape(4, 6)
    base = run(net, [-1] * 4, ids)
    handle = inject(net, LoraConfig(**RANDOM, trainable_token_indices={"embed_tokens": [3], "lm_head": [4]}),
                    trainable=False)
    assert np.array_equal(run(net, handle.slots(4, "__base__"), ids), base)
    handle.sites["lm_head", "tokens"].write(0, {"rows": np.ones((1, 32), np.float32), "ids": (4,)}, 1.0)
    changed = run(net, handle.slots(4), ids)
    assert np.isfinite(changed).all() and np.abs(changed - base)[..., 4].max() > 0.1
    if weight_format != "bfloat16":
        with pytest.raises(AdapterError, match="stored as integers"):
            handle.merge()


def test_generation_with_rows_and_a_contrast(mindspore, goldens, word_tokenizer):
    """The decoding loop uses the rows: greedy ids equal those of the whole forward, beside a contrastive request."""
    from colora_ms.decoding import Contrast, Generator

    net = build(goldens, "llama_linear")
    handle = load_adapter(net, goldens / "peft" / "tokens_tied", "a")
    made = Generator(net, word_tokenizer, handle)
    for prompt in ([5, 90, 7, 3, 14], [60, 3], [7, 7, 90]):
        rows = made.generate([prompt, prompt, prompt], adapter=["a", "a", None],
                             contrast=[None, Contrast(0.1, 0.5), None],
                             max_new_tokens=5, ignore_eos=True)
        for name, answer in (("a", rows[0]), ("__base__", rows[2])):
            ids = list(prompt)
            for token in answer.tokens:
                assert run(net, handle.slots(1, name), [ids])[0, -1].argmax() == token
                ids.append(token)


# -- refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, words", [
    ({"trainable_token_indices": [97]}, "has 97, but model.embed_tokens has rows for 97 tokens"),
    ({"trainable_token_indices": {"wte": [1]}}, "has 'wte', which the model does not have"),
    ({"trainable_token_indices": {"v_proj": [1]}}, "neither an embedding nor an output head"),
    ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
     "and modules_to_save both change model.embed_t"),
    ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, "both change lm_head, which is tied to"),
    ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "and target_modules both change"),
    ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
     "asks for one set"),
    ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "factors that stay tied"),
])
def test_what_cannot_be(mindspore, tiny_decoder, values, words):
    net = tiny_decoder(tie_word_embeddings=True)
    with pytest.raises(AdapterError, match=words):
        inject(net, LoraConfig(**{**RANDOM, **values}))
    assert adapters_of(net) is None


@pytest.mark.parametrize("values, is_tied, words", [
    ({"modules_to_save": ["lm_head"]}, False, "no head is tied to the model's embedding"),
    ({"trainable_token_indices": [1]}, False, "no head is tied"),
    ({"modules_to_save": ["norm"]}, True, "name no tied module"),
])
def test_tying_that_changes_nothing_is_said(mindspore, tiny_decoder, values, is_tied, words):
    modules = modules_of(tiny_decoder(tie_word_embeddings=is_tied))
    with pytest.warns(AdapterWarning, match=words):
        found = match(LoraConfig(**RANDOM, ensure_weight_tying=True, **values), modules)
    assert found.ties == {}


def spoiled(goldens, tmp_path, name, change):
    import shutil

    shutil.copytree(goldens / "peft" / name, tmp_path / "spoiled")
    tensors = load_file(tmp_path / "spoiled" / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / "spoiled" / WEIGHTS_FILE)
    return tmp_path / "spoiled"


EMBED = "base_model.model.model.embed_tokens"


def test_a_bank_without_room_for_rows_refuses(mindspore, tiny_decoder):
    handle = inject(tiny_decoder(), LoraConfig(**RANDOM, trainable_token_indices=[1, 2]), slots=3)
    with pytest.raises(AdapterError, match="model.embed_tokens has room for 2 trained token rows, the adapter has 3"):
        handle.add_adapter("more", LoraConfig(**RANDOM, trainable_token_indices=[1, 2, 3]))
    with pytest.raises(AdapterError, match="lm_head was not prepared for trained token rows"):
        handle.add_adapter("head", LoraConfig(**RANDOM, trainable_token_indices={"lm_head": [1]}))


@pytest.mark.parametrize("name, change, words", [
    ("tokens_tied", lambda t: t.update({EMBED + ".token_adapter.trainable_tokens_delta": np.ones((2, 32), np.float32)}),
     r"has shape \(2, 32\), the config and the model ask for \(3, 32\)"),
    ("tokens_tied", lambda t: t.pop(EMBED + ".token_adapter.trainable_tokens_delta"), "delta' of shape .* is missing"),
    ("save_tied", lambda t: t.update({"base_model.model.lm_head.weight": t[EMBED + ".weight"] + 1}),
     "differ by up to 1"),
])
def test_damaged_files(mindspore, goldens, tmp_path, name, change, words):
    folder = spoiled(goldens, tmp_path, name, change)
    with pytest.raises(AdapterError, match=words):
        load_adapter(build(goldens, "llama_linear"), folder)


def test_a_name_inside_the_tensors_name(mindspore, goldens, tmp_path):
    key = EMBED + ".token_adapter.trainable_tokens_delta"
    folder = spoiled(goldens, tmp_path, "tokens_tied", lambda t: t.update({key + ".default": t.pop(key)}))
    with pytest.warns(AdapterWarning, match="'default' was taken out"):
        load_adapter(build(goldens, "llama_linear"), folder)


def test_ids_are_part_of_the_digest_and_combining_is_refused(mindspore, tiny_decoder, tmp_path):
    digests = set()
    for ids in ([3, 4], [4, 3], [3, 5]):
        net = tiny_decoder()
        handle = inject(net, LoraConfig(**RANDOM, trainable_token_indices=ids), slots=2, seed=1)
        for parameter in handle.trainable_params():
            parameter.set_data(mindspore.Tensor(np.ones(parameter.shape, np.float32)))
        handle.save(tmp_path / "x")
        digests.add(digest(tmp_path / "x"))
    assert len(digests) == 3
    with pytest.raises(AdapterError, match="also trains model.embed_tokens, of which no sum is defined"):
        handle.add_weighted_adapter(["default"], [0.5], "sum")
