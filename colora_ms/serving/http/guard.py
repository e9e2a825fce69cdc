"""What every request passes first: the bearer token, the limit of its body, and the count of its response."""

from __future__ import annotations

import hmac
from typing import Any, Awaitable, Callable, Dict, Optional

from fastapi import HTTPException

from colora_ms.serving.http.failures import RequestError, respond
from colora_ms.serving.http.metrics import Metrics
from colora_ms.serving.http.settings import Settings

#: The only paths that need no token: a load balancer's probe has none.
OPEN_PATHS = ("/healthz", "/health")


class Guard:
    """ASGI middleware.

    Args:
        app: the ASGI application behind it.
        settings: :class:`colora_ms.serving.http.settings.Settings`.
        metrics: :class:`colora_ms.serving.http.metrics.Metrics`.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse the request, or pass it on with a limited body and a counted response."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                # The route's pattern: names in paths would make a series each.
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.responses.labels(scope["method"], route, message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        error = self._refusal(scope["path"], headers)
        if error is not None:
            return await respond(error)(scope, receive, counted)
        return await self.app(scope, self._limited(receive), counted)

    def _refusal(self, path: str, headers: Dict[bytes, bytes]) -> Optional[RequestError]:
        if self.settings.token is not None and path not in OPEN_PATHS:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            fits = hmac.compare_digest(given.strip(), self.settings.token.encode())
            if kind.lower() != b"bearer" or not fits:
                return RequestError("a valid token is needed: send the header \"Authorization: Bearer TOKEN\" "
                                    "(the openai client: api_key=TOKEN)", code="invalid_api_key", status=401)
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size[:20]) > self.settings.max_body_bytes:
            return RequestError(self._too_large(), status=413)
        return None

    def _too_large(self) -> str:
        return f"the body has more than {self.settings.max_body_bytes} bytes, which is all that this server takes"

    def _limited(self, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        """``receive`` with a count, for bodies that do not say their length."""
        total = 0

        async def limited() -> Any:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.settings.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return limited
