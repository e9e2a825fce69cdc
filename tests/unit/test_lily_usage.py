"""Expert use: counts against NumPy, the command ``colora-ms inspect``, its pictures and refusals."""

import json

import numpy as np
import pytest

from colora_ms.adapters import LilyConfig, LoraConfig, inject
from colora_ms.adapters.lily_usage import expert_use
from colora_ms.cli import main
from colora_ms.errors import AdapterError

SEQUENCES = [[3, 14, 15, 92, 65], [8, 9], [27, 18, 28, 18, 28, 4, 5], [1], [5, 6, 7]]


def config(pool="token", **changes):
    return LilyConfig(**{**dict(r=4, stride_A=1, num_B=3, router_pool=pool, init_weights=False,
                                target_modules=["q_proj", "up_proj"]), **changes})


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@pytest.mark.parametrize("pool", ["token", "sequence"])
def test_uses_are_the_mean_weights_of_real_tokens(mindspore, tiny_decoder, pool):
    """The first layer's input is the normed embedding, so that its weights follow in a line of NumPy."""
    net = tiny_decoder()
    handle = inject(net, config(pool), seed=1, trainable=False)
    before = net(mindspore.Tensor(np.array([[3, 4]], np.int32)), mindspore.Tensor(np.array([2], np.int32)),
                 handle.slots(1)).asnumpy()
    uses = {use.path: use for use in expert_use(handle, SEQUENCES, rows=2)}
    assert list(uses) == [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
    use = uses["model.layers.0.self_attn.q_proj"]
    assert use.tokens == 18 and use.group == "q_proj" and use.block == 0
    assert uses["model.layers.1.mlp.up_proj"].block == 1
    cell = handle.sites[use.path, "lora"]
    table = net.model.embed_tokens.weight.asnumpy().astype(np.float64)
    norm = net.model.layers[0].input_layernorm.weight.asnumpy()
    weights = []
    for one in SEQUENCES:
        x = table[one]
        x = norm * x / np.sqrt((x * x).mean(-1, keepdims=True) + net.config.rms_norm_eps)
        p = softmax(x @ cell.down.asnumpy()[0].T @ cell.router.asnumpy()[0].T)
        weights.append(p if pool == "token" else np.broadcast_to(p.mean(0), p.shape))
    weights = np.concatenate(weights)
    assert np.abs(use.mean - weights.mean(0)).max() < 1e-5
    assert np.abs(use.top - np.bincount(weights.argmax(1), minlength=3) / 18).max() < 1e-9
    assert 1 <= use.effective <= 3
    # Afterwards nothing is left of the counting.
    after = net(mindspore.Tensor(np.array([[3, 4]], np.int32)), mindspore.Tensor(np.array([2], np.int32)),
                handle.slots(1))
    assert np.array_equal(after.asnumpy(), before)
    assert not any("lily_use" in parameter.name for parameter in net.get_parameters())


def test_static_weights_need_no_text(mindspore, tiny_decoder):
    handle = inject(tiny_decoder(), config("static"), seed=1)
    for use in expert_use(handle, []):
        assert use.tokens == 0
        assert np.abs(use.mean - softmax(handle.sites[use.path, "lora"].router.asnumpy()[0])).max() < 1e-6


def test_what_cannot_be_counted_is_refused(mindspore, tiny_decoder):
    handle = inject(tiny_decoder(), config())
    for texts, words in [([], "at least one token"), ([[1], []], "at least one token"),
                         ([[1] * 200], "200 tokens, the model's context is 128")]:
        with pytest.raises(AdapterError, match=words):
            expert_use(handle, texts)
    with pytest.raises(AdapterError, match="method LORA has no router"):
        expert_use(inject(tiny_decoder(), LoraConfig(r=2)), SEQUENCES)


@pytest.fixture
def command(monkeypatch, tiny_decoder, word_tokenizer, capsys):
    """A function that runs ``colora-ms inspect`` on the tiny decoder: (exit code, output, errors)."""
    monkeypatch.setattr("colora_ms.models.load_model", lambda name, weight_format: (tiny_decoder(), word_tokenizer))

    def run(*arguments):
        code = main(["inspect", *map(str, arguments)])
        return code, *capsys.readouterr()
    return run


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 2000


def test_inspect_prints_and_draws_the_expert_use(command, tiny_decoder, tmp_path):
    inject(tiny_decoder(), config(), seed=1).save(tmp_path / "lily")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "3 4", "completion": "5"}) + "\n")
    code, out, _ = command(tmp_path / "lily", "--prompts", "3 14 15", "--data", tmp_path / "data.jsonl", "--template",
                           "{prompt} {completion}", "--plot", tmp_path / "use.png", "--json", tmp_path / "use.json")
    assert code == 0 and "expert use over 6 tokens" in out and is_png(tmp_path / "use.png")
    assert "model.layers.0.self_attn.q_proj.lily_B.weight" in out and "stride_A" in out
    rows = json.loads((tmp_path / "use.json").read_text())
    assert len(rows) == 4 and all(abs(sum(row["mean"]) - 1) < 1e-6 and row["tokens"] == 6 for row in rows)
    code, out, _ = command(tmp_path / "lily")
    assert code == 0 and "give --prompts or --data" in out
    code, _, errors = command(tmp_path / "lily", "--plot", tmp_path / "no.png")
    assert code == 1 and "depends on the text" in errors and not (tmp_path / "no.png").exists()


def test_inspect_lists_a_lora_with_the_norms_of_its_updates(command, tiny_decoder, tmp_path):
    handle = inject(tiny_decoder(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "embed_tokens"],
                                               rank_pattern={"layers.1.self_attn.q_proj": 2}, init_lora_weights=False),
                    seed=1)
    handle.save(tmp_path / "lora")
    code, out, _ = command(tmp_path / "lora", "--plot", tmp_path / "norms.png", "--json", tmp_path / "norms.json")
    assert code == 0 and is_png(tmp_path / "norms.png") and "lora_embedding_A" in out
    norms = json.loads((tmp_path / "norms.json").read_text())
    for path, rank in [("model.layers.0.self_attn.q_proj", 3), ("model.layers.1.self_attn.q_proj", 2),
                       ("model.embed_tokens", 3)]:
        delta = handle.sites[path, "lora"].delta(0)
        assert norms[path]["rank"] == rank and abs(norms[path]["norm"]
                                                   - np.linalg.norm(delta)) < 1e-4 * np.linalg.norm(delta)
    code, _, errors = command(tmp_path / "lora", "--prompts", "3 4")
    assert code == 1 and "has no router" in errors
