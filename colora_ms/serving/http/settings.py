"""What an operator decides about the HTTP front."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Tuple

from colora_ms.errors import ConfigError
from colora_ms.serving.http.calls import FORMATS


@dataclass(frozen=True)
class Settings:
    """Limits and names of the server.

    Attributes:
        base_model: the name by which a request asks for the model without an adapter.
        token: bearer token that every request but GET /healthz must carry; None: none is asked for.
        max_body_bytes: a larger request is refused with 413.
        max_tokens: tokens that one request may ask for; default_tokens: what it gets at most if it does not say.
        most_prompts: prompts of one /v1/completions request; most_answers: answers of one request.
        timeout: seconds after which a request ends with finish_reason "timeout"; None: never.
        cors: origins whose pages may call the server from a browser, such as "https://example.org"; "*": any.
        tool_calls: form in which the model writes calls of tools, "hermes", "llama3" or "mistral"; "auto": the one
            that its chat template shows.
        adapter_roots: further folders from which /v1/load_lora_adapter may load.
        mixes: folder of mixes (``colora_ms.decoding.mix_file``) that are served under their names; None: none.
    """

    base_model: str = "base"
    token: Optional[str] = None
    max_body_bytes: int = 1 << 20
    max_tokens: int = 4096
    default_tokens: int = 128
    most_prompts: int = 16
    timeout: Optional[float] = 600.0
    most_answers: int = 128
    cors: Tuple[str, ...] = ()
    tool_calls: str = "auto"
    adapter_roots: Tuple[str, ...] = ()
    mixes: Optional[str] = None

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_tokens", "default_tokens", "most_prompts", "most_answers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a whole number >= 1")
        if not isinstance(self.base_model, str) or not self.base_model:
            raise ConfigError(f"base_model={self.base_model!r} is not a name")
        if self.token is not None and (not self.token or not self.token.isascii() or self.token != self.token.strip()):
            raise ConfigError("the token must be ASCII text without blanks at its ends")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout={self.timeout!r} is not a number of seconds > 0")
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ConfigError(f"cors: {origin!r} is not an origin, such as https://example.org, or *")
        if self.tool_calls not in ("auto", *FORMATS):
            raise ConfigError(f"tool_calls={self.tool_calls!r} is none of auto, {', '.join(FORMATS)}")
        if self.mixes is not None and not Path(self.mixes).is_dir():
            raise ConfigError(f"there is no folder {self.mixes} of mixes")
        for folder in self.adapter_roots:
            if not Path(folder).is_dir():
                raise ConfigError(f"there is no folder {folder} from which adapters could be loaded")
