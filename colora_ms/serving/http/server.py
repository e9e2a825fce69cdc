"""The server process around the application: uvicorn, in this thread or in one of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from typing import Any, Iterator, Optional

import uvicorn

from colora_ms.errors import ServingError

#: Connections that may wait to be taken.
BACKLOG = 2048


class _Uvicorn(uvicorn.Server):
    """uvicorn whose signals end it and nothing else: its own form raises them again when it has ended, which would take
    the process down before the engine is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Server:
    """Serves an application on one address.

    Args:
        app: the ASGI application.
        host: address to listen on; the loopback address is reachable from this machine only.
        port: 0 takes a free one.
        log_level: uvicorn's: "critical", "error", "warning", "info", "debug".

    Raises:
        ServingError: the address cannot be taken.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0, log_level: str = "warning") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen(BACKLOG)  # who connects before the server runs waits, and is not refused
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise ServingError(f"cannot listen on {host}:{port}: {error}") from None
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level=log_level, access_log=log_level in ("info", "debug"), backlog=BACKLOG,
                                lifespan="off", timeout_graceful_shutdown=5, server_header=False)
        self._server = _Uvicorn(config)
        self._thread: Optional[threading.Thread] = None

    def run(self) -> None:
        """Serve until a signal (Ctrl-C, SIGTERM); answers that are being given have some seconds to end."""
        self._server.run([self._socket])

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self.run, name="colora-http", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def __exit__(self, *reason: Any) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
