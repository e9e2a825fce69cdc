"""``colora-ms route``: one address before several ``colora-ms serve``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command's options."""
    parser.add_argument("--backend", action="append", required=True, metavar="URL",
                        help="a server, http://HOST:PORT; given once for each")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--max-body-bytes", type=int, default=1 << 20, help="larger requests are refused with 413")
    parser.add_argument("--timeout", type=float, default=600.0,
                        help="seconds without a byte after which a server's answer is given up")
    parser.add_argument("--log-level", default="warning", choices=("error", "warning", "info", "debug"),
                        help="info logs every request")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.serving.http.router import create_router
    from colora_ms.serving.http.server import Server

    app = create_router(arguments.backend, arguments.max_body_bytes, arguments.timeout)
    server = Server(app, arguments.host, arguments.port, arguments.log_level)
    print(f"routing to {', '.join(arguments.backend)} on {server.url}", flush=True)
    server.run()
    return 0
