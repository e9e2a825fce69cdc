"""Adapters on families that keep linears as one (Phi-3, GLM-4): written as PEFT has them there, read back the same."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from colora_ms.adapters import LoraConfig, inject, load_adapter
from colora_ms.adapters.continuing import config_of, continue_adapter, disagreements
from colora_ms.adapters.gguf_convert import convert_adapter
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from colora_ms.errors import AdapterError
from test_family_goldens import Golden, opened

WHOLE = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
FUSED = {"phi3_window": tuple(WHOLE), "glm4": ("mlp.gate_up_proj",)}


@pytest.fixture(scope="module")
def models(mindspore, tmp_path_factory):
    return {case: Golden(case).write(tmp_path_factory.mktemp("fused") / case) for case in FUSED}


def injected(folder, seed=3, **settings):
    """An adapter of which every value is random."""
    from mindspore import Tensor

    handle = inject(opened(folder), LoraConfig(**{"init_lora_weights": False, **settings}), seed=seed)
    random = np.random.default_rng(seed)
    for parameter in handle.trainable_params():
        noise = random.standard_normal(parameter.shape).astype(np.float32) * 0.3
        parameter.set_data(Tensor(parameter.asnumpy() + noise))
    return handle


def on_disk(folder):
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)


def scaling_of(config, module):
    """As PEFT finds it: the first pattern that ends the module's name."""
    r, alpha = (next((value for key, value in config[field].items() if f".{module}".endswith(f".{key}")), config[name])
                for field, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
    return r, alpha / (np.sqrt(r) if config["use_rslora"] else r)


def changes(handle):
    """{module: what it adds to the weight, float64}."""
    targets = handle.matched(None).targets
    return {path: targets[path].scaling * own["up"].astype(np.float64) @ own["down"]
            for (path, role), own in handle.values().items() if role == "lora"}


def check_file(folder, handle, fused):
    """The file has the fused linears and not their parts, and they change what the adapter's parts change."""
    config, tensors = on_disk(folder)
    expected, rows = changes(handle), {name: one.out_features for name, one in handle.modules.items()}
    seen = set()
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer, rest = module[:len("model.layers.0.")], module[len("model.layers.0."):]
        r, scale = scaling_of(config, module)
        assert tensors[key].shape[0] == r
        change = scale * tensors[key.replace("lora_A", "lora_B")].astype(np.float64) @ tensors[key]
        parts = [layer + part for part in (WHOLE[rest] if rest in fused else [rest])]
        want = np.concatenate([expected.get(one, np.zeros((rows[one], change.shape[1]))) for one in parts])
        assert np.abs(change - want).max() < 1e-5 * max(1, np.abs(want).max())
        seen.update(parts)
        short = rest.rpartition(".")[2]
        assert module in config["target_modules"] or short in config["target_modules"]
    assert seen >= set(expected)


CASES = [
    {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    {"r": 2, "lora_alpha": 3, "layers_to_transform": [1], "use_rslora": True},
    {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "up_proj", "down_proj"], "lora_bias": True},
    {"r": 2, "lora_alpha": 5, "target_modules": r".*\.0\.self_attn\.q_proj|.*\.1\.(self_attn\.[kq]|mlp\.gate)_proj"},
    {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "rank_pattern": {"layers.0.mlp.up_proj": 4, "o_proj": 3},
     "alpha_pattern": {"layers.0.mlp.up_proj": 8, "o_proj": 7}},
    {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "use_dora": True, "init_lora_weights": True},
]


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_saved_and_read_back(models, tmp_path, case, number):
    handle = injected(models[case], **CASES[number])
    handle.save(tmp_path / "a")
    check_file(tmp_path / "a", handle, FUSED[case])
    again = load_adapter(opened(models[case]), tmp_path / "a", trainable=True)
    before, after = handle.values(), again.values()
    assert before.keys() == after.keys()
    for place, own in before.items():
        assert own.keys() == after[place].keys()
        assert all(np.array_equal(own[field], after[place][field]) for field in own), place
    mine, other = handle.matched(None).targets, again.matched(None).targets
    assert {name: (one.r, one.alpha) for name, one in mine.items()} == {
        name: (one.r, one.alpha) for name, one in other.items()}
    if number == 0:
        config = again.config(None)
        assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (2, 4, {}, {})
    again.save(tmp_path / "b")
    assert on_disk(tmp_path / "a")[0] == on_disk(tmp_path / "b")[0]
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()


def test_before_training_the_ranks_are_known_too(models, tmp_path):
    """lora_B is zero then, so that no values tell where the blocks are."""
    handle = inject(opened(models["phi3_window"]), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    handle.save(tmp_path / "a")
    again = load_adapter(opened(models["phi3_window"]), tmp_path / "a")
    assert {name: one.r for name, one in again.matched(None).targets.items()} == {
        name: 2 for name in handle.matched(None).targets}
    assert all(np.array_equal(own["down"], again.values()[place]["down"]) for place, own in handle.values().items())


@pytest.mark.parametrize("case", FUSED)
def test_an_adapter_of_pefts_stays_as_it_was(models, tmp_path, case):
    folder = Golden(case).write_adapter(tmp_path / "peft")
    load_adapter(opened(models[case]), folder).save(tmp_path / "a")
    (config, before), (written, after) = on_disk(folder), on_disk(tmp_path / "a")
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (3, 5, {})
    assert written["target_modules"] == sorted({name.rpartition(".")[2] for name in config["target_modules"]})


def test_other_scales_go_into_b_once(models, tmp_path):
    handle = injected(models["phi3_window"], r=2, lora_alpha=3, target_modules="all-linear",
                      alpha_pattern={"k_proj": 7}, rank_pattern={"v_proj": 3})
    handle.save(tmp_path / "a")
    check_file(tmp_path / "a", handle, WHOLE)
    again = load_adapter(opened(models["phi3_window"]), tmp_path / "a")
    assert {name: one.r for name, one in again.matched(None).targets.items()} == {
        name: one.r for name, one in handle.matched(None).targets.items()}
    found = changes(again)
    assert all(np.allclose(one, found[name], rtol=1e-6, atol=1e-6) for name, one in changes(handle).items())
    again.save(tmp_path / "b")
    assert on_disk(tmp_path / "a")[0] == on_disk(tmp_path / "b")[0]
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()


def test_training_goes_on_with_the_parts(models, tmp_path):
    """A recipe may name the parts beside start_from; other modules than the adapter's are refused."""
    handle = injected(models["phi3_window"], r=2, target_modules=["q_proj", "v_proj"])
    handle.save(tmp_path / "a")
    config = config_of(tmp_path / "a")
    assert config.target_modules == ["qkv_proj"]
    given = {"r": 2, "target_modules": ["v_proj", "q_proj"]}
    assert disagreements(given, config, "a") == [] and disagreements({"r": 4}, config, "a") != []
    again = continue_adapter(opened(models["phi3_window"]), tmp_path / "a", given)
    mine, other = ({one.name: one.asnumpy() for one in each.trainable_params()} for each in (handle, again))
    assert mine.keys() == other.keys() and all(np.array_equal(mine[name], other[name]) for name in mine)
    with pytest.raises(AdapterError, match="target_modules is .*k_proj"):
        continue_adapter(opened(models["phi3_window"]), tmp_path / "a", {"target_modules": ["q_proj", "k_proj"]})


def test_trained_on_in_peft_the_blocks_are_gone(models, tmp_path):
    """Then every part has the whole lora_A, and the rank is the sum."""
    handle = injected(models["phi3_window"], r=2, lora_alpha=4, target_modules="all-linear")
    handle.save(tmp_path / "a")
    config, tensors = on_disk(tmp_path / "a")
    key = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"
    tensors[key] = tensors[key] + np.float32(0.25)
    save_file(tensors, tmp_path / "a" / WEIGHTS_FILE)
    again = load_adapter(opened(models["phi3_window"]), tmp_path / "a")
    ranks = {name: one.r for name, one in again.matched(None).targets.items()}
    assert ranks["model.layers.0.self_attn.k_proj"] == 6 and ranks["model.layers.1.self_attn.k_proj"] == 2
    check_file(tmp_path / "a", again, WHOLE)
    again.save(tmp_path / "b")
    check_file(tmp_path / "b", again, WHOLE)
    after = on_disk(tmp_path / "b")[1]
    assert all(np.array_equal(tensors[name], after[name]) for name in tensors)


@pytest.mark.parametrize("settings, words", [
    ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora is on .*q_proj, but not on .*k_proj.*qkv_proj"),
    ({"target_modules": ["o_proj"], "modules_to_save": ["up_proj"]}, "modules_to_save means .*up_proj.*gate_up_proj"),
])
def test_what_peft_has_no_form_for_is_refused_at_once(models, settings, words):
    with pytest.raises(AdapterError, match=words):
        inject(opened(models["phi3_window"]), LoraConfig(r=2, **settings))


def test_a_start_from_the_base_is_written_as_plain_lora(models, tmp_path):
    handle = injected(models["phi3_window"], r=2, target_modules="all-linear", init_lora_weights="pissa")
    handle.save(tmp_path / "a")
    handle.save(tmp_path / "b", as_lora=True)
    assert on_disk(tmp_path / "a")[0]["init_lora_weights"] is True
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()


def test_the_advice_for_llama_cpp_can_be_followed(models, tmp_path):
    injected(models["phi3_window"], r=2, target_modules="all-linear").save(tmp_path / "a")
    with pytest.raises(AdapterError, match="colora-ms merge MODEL ADAPTER OUT, into a folder .phi3 models are not"):
        convert_adapter(tmp_path / "a", tmp_path / "a.gguf", str(models["phi3_window"]))
