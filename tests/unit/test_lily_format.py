"""Lily folders: logits equal to peft on torch, PEFT's duplicated layout read and written, damaged folders refused."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from colora_ms.adapters import LilyConfig, digest, inject, load_adapter
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from colora_ms.errors import AdapterError

CASES = ("stride2", "expression", "some_layers")
PEER = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"


@pytest.fixture(scope="module")
def lily_base(goldens):
    import sys

    sys.path.insert(0, str(goldens))
    import lily_base as module

    return module


@pytest.fixture(scope="module")
def build(mindspore, lily_base):
    """A function that builds the base of the goldens."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    def make():
        sizes = {key: value for key, value in lily_base.SIZES.items() if not key.endswith("token_id")}
        config = DecoderConfig(model_type="llama", **sizes)
        return Decoder(config, lily_base.weights(config.parameter_shapes()))

    return make


def logits(net, ids, slots):
    from mindspore import Tensor

    ids = np.ascontiguousarray(ids, np.int32)
    return net(Tensor(ids), Tensor(np.full(len(ids), ids.shape[1], np.int32)), slots).asnumpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_pefts(build, goldens, name):
    golden = np.load(goldens / "peft_lily" / name / "logits.npz")
    net = build()
    handle = load_adapter(net, goldens / "peft_lily" / name, trainable=name == "stride2")
    assert np.abs(logits(net, golden["ids"], handle.slots(3)) - golden["logits"]).max() < 2e-4
    if name == "stride2":
        assert sum(parameter.size for parameter in handle.trainable_params()) == golden["trainable"]
    # A row without the adapter stays out of the pool: two rows of the base beside one of the adapter.
    mixed = logits(net, golden["ids"], handle.slots(3, [name, "__base__", "__base__"]))
    assert np.abs(mixed[:1] - golden["alone"]).max() < 2e-4
    assert np.abs(mixed[1] - golden["base"][0]).max() > 0.1  # another prompt than row 0's


@pytest.mark.parametrize("name", CASES)
def test_pefts_layout_comes_back_tensor_for_tensor(build, goldens, tmp_path, name):
    source = goldens / "peft_lily" / name
    handle = load_adapter(build(), source)
    handle.save(tmp_path / "ours")
    handle.save(tmp_path / "peft", layout="peft")
    original, ours = load_file(source / WEIGHTS_FILE), load_file(tmp_path / "ours" / WEIGHTS_FILE)
    written = load_file(tmp_path / "peft" / WEIGHTS_FILE)
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[key], original[key]) for key in original)
    assert set(ours) < set(original) and all(np.array_equal(ours[key], original[key]) for key in ours)
    assert sum(value.size for value in ours.values()) == np.load(source / "logits.npz")["trainable"]
    again = load_adapter(build(), tmp_path / "ours")
    assert again.config() == handle.config()


def test_copies_that_differ_are_named(build, goldens, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(goldens / "peft_lily" / "stride2", folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    prefix = "base_model.model.model.layers."
    tensors[prefix + "3.self_attn.q_proj.lily_A.weight"][0, 0] += 0.25
    tensors[prefix + "4.self_attn.v_proj.lily_B.weight"][1, 2] -= 0.5
    save_file(tensors, folder / WEIGHTS_FILE)
    net = build()
    with pytest.raises(AdapterError) as caught:
        load_adapter(net, folder)
    text = str(caught.value)
    assert "2 problems" in text and "differ by up to 0.25" in text and "differ by up to 0.5" in text
    for name in ("2.self_attn.q_proj.lily_A", "3.self_attn.q_proj.lily_A", "0.self_attn.v_proj.lily_B",
                 "4.self_attn.v_proj.lily_B"):
        assert f"{prefix}{name}.weight" in text
    assert getattr(net, "colora_adapters", None) is None
    # The same tensors with a stride of 1 share no A, so that only the B's copy differs from its owner.
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["stride_A"] = 1
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="1 problem:"):
        load_adapter(net, folder)


@pytest.mark.parametrize("change, expected", [
    (lambda t: t.pop("base_model.model.model.layers.3.self_attn.q_proj.lily_router.weight"),
     r"layers.3.self_attn.q_proj.lily_router.weight' of shape \(3, 4\) is missing"),
    (lambda t: t.pop("base_model.model.model.layers.2.self_attn.q_proj.lily_A.weight"),
     r"layers.2.self_attn.q_proj.lily_A.weight' of shape \(4, 24\) is missing"),
    (lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lily_A.weight": np.zeros((4, 24), np.float32)}),
     "up_proj.lily_A.weight.*is not part of the adapter"),
    (lambda t: t.update({"base_model.model.model.layers.1.self_attn.v_proj.lily_router.weight":
                         np.zeros((2, 4), np.float32)}),
     r"has shape \(2, 4\), the config and the model ask for \(3, 4\)"),
    (lambda t: t["base_model.model.model.layers.0.self_attn.v_proj.lily_B.weight"].__setitem__((0, 0), np.inf),
     "1 value that is not finite"),
])
def test_damaged_folders_are_refused(build, goldens, tmp_path, change, expected):
    folder = tmp_path / "damaged"
    shutil.copytree(goldens / "peft_lily" / "stride2", folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=expected):
        load_adapter(build(), folder)


def test_saved_folders_round_trip_with_their_pool(build, tmp_path):
    for pool in ("token", "static"):
        config = LilyConfig(r=3, stride_A=2, num_B=2, router_pool=pool, router_form="paper",
                            target_modules="all-linear",
                            init_weights=False)
        handle = inject(build(), config, seed=4)
        handle.save(tmp_path / pool)
        again = load_adapter(build(), tmp_path / pool)
        assert again.config().router_pool == pool and again.config().share == "type"
        assert again.config().target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj",
                                                 "v_proj"]
        for place, cell in handle.sites.items():
            twin = again.sites[place]
            assert np.array_equal(cell.up.asnumpy(), twin.up.asnumpy())
            assert np.array_equal(cell.router.asnumpy(), twin.router.asnumpy())
    assert digest(tmp_path / "token") != digest(tmp_path / "static")


