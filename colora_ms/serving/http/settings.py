"""What an operator decides about the HTTP front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from colora_ms.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Limits and names of the server.

    Attributes:
        base_model: the name by which a request asks for the model without an adapter.
        token: bearer token that every request but GET /healthz must carry; None: none is asked for.
        max_body_bytes: a larger request is refused with 413.
        max_tokens: tokens that one request may ask for; default_tokens: what it gets at most if it does not say.
        most_prompts: prompts of one /v1/completions request.
        timeout: seconds after which a request ends with finish_reason "timeout"; None: never.
    """

    base_model: str = "base"
    token: Optional[str] = None
    max_body_bytes: int = 1 << 20
    max_tokens: int = 4096
    default_tokens: int = 128
    most_prompts: int = 16
    timeout: Optional[float] = 600.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_tokens", "default_tokens", "most_prompts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a whole number >= 1")
        if not isinstance(self.base_model, str) or not self.base_model:
            raise ConfigError(f"base_model={self.base_model!r} is not a name")
        if self.token is not None and (not self.token or not self.token.isascii() or self.token != self.token.strip()):
            raise ConfigError("the token must be ASCII text without blanks at its ends")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout={self.timeout!r} is not a number of seconds > 0")
