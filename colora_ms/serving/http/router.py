"""One address before several servers: a request goes where its adapter is.

A stock proxy sees headers and paths, but which adapter a request names stands in its body; hence this small one. Every
server would load every adapter; here each adapter has its server, so that slots, host memory and shared beginnings
serve longer. Names are spread by rendezvous hashing (Thaler and Ravishankar, 1998): when a server goes or comes, only
its names move. A server that has much more to do than the others passes a request on to the next one of its name
(bounded loads, arXiv 1608.01350), which also spreads the base model's requests.

Answers pass through as they come. What changes adapters goes to all servers.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from colora_ms.errors import ConfigError

_log = logging.getLogger(__name__)

#: Seconds for which a server that could not be reached is passed over.
PAUSE = 2.0
#: A server takes at most this share of the mean of requests that are being answered, and one more.
MOST_OF_MEAN = 1.25
#: Paths that change adapters, and so go to all servers.
_FOR_ALL = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
#: Of one connection, not of the request.
_OWN_HEADERS = ("host", "content-length", "connection", "transfer-encoding", "keep-alive", "te", "upgrade", "date",
                "server")


@dataclass
class Backend:
    """One server: its address, how many requests it is answering, and until when it is passed over."""

    url: str
    busy: int = 0
    paused_until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme != "http" or not parts.hostname or port == -1 or parts.path not in ("", "/"):
            raise ConfigError(f"backend {self.url!r} is no address such as http://127.0.0.1:8001")
        self.host, self.port = parts.hostname, port or 80

    @property
    def up(self) -> bool:
        """Whether it is to be asked."""
        return time.monotonic() >= self.paused_until

    def ask(self, method: str, path: str, headers: Dict[str, str], body: bytes, timeout: float
            ) -> Tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request and read the head of its answer.

        Raises:
            OSError, http.client.HTTPException: it cannot be reached.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def count(self, change: int) -> None:
        """Note that a request begins (1) or has ended (-1)."""
        with self.lock:
            self.busy += change

    def pause(self) -> None:
        """Pass it over for a while."""
        self.paused_until = time.monotonic() + PAUSE


def order(backends: Sequence[Backend], name: str) -> List[Backend]:
    """The servers in the order in which a name is to be tried.

    Args:
        name: of the adapter or model that a request asks for; "" for none.
    """
    def place(backend: Backend) -> bytes:
        return hashlib.sha256(f"{name}\0{backend.url}".encode()).digest()

    ranked = sorted(backends, key=place, reverse=True)
    up = [one for one in ranked if one.up]
    most = MOST_OF_MEAN * (sum(one.busy for one in up) + 1) / max(len(up), 1)
    free = [one for one in up if one.busy < most]
    return [*free, *(one for one in up if one not in free), *(one for one in ranked if not one.up)]


def named(body: bytes) -> str:
    """The model that a request's body names; "" where it names none."""
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    name = value.get("model") if isinstance(value, dict) else None
    return name if isinstance(name, str) else ""


def create_router(urls: Sequence[str], max_body_bytes: int = 1 << 20, timeout: float = 600.0) -> FastAPI:
    """The application.

    Args:
        urls: the servers' addresses, ``http://HOST:PORT``.
        max_body_bytes: larger requests are refused with 413.
        timeout: seconds without a byte after which a server's answer is given up.

    Raises:
        ConfigError: an address cannot be used, stands there twice, or there is none.
    """
    if not urls or len(set(urls)) != len(urls):
        raise ConfigError(f"backends {list(urls)}: expected at least one address, each once")
    backends = [Backend(url) for url in urls]
    app = FastAPI(title="colora-ms route", openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        states = await run_in_threadpool(lambda: {one.url: _healthy(one) for one in backends})
        return JSONResponse({"status": "ok" if any(states.values()) else "no server", "servers": states},
                            200 if any(states.values()) else 503)

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def route(path: str, request: HttpRequest) -> Response:
        body = await _limited(request, max_body_bytes)
        if body is None:
            return _problem(413, f"the body has more than {max_body_bytes} bytes")
        target = f"/{path}" + (f"?{request.url.query}" if request.url.query else "")
        headers = {name: value for name, value in request.headers.items() if name not in _OWN_HEADERS}
        asked = request.method, target, headers, body
        if request.method != "GET" and f"/{path}".startswith(_FOR_ALL):
            return await run_in_threadpool(_to_all, backends, asked, timeout)
        if f"/{path}" == "/metrics":
            return _problem(404, "each server has metrics of its own; ask it")
        return await run_in_threadpool(_to_one, order(backends, named(body)), asked, timeout)

    return app


async def _limited(request: HttpRequest, most: int) -> Optional[bytes]:
    """The body, None if it is too large."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            return None
    return body


def _healthy(backend: Backend) -> bool:
    try:
        connection, answer = backend.ask("GET", "/health", {}, b"", 5.0)
    except (OSError, http.client.HTTPException):
        return False
    connection.close()
    return answer.status == 200


def _to_one(backends: Sequence[Backend], asked: Tuple[str, str, Dict[str, str], bytes], timeout: float) -> Response:
    """The answer of the first server that can be reached. One that has begun to answer is not replaced."""
    for backend in backends:
        backend.count(1)
        try:
            connection, answer = backend.ask(*asked, timeout)
        except (OSError, http.client.HTTPException) as error:
            backend.count(-1)
            backend.pause()
            _log.warning("%s cannot be reached: %s", backend.url, error)
            if isinstance(error, TimeoutError):  # it may be computing: a second one would compute the same again
                return _problem(504, f"no byte of an answer came within {timeout:g} s")
            continue
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN_HEADERS}
        return StreamingResponse(_pieces(backend, connection, answer), answer.status, headers)
    return _problem(503, "none of the servers can be reached")


def _pieces(backend: Backend, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse
            ) -> Iterator[bytes]:
    """An answer's bytes as they come; where the client leaves, the server notices it by the closed connection."""
    try:
        while piece := answer.read1(1 << 16):
            yield piece
    finally:
        connection.close()
        backend.count(-1)


def _to_all(backends: Sequence[Backend], asked: Tuple[str, str, Dict[str, str], bytes], timeout: float) -> Response:
    """Ask every server; the first answer that is no success, else the last one."""
    found: Optional[Response] = None
    for backend in backends:
        try:
            connection, answer = backend.ask(*asked, timeout)
            text = answer.read()
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            backend.pause()
            return _problem(503, f"{backend.url} cannot be reached ({error}); the servers before it did what was asked")
        found = Response(text, answer.status, media_type=answer.getheader("content-type"))
        if answer.status >= 400:
            return found
    assert found is not None
    return found


def _problem(status: int, message: str) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
