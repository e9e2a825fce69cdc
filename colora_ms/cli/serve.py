"""``colora-ms serve``: the engine behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from colora_ms.cli import options

#: Environment variable of the bearer token.
TOKEN = "COLORA_API_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the parser the command\'s options."""
    options.add_model(parser)
    options.add_engine(parser)
    parser.add_argument("--name", default=None, help="the base model's name in requests; none: its folder's or file's "
                                                     "name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--token-file", default=None,
                        help=f"file with the bearer token that requests must carry; none: {TOKEN} "
                             "from the environment, and without it no token is asked for")
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch; a contrastive request takes two")
    parser.add_argument("--chunk", type=int, default=8, help="steps between which requests join and leave")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait; more are refused with 429")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens that one request may ask for")
    parser.add_argument("--default-tokens", type=int, default=128, help="tokens of a request that does not say")
    parser.add_argument("--max-body-bytes", type=int, default=1 << 20, help="larger requests are refused with 413")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a request is ended")
    parser.add_argument("--tensor-parallel", action="store_true",
                        help="split the model over the workers of a job: bash scripts/msrun_serve.sh -n 2 ...")
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN",
                        help="let pages of this origin call the server from a browser; may be given more than once; "
                             "*: any")
    parser.add_argument("--tool-calls", default="auto", choices=("auto", "hermes", "llama3", "mistral"),
                        help="form in which the model writes calls of tools; auto: the one of its chat template")
    parser.add_argument("--allow-adapters-from", action="append", default=[], metavar="FOLDER",
                        help="further folder from which /v1/load_lora_adapter may load; may be given more than once")
    parser.add_argument("--mixes", default=None, metavar="FOLDER",
                        help="folder of mixes, NAME.yaml each, that requests may ask for by name")
    parser.add_argument("--no-warm-up", action="store_true", help="compile each graph when a request first needs it")
    parser.add_argument("--log-level", default="warning", choices=("error", "warning", "info", "debug"),
                        help="info logs every request")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from colora_ms.distributed import workers
    from colora_ms.serving.http import Server, Settings, create_app

    settings = dict(token=_token(arguments), max_body_bytes=arguments.max_body_bytes, max_tokens=arguments.max_tokens,
                    default_tokens=arguments.default_tokens, timeout=arguments.timeout, cors=tuple(arguments.cors),
                    tool_calls=arguments.tool_calls, adapter_roots=tuple(arguments.allow_adapters_from),
                    mixes=arguments.mixes)
    Settings(**settings)  # its errors come before the model is loaded
    team = workers.start() if arguments.tensor_parallel else workers.Workers()
    if arguments.tensor_parallel and team.world == 1:
        print("colora-ms serve: --tensor-parallel needs several workers; start them with "
              "bash scripts/msrun_serve.sh -n 2 ...", file=sys.stderr)
        return 2
    engine, name = options.engine(arguments, arguments.rows, team, chunk=arguments.chunk, queue=arguments.queue)
    with engine:
        app = create_app(engine, Settings(base_model=arguments.name or name, **settings))
        server = Server(app, arguments.host, arguments.port, arguments.log_level)
        if settings["token"] is None and arguments.host not in ("127.0.0.1", "::1", "localhost"):
            print(f"colora-ms serve: whoever reaches {arguments.host} can use this server; set {TOKEN} to ask for a "
                  "token",
                  file=sys.stderr)
        if not arguments.no_warm_up:
            print("compiling graphs ...", flush=True)
            engine.warm_up()
        adapters = 0 if engine.bank is None else len(engine.bank.names())
        print(f"serving {arguments.name or name} and {adapters} adapters on {server.url}", flush=True)
        server.run()
    return 0


def _token(arguments: argparse.Namespace) -> str | None:
    if arguments.token_file is None:
        return os.environ.get(TOKEN) or None
    from colora_ms.errors import ConfigError

    try:
        return Path(arguments.token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {arguments.token_file} cannot be read: {error}") from None
