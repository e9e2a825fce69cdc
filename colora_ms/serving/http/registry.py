"""The routes of models and adapters: what there is, loading, withdrawing; in this server's own form and in vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse

from colora_ms.errors import AdapterError, ConfigError, UnknownAdapterError
from colora_ms.serving.bank import AdapterBank
from colora_ms.serving.engine import Engine
from colora_ms.serving.http.failures import RequestError
from colora_ms.serving.http.mixes import Mixes
from colora_ms.serving.http.settings import Settings


class LoadBody(BaseModel):
    """vLLM's body of /v1/load_lora_adapter; ``load_inplace``: a name that there is gets the content of the path."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(BaseModel):
    """vLLM's body of /v1/unload_lora_adapter; its number of an adapter is not read by vLLM either."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_int_id: Optional[int] = None


class Registry:
    """What the engine's bank holds, as routes.

    Args:
        engine: :class:`colora_ms.serving.Engine`; settings: the server's.

    Raises:
        ConfigError: an adapter has the base model's name, or a mix cannot be served.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        if engine.bank is not None and settings.base_model in engine.bank.names():
            raise ConfigError(f"there is an adapter {settings.base_model!r}, which is the base model's name here too; "
                              "rename its folder, or give the base model another name")
        self.engine = engine
        self.settings = settings
        self.mixes = Mixes(engine, settings.mixes, settings.base_model)

    def models(self) -> Dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._model(name) for name in self._models()]}

    def model(self, name: str) -> Dict[str, Any]:
        """GET /v1/models/NAME."""
        self.check(name)
        return self._model(name)

    def check(self, name: Optional[str]) -> None:
        """Refuse the name of a model that there is not; None is the base model.

        Raises:
            UnknownAdapterError: there is no such model.
        """
        if name is not None and name not in self._models():
            raise UnknownAdapterError(f"there is no model {name!r:.80}; GET /v1/models lists them")

    def _models(self) -> List[str]:
        return [self.settings.base_model, *self.names(), *self.mixes.names]

    def names(self) -> List[str]:
        """The adapters' names, sorted: their places are their numbers for llama-server's ``lora``."""
        return [] if self.engine.bank is None else self.engine.bank.names()

    def _model(self, name: str) -> Dict[str, Any]:
        base = self.settings.base_model
        return {"id": name, "object": "model", "created": 0, "owned_by": "colora_ms", "root": base,
                "parent": None if name == base else base, "max_model_len": self.engine.max_length}

    def numbered(self) -> List[Dict[str, Any]]:
        """GET /lora-adapters, as llama-server has it; the scale is that of a request without ``lora``."""
        return [{"id": number, "path": name, "scale": 0.0} for number, name in enumerate(self.names())]

    def adapters(self) -> Dict[str, Any]:
        """GET /v1/adapters."""
        info = self._bank().info()
        return {"object": "list", "data": info["adapters"], "slots": info["max_loaded"], "max_rank": info["max_rank"],
                "adapter_format": info["adapter_format"], "slot_bytes": info["slot_bytes"],
                "host_bytes": info["host_bytes"], "host_limit": info["host_limit"]}

    def load(self, body: dict) -> Dict[str, Any]:
        """POST /v1/adapters: read and check one, or read it anew."""
        if set(body) != {"name"} or not isinstance(body["name"], str):
            raise RequestError(f"expected {{\"name\": \"an adapter's folder name\"}}, got {body!r:.80}", "name")
        name = body["name"]
        self._not_the_base(name, "name")
        self._bank().load(name)
        entry = next((one for one in self._bank().info()["adapters"] if one["name"] == name), None)
        if entry is None:
            raise UnknownAdapterError(f"adapter {name!r} was unloaded by another request while it was loaded; load it "
                                      "again")
        return entry

    def unload(self, name: str) -> Dict[str, Any]:
        """DELETE /v1/adapters/NAME."""
        self._bank().unload(name)
        return {"id": name, "object": "adapter", "deleted": True}

    def load_lora(self, body: LoadBody) -> PlainTextResponse:
        """POST /v1/load_lora_adapter: give a folder a name, and read it.

        The folder must lie in the adapters' folder or in one that the operator allows.
        """
        name, bank = body.lora_name, self._bank()
        self._not_the_base(name, "lora_name")
        path = self._allowed(body.lora_path)
        own = bank.folder is not None and path == (bank.folder / name).resolve()
        if own:
            bank.load(name)
        else:
            bank.attach(name, path, body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def unload_lora(self, body: UnloadBody) -> PlainTextResponse:
        """POST /v1/unload_lora_adapter."""
        self._bank().unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _allowed(self, given: str) -> Path:
        """A path as it really is, symbolic links followed.

        Raises:
            RequestError: it lies elsewhere.
        """
        folder = self._bank().folder
        own: Tuple[Any, ...] = () if folder is None else (folder,)
        roots = [Path(one).resolve() for one in (*own, *self.settings.adapter_roots)]
        try:
            path = Path(given) if Path(given).is_absolute() or not roots else roots[0] / given
            path = path.resolve()
            path.is_dir()  # finds names that are too long for a file system
        except (OSError, ValueError, RuntimeError):
            raise RequestError(f"lora_path={given!r:.80} is not a path", "lora_path") from None
        if not any(root in path.parents for root in roots):
            raise RequestError(f"lora_path={given!r:.80} lies outside of the folders from which this server loads "
                               "adapters; colora-ms serve --allow-adapters-from FOLDER adds one", "lora_path")
        return path

    def _not_the_base(self, name: str, field: str) -> None:
        if name == self.settings.base_model or name in self.mixes.names:
            raise RequestError(f"{name!r} is the base model's name here, or a mix's; rename the adapter", field)

    def _bank(self) -> AdapterBank:
        if self.engine.bank is None:
            raise AdapterError("this server was started without adapters")
        return self.engine.bank
