"""Every recipe of the model zoo: accepted by the strict reader, its adapter fits its model, sizes as the papers give
them."""

import re
from pathlib import Path

import pytest

from colora_ms.adapters import registry
from colora_ms.adapters.lily_matching import parameter_count
from colora_ms.adapters.matching import Module
from colora_ms.models.config import DecoderConfig
from colora_ms.recipes.settings import evaluation_settings, expand, quantizes, read_config

ZOO = Path(__file__).parents[2] / "model_zoo"
RECIPES = sorted(ZOO.glob("*/*.yaml"))

#: Sizes of the published models: what their config.json says.
MODELS = {
    "smollm2-135m": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
    "qwen2.5-0.5b": dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
                         num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, head_dim=64,
                         attention_bias=True, tie_word_embeddings=True),
    "llama-3-8b": dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                       num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
    "qwen3-8b": dict(model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
                     num_hidden_layers=36,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, qk_norm=True),
    "llama-2-7b": dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                       num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=32, head_dim=128),
}

#: Trained parameters: Lily's paper (1.2M), the LoRA that it compares with (56M).
SIZES = {"llama-3-8b/lily": 1_185_792, "llama-3-8b/lora": 56_623_104}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def linears(model):
    """{name: Module} of the linears of a model."""
    shapes = DecoderConfig(max_position_embeddings=4096, **MODELS[model]).parameter_shapes()
    return {name.removesuffix(".weight"): Module("linear", shape[1], shape[0], {"weight": tuple(shape)})
            for name, shape in shapes.items() if name.endswith("_proj.weight")}


def trained_parameters(config, model):
    adapter, modules = config.adapter_config(), linears(model)
    matched = registry.match(adapter, modules)
    return parameter_count(matched, modules, lambda one, modules_: registry.value_shapes(adapter, one, modules_))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_strict_reader_accepts_the_recipe_and_its_adapter_fits(path):
    config = read_config(path)
    settings = evaluation_settings(config)
    assert "base" in expand(settings.decoders) and "greedy" in expand(settings.decoders)
    if quantizes(config):
        made = config.quantization()
        assert made.method == "lrqat" and all(module.in_features % (made.group or 1) == 0
                                              for module in linears(path.parent.name).values())
        return
    count = trained_parameters(config, path.parent.name)
    assert count == SIZES.get(name_of(path), count) and count > 0


def test_the_sizes_of_papers_belong_to_recipes():
    assert set(SIZES) <= {name_of(path) for path in RECIPES} and {path.parent.name for path in RECIPES} == set(MODELS)


@pytest.mark.parametrize("model, count", [
    ("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360),
    ("qwen2.5-0.5b", 494_032_768),
    ("smollm2-135m", 134_515_008)])
def test_the_models_have_the_published_number_of_parameters(model, count):
    assert DecoderConfig(max_position_embeddings=4096, **MODELS[model]).parameter_count() == count


def test_llama_2_follows_the_authors_recipe_of_lrqat():
    config = read_config(ZOO / "llama-2-7b" / "lrqat.yaml")
    made = config.quantization()
    assert (made.r, made.lora_alpha, made.bits, made.group, made.downcast) == (32, 1.0, 4, None, "fixed")
    optimizer = config.optimizer
    assert optimizer.learning_rate == 1e-3 and optimizer.learning_rate * optimizer.scale_ratio == pytest.approx(1e-5)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.max_grad_norm) == (0.9, 0.95, 0.0, 1.0)
    assert config.data.batch_size * optimizer.accumulation_steps == 32 and config.data.max_length == 1025
    assert config.loop.steps == 10000 and config.loop.steps * optimizer.warmup_ratio == 1000
    assert config.loop.seed == 1000


def test_llama_3_follows_the_authors_recipe_of_lily():
    config = read_config(ZOO / "llama-3-8b" / "lily.yaml")
    adapter = config.adapter_config()
    assert (adapter.r, adapter.num_B, 32 // adapter.stride_A) == (16, 4, 4)
    assert config.optimizer.learning_rate == 3e-4 and config.loop.epochs == 3 and config.data.max_length == 256
    assert config.data.batch_size == 4 and config.data.batch_size * config.optimizer.accumulation_steps == 16


def test_the_preference_recipe_has_every_setting_of_its_section_and_names_its_data():
    config = read_config(ZOO / "smollm2-135m" / "dpo.yaml")
    assert config.train == "dpo" and config.dpo.loss == "sigmoid"
    assert config.data.max_length - 1 == config.data.buckets[0]
    made = (ZOO.parent / "scripts" / "preference_data.py").read_text(encoding="utf-8")
    assert all(Path(path).parent.as_posix() in made for path in (config.data.train, config.data.validation))


@pytest.mark.parametrize("folder", sorted(MODELS))
def test_every_page_names_its_recipes_and_its_links_lead_somewhere(folder):
    page = (ZOO / folder / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in (ZOO / folder).glob("*.yaml") if path.name not in page]
    assert not missing, missing
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
        assert target.startswith("https://") or (ZOO / folder / target).exists(), target
    assert f"({folder}/README.md)" in (ZOO / "README.md").read_text(encoding="utf-8")
