"""Mixes under names of their own: listed, asked for, and refused once an adapter is another one."""

import pytest

from colora_ms.decoding.mix import Ensemble
from colora_ms.decoding.mix_file import save_mix
from colora_ms.errors import ConfigError
from colora_ms.serving.http import Server, Settings, create_app
from tests.serving.conftest import call, write_adapter


@pytest.fixture
def mixes(adapter_folder, tmp_path):
    """Folder of one mix: adapter a0 of the bank's folder, and one from elsewhere."""
    write_adapter(tmp_path / "elsewhere" / "far", seed=60, r=2)
    folder = tmp_path / "mixes"
    folder.mkdir()
    save_mix(folder / "both.yaml", Ensemble(["a0", "far"], [2, 1], "prob"),
             {"a0": adapter_folder / "a0", "far": tmp_path / "elsewhere" / "far"})
    return folder


def test_a_mix_is_a_model(engine, mixes, tmp_path):
    with Server(create_app(engine, Settings(base_model="tiny", mixes=str(mixes)))) as server:
        def complete(**more):
            body = {"prompt": "5 6 7", "max_tokens": 12, "ignore_eos": True, **more}
            return call(server.url, "POST", "/v1/completions", body)

        try:
            assert "both" in [one["id"] for one in call(server.url, "GET", "/v1/models")[2]["data"]]
            assert call(server.url, "GET", "/v1/models/both")[2]["parent"] == "tiny"
            wanted = engine.submit("5 6 7", mix=Ensemble(["a0", "far"], [2, 1], "prob"), max_new_tokens=12,
                                   ignore_eos=True).result(60).text
            status, _, answer = complete(model="both")
            assert status == 200 and answer["choices"][0]["text"] == wanted and answer["model"] == "both"
            for more in (dict(contrast={}), dict(mix={"ensemble": {"adapters": ["a0"]}}), dict(lora=[{"id": 0}])):
                status, _, answer = complete(model="both", **more)
                assert status == 400 and "is a mix" in answer["error"]["message"], answer
            assert call(server.url, "POST", "/v1/adapters", {"name": "both"})[0] == 400
            write_adapter(tmp_path / "elsewhere" / "far", seed=61, r=2)
            engine.bank.load("far")
            status, _, answer = complete(model="both")
            assert status == 400 and "another content of adapter 'far'" in answer["error"]["message"]
            engine.bank.unload("far")
            assert complete(model="both")[0] == 404
        finally:
            if "far" in engine.bank.names():
                engine.bank.unload("far")


def test_files_that_cannot_be_served(engine, mixes, adapter_folder, tmp_path):
    try:
        for name in ("tiny", "a1"):
            save_mix(mixes / "z.yaml", Ensemble(["a0"]), {"a0": adapter_folder / "a0"}, name)
            with pytest.raises(ConfigError, match="another model"):
                create_app(engine, Settings(base_model="tiny", mixes=str(mixes)))
        save_mix(mixes / "z.yaml", Ensemble(["a0"]), {"a0": adapter_folder / "a1"})
        with pytest.raises(ConfigError, match="its content is another one"):
            create_app(engine, Settings(base_model="tiny", mixes=str(mixes)))
        (mixes / "z.yaml").write_text("name: [")
        with pytest.raises(ConfigError, match="cannot be read"):
            create_app(engine, Settings(base_model="tiny", mixes=str(mixes)))
        with pytest.raises(ConfigError, match="no folder"):
            Settings(mixes=str(tmp_path / "nothing"))
    finally:
        if "far" in engine.bank.names():
            engine.bank.unload("far")
