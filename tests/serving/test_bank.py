"""The bank: paging, pinning, new content under an old name, and every kind of adapter that must be refused."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from colora_ms.errors import AdapterError, ConfigError, UnknownAdapterError
from colora_ms.serving import AdapterBank
from tests.serving.conftest import adapter_tensors, write_adapter


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        write_adapter(tmp_path / f"a{i}", seed=i, r=2)
    return tmp_path


@pytest.fixture
def bank(tiny_decoder, folder):
    return AdapterBank(tiny_decoder(), folder, max_loaded=2, max_rank=4, host_bytes=1 << 20)


def held(bank, lease):
    """{module: (down, up, scale)} of a slot, as the graphs would read them."""
    return {path: (cell.down.asnumpy()[lease.slot], cell.up.asnumpy()[lease.slot], cell.scale.asnumpy()[lease.slot])
            for (path, _), cell in bank.adapters.sites.items()}


def take(bank, name):
    return bank.lease(bank.resolve(name))


def test_a_slot_holds_the_adapter_padded_with_zeros(bank, folder):
    for i in (0, 1, 2, 1):
        lease = take(bank, f"a{i}")
        tensors = adapter_tensors(i, 2)
        for path, (down, up, scale) in held(bank, lease).items():
            key = f"base_model.model.{path}"
            assert np.array_equal(down[:2], tensors[f"{key}.lora_A.weight"]) and not down[2:].any()
            assert np.array_equal(up[:, :2], tensors[f"{key}.lora_B.weight"]) and not up[:, 2:].any()
            assert scale == 4.0
        bank.release(lease)


def test_bfloat16_slots_hold_the_rounded_adapter_in_half_the_memory(tiny_decoder, bank, folder):
    from colora_ms.models.safetensors_file import bfloat16_to_float32, float32_to_bfloat16

    half = AdapterBank(tiny_decoder(), folder, max_loaded=2, max_rank=4, host_bytes=1 << 20, adapter_format="bfloat16")
    scales = sum(4 * 2 for _ in half.adapters.sites)
    assert 2 * (half.slot_bytes - scales) == bank.slot_bytes - scales
    assert half.info()["adapter_format"] == "bfloat16"
    for i in (0, 1, 2, 1):
        lease = take(half, f"a{i}")
        tensors = adapter_tensors(i, 2)
        for (path, _), cell in half.adapters.sites.items():
            key = f"base_model.model.{path}"
            read = cell.read(lease.slot, {"down": cell.down.shape[1:], "up": cell.up.shape[1:]})
            for got, name in ((read["down"][:2], "lora_A"), (read["up"][:, :2], "lora_B")):
                assert np.array_equal(got, bfloat16_to_float32(float32_to_bfloat16(tensors[f"{key}.{name}.weight"])))
            assert not read["down"][2:].any() and not read["up"][:, 2:].any()
        half.release(lease)
    with pytest.raises(AdapterError, match="float16.*float32, bfloat16"):
        AdapterBank(tiny_decoder(), folder, adapter_format="float16")


def test_an_adapter_of_fewer_modules_leaves_nothing_of_the_former_one(bank, folder):
    first = [take(bank, "a0"), take(bank, "a1")]
    for lease in first:
        bank.release(lease)
    write_adapter(folder / "small", seed=9, r=1, targets=("q_proj",))
    lease = take(bank, "small")
    for path, (down, up, scale) in held(bank, lease).items():
        assert path.endswith("q_proj") == bool(down.any()) == bool(up.any()) == bool(scale)


def test_pinned_slots_stay_and_the_least_recently_used_goes(bank):
    a0, a1 = take(bank, "a0"), take(bank, "a1")
    assert {a0.slot, a1.slot} == {0, 1}
    assert take(bank, "a2") is None  # both are pinned
    bank.release(a1)
    before = held(bank, a0)
    a2 = take(bank, "a2")
    assert a2.slot == a1.slot
    assert all(np.array_equal(x, y) for path, values in held(bank, a0).items() for x, y in zip(values, before[path]))
    bank.release(a0)
    bank.release(a2)
    take(bank, "a0")
    assert bank.info()["evictions"] == 1 and bank.info()["hits"] == 1
    assert take(bank, "a3").slot == a2.slot  # a2 is the one that was not used for longest


def test_equal_content_shares_a_slot(bank, folder):
    shutil.copytree(folder / "a0", folder / "twin")
    assert take(bank, "a0") == take(bank, "twin")


def test_new_content_under_an_old_name(bank, folder):
    old = take(bank, "a0")
    before = held(bank, old)
    write_adapter(folder / "a0", seed=77, r=2)
    assert bank.resolve("a0") == old.digest  # nothing is taken from disk unasked
    assert bank.load("a0") != old.digest
    new = take(bank, "a0")
    assert new.slot != old.slot and new.digest != old.digest
    assert all(np.array_equal(x, y) for path, values in held(bank, old).items() for x, y in zip(values, before[path]))
    bank.release(old)
    assert bank.info()["loaded"] == 1  # nobody can ask for the old content any more


def test_a_failed_load_leaves_the_former_content_serving(bank, folder):
    digest = bank.load("a0")
    (folder / "a0" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterError):
        bank.load("a0")
    assert bank.resolve("a0") == digest and take(bank, "a0").digest == digest


def test_unload_withdraws_and_load_brings_back(bank):
    lease = take(bank, "a0")
    bank.unload("a0")
    assert "a0" not in bank.names()
    with pytest.raises(UnknownAdapterError, match="was unloaded"):
        bank.resolve("a0")
    assert bank.info()["pinned"] == 1  # its request goes on
    bank.release(lease)
    assert bank.info()["loaded"] == 0 and bank.info()["host_bytes"] == 0
    bank.load("a0")
    assert take(bank, "a0").digest == lease.digest
    with pytest.raises(UnknownAdapterError):
        bank.unload("nobody")


def test_deleted_from_disk_while_loaded(bank, folder):
    digest = bank.load("a0")
    shutil.rmtree(folder / "a0")
    assert "a0" in bank.names() and bank.resolve("a0") == digest
    assert take(bank, "a0").digest == digest
    bank.unload("a0")
    with pytest.raises(UnknownAdapterError, match="there is no adapter 'a0'"):
        bank.load("a0")


def test_host_memory_is_bounded(tiny_decoder, folder):
    one = sum(v.nbytes for v in adapter_tensors(0, 2).values())
    bank = AdapterBank(tiny_decoder(), folder, max_loaded=1, max_rank=4, host_bytes=2 * one)
    for name in bank.names():
        bank.load(name)
    info = bank.info()
    assert info["host_bytes"] == 2 * one and info["host_evictions"] == 2
    assert [entry["state"] for entry in info["adapters"]] == ["disk", "disk", "host", "host"]
    with pytest.raises(KeyError):
        bank.lease(bank._digests["a0"])
    assert take(bank, "a0").slot == 0  # resolve reads it again
    slots = sum(int(p.size) * 4 for cell in bank.adapters.sites.values() for p in (cell.down, cell.up, cell.scale))
    assert info["slot_bytes"] == slots
    with pytest.raises(AdapterError, match="larger host_bytes"):
        AdapterBank(tiny_decoder(), folder, host_bytes=one - 1).load("a0")


def test_names(bank, folder, tmp_path_factory):
    outside = write_adapter(tmp_path_factory.mktemp("outside") / "x", seed=5, r=2)
    (folder / "notes").mkdir()
    (folder / "bad name").mkdir()
    assert bank.names() == ["a0", "a1", "a2", "a3"]
    bank.add("x", outside)
    assert bank.names()[-1] == "x" and take(bank, "x").slot == 0
    for name in ("x", "a0"):
        with pytest.raises(AdapterError, match="already"):
            bank.add(name, outside)
    for name in ("../a0", str(outside), "..", "", "a/b", "a\0", "x" * 65, None, 3):
        with pytest.raises(AdapterError, match="cannot be an adapter's name"):
            bank.resolve(name)
    (folder / "link").symlink_to(outside)
    with pytest.raises(AdapterError, match="lies outside"):
        bank.resolve("link")
    with pytest.raises(UnknownAdapterError, match="Did you mean 'a0'"):
        bank.resolve("a00")


def broken(folder, kind):
    """An adapter folder that is wrong in one way."""
    path = write_adapter(folder / "broken", seed=1, r=2)
    weights, tensors = path / "adapter_model.safetensors", adapter_tensors(1, 2)
    first = next(iter(tensors))
    if kind == "rank":
        write_adapter(path, seed=1, r=5)
    elif kind == "other base":
        save_file({key: np.zeros((value.shape[0], value.shape[1] + 1), np.float32) for key, value in tensors.items()},
                  weights)
    elif kind == "missing":
        del tensors[first]
        save_file(tensors, weights)
    elif kind == "unexpected":
        save_file({**tensors, "base_model.model.extra.lora_A.weight": np.zeros((2, 2), np.float32)}, weights)
    elif kind in ("nan", "inf"):
        tensors[first][1, 3] = float(kind)
        save_file(tensors, weights)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "gigabytes":
        weights.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    elif kind == "huge tensor":
        header = json.dumps({first: {"dtype": "F32", "shape": [1 << 20, 1 << 20],
                                     "data_offsets": [0, 1 << 42]}}).encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    elif kind == "twice":
        entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        header = ("{" + f'"{first}": {entry}, "{first}": {entry}' + "}").encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    elif kind == "pickle":
        weights.rename(path / "adapter_model.bin")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (path / "adapter_config.json").write_text("{")
    return first


@pytest.mark.parametrize("kind, message", [
    ("rank", "has rank 5 .*max_rank=4"), ("other base", "has shape"), ("missing", "is missing"),
    ("unexpected", "'base_model.model.extra.lora_A.weight'"), ("nan", "not finite"), ("inf", "not finite"),
    ("truncated", "not a usable safetensors file"), ("gigabytes", "claims 1099511627776 bytes"),
    ("huge tensor", "lies at bytes"), ("twice", "occurs twice"), ("pickle", "pickle file"),
    ("no weights", "has no adapter_model.safetensors"), ("no config", "not valid JSON"),
])
def test_bad_adapters_are_refused_and_change_nothing(bank, folder, kind, message):
    lease = take(bank, "a0")
    before = {path: [v.copy() for v in values] for path, values in held(bank, lease).items()}
    first = broken(folder, kind)
    with pytest.raises(AdapterError, match=message) as caught:
        take(bank, "broken")
    if kind in ("other base", "missing", "nan", "inf"):
        assert first in str(caught.value)  # the first offending tensor
    info = bank.info()
    assert info["loaded"] == 1 and info["reads"] == 1
    assert all(np.array_equal(x, y) for path, values in held(bank, lease).items() for x, y in zip(values, before[path]))
    assert bank.resolve("a0") == lease.digest


def test_pickles_only_on_request(tiny_decoder, goldens):
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(goldens / "tiny" / "llama")
    bank = AdapterBank(Decoder(checkpoint.config, checkpoint.tensors), goldens / "pickle", max_rank=8,
                       allow_pickle=True)
    bank.add("safetensors", goldens / "peft" / "qv_r8")
    assert bank.resolve("float32") == bank.resolve("safetensors")


@pytest.mark.parametrize("options",
                         [dict(max_loaded=0), dict(max_rank=True), dict(host_bytes=1.5), dict(folder="/nowhere")])
def test_bad_options(tiny_decoder, options):
    with pytest.raises(ConfigError):
        AdapterBank(tiny_decoder(), **options)


def test_the_handle_and_the_bank_share_one_account_of_slots(bank, folder):
    from colora_ms.adapters import LoraConfig

    handle = bank.adapters
    lease = take(bank, "a0")
    before = held(bank, lease)
    handle.load(folder / "a1", "own")  # into the slot that nobody has
    assert handle.slot("own") != lease.slot and handle.names == ("own",) and handle.free_slots == 0
    assert all(np.array_equal(x, y) for path, values in held(bank, lease).items() for x, y in zip(values, before[path]))
    own = held(bank, type(lease)(handle.slot("own"), "own"))
    assert take(bank, "a2") is None  # one slot is leased, the other has a name
    with pytest.raises(AdapterError, match=f"no slot is free.*own, slot {lease.slot} for a bank .leased, content "
                                           f"{lease.digest[:12]}"):
        handle.load(folder / "a3", "more")
    with pytest.raises(AdapterError, match="no slot is free"):
        handle.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=f"slot {lease.slot} of this model is leased by a bank.*unload"):
        handle.unload()
    with pytest.raises(AdapterError, match=f"slot {lease.slot} of this model is leased by a bank.*merge"):
        handle.merge("own")
    content = bank._host[lease.digest]
    for slot, reason in ((lease.slot, "is leased"), (handle.slot("own"), "holds the adapter 'own'")):
        with pytest.raises(AdapterError, match=f"slot {slot} {reason}"):
            handle.write_slot(slot, content.matched, content.values)
    for slot, former in ((lease.slot, before), (handle.slot("own"), own)):
        now = held(bank, type(lease)(slot, ""))
        assert all(np.array_equal(x, y) for path, values in now.items() for x, y in zip(values, former[path]))
    with pytest.raises(AdapterError, match="there is no adapter 'a0'"):
        handle.delete_adapter("a0")  # the bank's name, not the handle's
    handle.delete_adapter("own")
    second = take(bank, "a2")
    assert {lease.slot, second.slot} == {0, 1} and handle.names == ()
    for one in (lease, second):
        bank.release(one)
    with pytest.raises(AdapterError, match="slot 7 was given to nobody"):
        handle.write_slot(7, content.matched, content.values)
    with pytest.raises(AdapterError, match="not leased"):  # the bank's as long as it wants to keep them
        handle.load(folder / "a3", "more")
    bank.unload("a2")
    handle.load(folder / "a3", "more")
    assert handle.slot("more") == second.slot and bank.info()["loaded"] == 1
