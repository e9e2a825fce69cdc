"""A GGUF's own head is thrown away only where it is the embedding, up to what their two types round away."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.models.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf")

from colora_ms.models.gguf_noise import stored_noise  # noqa: E402
from gguf_files import GOLDENS, write_gguf  # noqa: E402

TYPES = gguf.GGMLQuantizationType
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
EMBED, HEAD = "token_embd.weight", "output.weight"


def stored(matrix, kind):
    """What a file of this type gives back."""
    return gguf.quants.dequantize(gguf.quants.quantize(matrix, TYPES[kind]), TYPES[kind]).astype(np.float32)


def write(path, embed, head, kinds):
    def change(tensors):
        assert tensors[EMBED].shape == embed.shape
        tensors[EMBED], tensors[HEAD] = embed, head
    write_gguf(path, "qwen2", change, {EMBED: TYPES[kinds[0]], HEAD: TYPES[kinds[1]]})
    return open_checkpoint(str(path))


def matrix(seed, form="normal"):
    random = np.random.default_rng(seed)
    if form == "heavy":
        return random.standard_t(2, (96, 32)).astype(np.float32)
    return random.standard_normal((96, 32), np.float32)


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("share", [0.05, 0.15])
def test_a_head_near_the_embedding_is_a_head(kind, share, tmp_path):
    """Case 9: the embedding plus 5 % noise is a matrix of its own."""
    embed = matrix(0)
    head = embed + np.float32(share) * matrix(1)
    opened = write(tmp_path / "m.gguf", embed, head, (kind, kind))
    assert not opened.config.tie_word_embeddings
    np.testing.assert_array_equal(opened.tensors["lm_head.weight"], stored(head, kind))
    np.testing.assert_array_equal(opened.tensors["model.embed_tokens.weight"], stored(embed, kind))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from([0.0, 1e-6, 1e-3, 0.01, 0.05, 0.3]),
       st.integers(0, 99), st.sampled_from(["normal", "heavy"]))
def test_logits_are_those_of_the_files_own_head(tmp_path, first, second, share, seed, form):
    """Property: x @ head.T as an untied float model has it, but for the rounding of the two types, value by value."""
    embed = matrix(seed, form)
    head = embed + np.float32(share) * matrix(seed + 100)
    opened = write(tmp_path / "m.gguf", embed, head, (first, second))
    own, tied = stored(head, second), opened.config.tie_word_embeddings
    used = opened.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    if not tied:
        assert share > 0 or not np.array_equal(stored(embed, first), own)
    x = matrix(seed + 200)
    with np.errstate(all="ignore"):
        allowed = noise(second, own) + noise(first, stored(embed, first)) if tied else np.zeros_like(own)
    assert (np.abs(x @ used.T - x @ own.T) <= np.abs(x) @ allowed.T + 1e-4).all()
    if share == 0:
        assert tied  # one matrix, in whatever two types
        finer = stored(embed, min(first, second, key=KINDS.index))
        if {first, second} != {"F16", "BF16"}:
            np.testing.assert_array_equal(used, finer)
    if first == second and share >= 0.05 or share == 0.3:
        assert not tied


def noise(kind, values):
    number = TYPES[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = gguf.quants.quantize(values, number).view(np.uint8).reshape(-1, size)
    return stored_noise(kind, raw, values.reshape(-1, block)).reshape(values.shape)


def test_one_row_of_its_own_is_enough(tmp_path):
    """A head that was trained for one token only: no sample of rows may miss it."""
    embed = matrix(3)
    for row in (0, 1, 47, 95):
        head = embed.copy()
        head[row] += 0.5
        assert not write(tmp_path / "m.gguf", embed, head, ("Q5_0", "Q8_0")).config.tie_word_embeddings, row
    assert write(tmp_path / "m.gguf", embed, embed, ("Q5_0", "Q8_0")).config.tie_word_embeddings


def test_a_head_that_is_not_finite_is_kept(tmp_path):
    embed = matrix(3)
    embed[5, 5] = np.nan
    assert not write(tmp_path / "m.gguf", embed, embed, ("F32", "F32")).config.tie_word_embeddings


@pytest.mark.parametrize("form", ["normal", "heavy", "tiny", "equal", "zero"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_rounding_stays_within_the_bound_and_the_bound_near_it(kind, form):
    random = np.random.default_rng(2)
    values = {"normal": random.standard_normal((300, 64)), "heavy": random.standard_t(2, (300, 64)),
              "tiny": 1e-6 * random.standard_normal((300, 64)), "equal": np.full((4, 64), 0.37),
              "zero": np.zeros((4, 64))}[form].astype(np.float32)
    number = TYPES[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = gguf.quants.quantize(values, number)
    got = gguf.quants.dequantize(raw, number).astype(np.float32)
    bound = stored_noise(kind, raw.view(np.uint8).reshape(-1, size), got.reshape(-1, block)).reshape(got.shape)
    error = np.abs(got - values)
    assert (error <= bound).all()
    if form == "normal":
        assert (error > 0.95 * bound).any() and np.sqrt(np.mean(bound ** 2)) < 2 * np.sqrt(np.mean(error ** 2))


def test_k_quants_of_llama_cpp_stay_within_the_bound():
    """Blocks that ggml's own quantisers made, with and without weights of importance."""
    goldens = np.load(os.path.join(GOLDENS, "gguf_noise.npz"))
    seen = 0
    for key in goldens.files:
        name, _, kind = key.partition(".")
        if not kind:
            continue
        kind = kind.removesuffix("_weighted")
        number = TYPES[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        got = gguf.quants.dequantize(goldens[key], number)
        bound = stored_noise(kind, goldens[key].reshape(-1, size), got.reshape(-1, block)).reshape(got.shape)
        error = np.abs(got - goldens[name])
        assert (error <= bound).all(), key
        inner = np.median(bound)
        assert inner < 4 * np.sqrt(np.mean(error ** 2)), key
        seen += 1
    assert seen == 30


def test_an_unknown_rounding_never_ties():
    assert stored_noise("IQ2_XS", np.zeros((1, 74), np.uint8), np.zeros((1, 256), np.float32)) is None
