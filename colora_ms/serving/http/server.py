"""The server process around the application: uvicorn, in this thread or in one of its own."""

import socket
import threading

import uvicorn

from colora_ms.errors import ServingError


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

    def __init__(self, app, host="127.0.0.1", port=0, log_level="warning"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise ServingError(f"cannot listen on {host}:{port}: {error}") from None
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level=log_level, access_log=log_level in ("info", "debug"), backlog=2048,
                                lifespan="off", timeout_graceful_shutdown=5, server_header=False)
        self._server = uvicorn.Server(config)
        self._thread = None

    def run(self):
        """Serve until a signal (Ctrl-C, SIGTERM)."""
        self._server.run([self._socket])

    def __enter__(self):
        self._thread = threading.Thread(target=self.run, name="colora-http", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def __exit__(self, *reason):
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