def test_the_digest_knows_the_pool(build, tmp_path):
    inject(build(), LilyConfig(r=2, target_modules=["q_proj"], init_weights=False)).save(tmp_path / "a")
    first = digest(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps({**config, "router_pool": "sequence"}))
    assert digest(tmp_path / "a") != first
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps({**config, "stride_A": 3}))
    assert digest(tmp_path / "a") != first


def test_what_pefts_layout_cannot_say_is_refused(build, tmp_path):
    static = inject(build(), LilyConfig(r=2, router_pool="static", target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="static.*export_lora"):
        static.save(tmp_path / "out", layout="peft")
    paper = inject(build(), LilyConfig(r=2, router_pool="batch", router_form="paper", target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="router_form"):
        paper.save(tmp_path / "out", layout="peft")
    with pytest.raises(AdapterError, match="layout is 'pefft'.*'peft'"):
        paper.save(tmp_path / "out", layout="pefft")
    assert not (tmp_path / "out").exists()


def test_static_adapters_are_exported_as_plain_lora(build, lily_base, tmp_path):
    from colora_ms.adapters import export_lora

    net = build()
    handle = inject(net, LilyConfig(r=3, stride_A=2, num_B=3, scaling=1.5, router_pool="static", init_weights=False,
                                    target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2, 3]), seed=2)
    export_lora(handle, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 3
    ids = np.arange(12).reshape(2, 6)
    twin = build()
    lora = load_adapter(twin, tmp_path / "lora")
    ours, theirs = logits(net, ids, handle.slots(2)), logits(twin, ids, lora.slots(2))
    assert np.abs(ours - theirs).max() < 2e-4
    assert np.abs(theirs - logits(twin, ids, lora.slots(2, "__base__"))).max() > 0.1
    routed = inject(build(), LilyConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="weighs the experts by each input"):
        export_lora(routed, tmp_path / "no")
    assert not (tmp_path / "no").exists()


PEER_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
import make_lily_goldens
from peft import PeftModel
model = PeftModel.from_pretrained(make_lily_goldens.base(), sys.argv[2]).eval()
with torch.no_grad():
    ids = torch.from_numpy(np.load(sys.argv[2] + "/ids.npy")).long()
    np.save(sys.argv[2] + "/logits.npy", model(ids).logits.numpy())
"""


@pytest.mark.skipif(not PEER.exists(), reason="peft on torch is not installed (scripts/setup_peers.sh)")
def test_peft_on_torch_reads_what_we_write(build, goldens, tmp_path):
    """An expression shares by type here; in PEFT's layout it becomes a list, so that PEFT shares alike."""
    net = build()
    handle = inject(net, LilyConfig(r=3, stride_A=2, num_B=2, router_pool="batch", init_weights=False,
                                    target_modules=r".*\.(q_proj|o_proj|gate_proj)"), seed=3)
    handle.save(tmp_path / "out", layout="peft")
    ids = np.random.default_rng(0).integers(3, 60, (2, 8))
    np.save(tmp_path / "out" / "ids.npy", ids)
    subprocess.run([PEER, "-c", PEER_SCRIPT, goldens, tmp_path / "out"], check=True, timeout=300, capture_output=True)
    theirs = np.load(tmp_path / "out" / "logits.npy")
    assert np.abs(logits(net, ids, handle.slots(2)) - theirs).max() < 2e-4
