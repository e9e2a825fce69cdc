"""What PEFT loads and means the same is loaded with a said warning; what is no adapter folder is said to be what it
is."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from colora_ms.adapters import LilyConfig, LoraConfig, digest, inject, load_adapter
from colora_ms.adapters.key_names import plain_names
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from colora_ms.errors import AdapterError, AdapterWarning, CheckpointError
from colora_ms.models.checkpoint import open_checkpoint

PREFIX = "base_model.model."


def spoil(folder, rename=None, **settings):
    values = json.loads((folder / CONFIG_FILE).read_text())
    values.update(settings)
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    if rename:
        tensors = load_file(folder / WEIGHTS_FILE)
        save_file({rename(key): value for key, value in tensors.items()}, folder / WEIGHTS_FILE)


@pytest.fixture
def made(mindspore, tiny_decoder, tmp_path):
    """(function that builds the model, folder of an adapter, its values)."""
    handle = inject(tiny_decoder(), LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False,
                                               modules_to_save=["lm_head"]))
    handle.save(tmp_path / "adapter")
    return tiny_decoder, tmp_path / "adapter", handle.values()


def same(values, others):
    return values.keys() == others.keys() and all(np.array_equal(values[place][field], others[place][field])
                                                  for place in values for field in values[place])


@pytest.mark.parametrize("settings, words", [
    ({"target_modules": ["q_proj", "embed_tokens", "c_attn", "query_key_value"]}, "'c_attn', 'query_key_value'"),
    ({"rank_pattern": {"c_attn": 77, "(k|v)_proj": 5}}, "rank_pattern has 'c_attn'"),
    ({"alpha_pattern": {"layers.3.self_attn.q_proj": 77}}, "alpha_pattern has 'layers.3"),
    ({"layers_to_transform": [0, 1, 2, 77], "target_modules": ["q_proj", "model.embed_tokens"]}, "has 2, 77"),
    ({"new_in_0_22": None, "more": False, "and": {"a": None, "b": []}}, "new_in_0_22=None, more=False, and="),
])
def test_what_changes_nothing_is_loaded_and_said(made, settings, words):
    build, folder, values = made
    spoil(folder, **settings)
    with pytest.warns(AdapterWarning, match=words):
        handle = load_adapter(build(), folder)
    assert same(handle.values(), values)


@pytest.mark.parametrize("settings, words", [
    ({"target_modules": ["c_attn"]}, "matches no module"),
    ({"layers_to_transform": [2, 3], "target_modules": ["q_proj"]}, "matches no module"),
    ({"new_in_0_22": True}, "new_in_0_22=True is not a known setting"),
    ({"new_in_0_22": {"a": {"b": 1}}}, "not a known setting"),
    ({"use_qalora": True}, "QALoRA"),
])
def test_what_may_change_something_is_refused(made, settings, words):
    build, folder, _ = made
    spoil(folder, **settings)
    with pytest.raises(AdapterError, match=words):
        load_adapter(build(), folder)


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["q_proj"]), LilyConfig(target_modules=["q_proj"])])
def test_neutral_settings_of_every_method(config):
    with pytest.warns(AdapterWarning, match="later=None"):
        type(config).from_peft({**config.to_peft(), "later": None})
    with pytest.raises(AdapterError, match="later='x' is not a known setting"):
        type(config).from_peft({**config.to_peft(), "later": "x"})


def named(name):
    """PEFT's names in memory, where the adapter's own name stands inside."""
    def rename(key):
        if "lora_embedding" in key:
            return f"{key}.{name}"
        head, _, tail = key.rpartition(".")
        return f"{head}.{'modules_to_save.' if 'lora' not in key else ''}{name}.{tail}"
    return rename


@pytest.mark.parametrize("name", ["default", "my_adapter-2", "weight"])
def test_tensors_that_carry_the_adapters_name(made, name):
    build, folder, values = made
    before = digest(folder)
    spoil(folder, named(name))
    with pytest.warns(AdapterWarning, match=f"{name!r} was taken out"):
        handle = load_adapter(build(), folder)
    assert same(handle.values(), values) and digest(folder) == before


def test_dora_and_biases_that_carry_the_adapters_name(goldens, mindspore, tmp_path):
    from colora_ms.models.decoder import Decoder

    for golden, base in (("dora", "llama"), ("lora_bias", "llama_bias")):
        shutil.copytree(goldens / "peft" / golden, tmp_path / golden)
        checkpoint = open_checkpoint(goldens / "tiny" / base)
        right = load_adapter(Decoder(checkpoint.config, checkpoint.tensors), tmp_path / golden).values()
        for tail in ("", ".weight") if golden == "dora" else ("",):
            def rename(key):
                if key.endswith("lora_magnitude_vector"):
                    return f"{key}.default{tail}"
                return named("default")(key) if "lora_" in key else key
            shutil.copy(goldens / "peft" / golden / WEIGHTS_FILE, tmp_path / golden / WEIGHTS_FILE)
            spoil(tmp_path / golden, rename)
            with pytest.warns(AdapterWarning, match="'default' was taken out"):
                handle = load_adapter(Decoder(checkpoint.config, checkpoint.tensors), tmp_path / golden)
            assert same(handle.values(), right)


def test_names_that_disagree_or_are_doubled_are_refused(made):
    build, folder, _ = made
    spoil(folder, lambda key: named("b" if "layers.1" in key else "a")(key))
    with pytest.raises(AdapterError, match=r"lora_A\.a\.weight'.* is not part of the adapter"):
        load_adapter(build(), folder)


def test_a_doubled_prefix_stays_refused(made):
    build, folder, _ = made
    spoil(folder, lambda key: PREFIX + key)
    with pytest.raises(AdapterError, match="base_model.model.base_model.model.*is not part of the adapter"):
        load_adapter(build(), folder)


PARTS = st.sampled_from(["q_proj", "default", "lora_A", "weight", "layers", "0"])


@given(st.lists(PARTS, min_size=1, max_size=4).map(".".join)
       .filter(lambda path: not path.endswith("lora_A")), st.from_regex(r"[a-z_0-9-]{1,12}", fullmatch=True),
       st.sampled_from(["lora_A.%s.weight", "lora_B.%s.weight", "lora_B.%s.bias", "lora_embedding_A.%s",
                        "lora_magnitude_vector.%s.weight", "lily_router.%s.weight"]))
def test_an_adapters_name_is_found_at_its_place_only(path, name, form):
    """With any module path before it; taking it out twice takes out no more than once."""
    key = f"{PREFIX}{path}.{form % name}"
    plain = f"{PREFIX}{path}.{form.replace('.%s', '')}"
    plain = plain.removesuffix(".weight") if "magnitude" in form else plain
    assert plain_names([key])[0] == {plain: key}
    assert plain_names([plain])[0] == {plain: plain}


# -- what is no adapter, what is no model -----------------------------------------------------------------------------

def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


MLX = [{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "num_layers": 16, "model": "x/y"},
       {"lora_layers": 16, "lora_parameters": {"rank": 8}}, {"fine_tune_type": "dora"}]


@pytest.mark.parametrize("content", MLX)
def test_mlx_adapter(made, tmp_path, content):
    build, _, _ = made
    write(tmp_path / "mlx" / CONFIG_FILE, content)
    write(tmp_path / "mlx" / "adapters.safetensors")
    for path in (tmp_path / "mlx", tmp_path / "mlx" / "adapters.safetensors"):
        with pytest.raises(AdapterError, match="is an mlx adapter .*fuse"):
            load_adapter(build(), path)
        with pytest.raises(CheckpointError, match="is an mlx adapter .*it is no model"):
            open_checkpoint(path)


def test_model_in_the_place_of_an_adapter(made, goldens):
    build, _, _ = made
    with pytest.raises(AdapterError, match="is a model, not an adapter: it has model.safetensors.*--model"):
        load_adapter(build(), goldens / "tiny" / "llama")


def test_adapter_in_the_place_of_a_model(made, goldens):
    _, folder, _ = made
    for path in (folder, folder / WEIGHTS_FILE, goldens / "peft" / "qv_r8"):
        with pytest.raises(CheckpointError, match=r"is an adapter \(LORA.*not a model; give its base model"):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match="made for 'tiny/llama'"):
        open_checkpoint(goldens / "peft" / "qv_r8")


@pytest.mark.parametrize("inside", ["{}", "{}/default"])
def test_folder_above_adapters(made, tmp_path, inside):
    build, folder, _ = made
    above = tmp_path / "run"
    for step in (5, 10, 9):
        shutil.copytree(folder, above / inside.format(f"checkpoint-{step}"))
    last = above / inside.format("checkpoint-10")
    with pytest.raises(AdapterError, match=f"is a folder above adapters.*name one of them: {last}"):
        load_adapter(build(), above)
    with pytest.raises(CheckpointError, match=f"is a folder above adapters.*{last} as the adapter"):
        open_checkpoint(above)
    load_adapter(build(), last)


def test_checkpoint_folder_above_a_named_adapter(made, tmp_path):
    """PEFT saves an adapter that is not called "default" into a folder of its name."""
    build, folder, _ = made
    shutil.copytree(folder, tmp_path / "checkpoint-10" / "mine")
    with pytest.raises(AdapterError, match="holds mine; name one of them"):
        load_adapter(build(), tmp_path / "checkpoint-10")


def test_files_and_other_folders(made, tmp_path):
    build, folder, _ = made
    write(tmp_path / "lora.gguf", b"GGUF\3\0\0\0")
    write(tmp_path / "odd" / "notes.txt")
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / CONFIG_FILE).unlink()
    for path, words in [(folder / WEIGHTS_FILE, "is a file; an adapter is the folder that holds it"),
                        (tmp_path / "odd", "cannot be read as an adapter: it holds notes.txt"),
                        (tmp_path / "half", "has an adapter's weights, but no adapter_config.json"),
                        (tmp_path / "none", "there is no adapter folder"),
                        ("someone/lora-7b", "no adapter folder someone/lora-7b; a name on a hub has to be downloaded")]:
        with pytest.raises(AdapterError, match=words):
            load_adapter(build(), path)
