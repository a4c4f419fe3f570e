"""`agl store`: a LightningStore over HTTP that keeps what it is given."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from typing import Any

import agentlightning
from agentlightning import settings
from agentlightning.store import StoreRefused, StoreUnavailable, open_database

DESCRIPTION = """\
Serve a store of rollouts, spans, resources, workers and generations over HTTP: the LightningStore interface of Agent
Lightning 0.3 under /v1/agl, and OpenTelemetry's at /v1/traces. The document of all routes is at /openapi.json.
"""
EPILOG = """\
The key is asked for as `Authorization: Bearer KEY`, or in the URL: http://agl:KEY@HOST:4747. Who can see the processes
of this machine can see --api-key; AGL_STORE_KEY is for its owner alone.

SIGTERM ends it when what it was asked is answered, in ten seconds at most."""

SECONDS_TO_DRAIN = 10
SECONDS_TO_SWITCH = 0.0005
DEFAULT_STORE = "agl-store.db"
PACKAGES = ("fastapi", "httptools", "msgspec", "opentelemetry-proto", "prometheus-client", "uvicorn", "uvloop")
"""What the extra `store` installs. Not by its own name: an index may have another package of ours."""
INSTEAD = {
    "--backend": "the store is a file, or what its URL says: use --store agl-store.db",
    "--mongo-uri": "there is no MongoDB here: use --store agl-store.db",
    "--tracker": "metrics are always on: read them at /metrics",
    "--n-workers": "one process is enough for one store; more of them may serve the same, each on a --port of its own",
}
"""Options of Agent Lightning 0.3's `agl store`, and what to use in their place."""


def main(arguments: Sequence[str]) -> int:
    """Run `agl store`; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    key = options.api_key or settings.store_key()
    if key is None and not options.insecure and not _is_loopback(options.host):
        parser.error(
            f"{options.host} can be reached from other machines: give --api-key (or AGL_STORE_KEY), or --insecure "
            "where the network lets nobody else in"
        )
    try:
        return _serve(options, key)
    except ImportError as error:
        install = f"{sys.executable} -m pip install {' '.join(PACKAGES)}"
        sys.stderr.write(f"agl store: needs more than is installed ({error.name}): {install}\n")
    except (StoreRefused, StoreUnavailable) as reason:
        sys.stderr.write(f"agl store: {reason}\n")
    except OSError as error:
        sys.stderr.write(f"agl store: cannot listen on {options.host}:{options.port}: {error.strerror or error}\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agl store", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    store = settings.read("AGL_STORE") or DEFAULT_STORE
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=4747, help="0 is any that is free (default: %(default)s)")
    parser.add_argument("--store", metavar="URL", default=store, help=f"AGL_STORE, or {DEFAULT_STORE}, if not given")
    parser.add_argument("--api-key", metavar="KEY", help="ask for this key; AGL_STORE_KEY if not given")
    parser.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="let pages of this origin ask, * is any; may be repeated",
    )
    parser.add_argument("--log-level", type=str.lower, choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument(
        "--max-body-mb", metavar="N", type=_megabytes, default=64, help="largest body, in MiB (default: %(default)s)"
    )
    parser.add_argument("--insecure", action="store_true", help="listen for other machines without a key")
    for name, instead in INSTEAD.items():
        parser.add_argument(name, nargs="*", action=_Instead, help=argparse.SUPPRESS, const=instead)
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")
    return parser


class _Instead(argparse.Action):
    """An option that is none here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error(f"{self.option_strings[0]} is of Agent Lightning 0.3; {self.const}")


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port, from 0 to 65535")


def _megabytes(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= 4096:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 4096")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _serve(options: Any, key: str | None) -> int:
    import uvicorn

    from agentlightning.server import create_app

    # The thread that writes gives the interpreter up for each statement, and waits so long to have it back.
    sys.setswitchinterval(SECONDS_TO_SWITCH)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    database = open_database(options.store)
    listening = _listen(options.host, options.port)
    server: uvicorn.Server
    app = create_app(
        database,
        key=key,
        cors_origins=options.cors_origin,
        body_limit=options.max_body_mb << 20,
        is_stopping=lambda: server.should_exit,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=options.log_level == "debug",
            timeout_graceful_shutdown=SECONDS_TO_DRAIN,
        )
    )
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    place = settings.without_secrets(options.store)
    asks = "asks for a key" if key else "asks for no key"
    sys.stderr.write(f"agl store: {place} is served at http://{host}:{port} and {asks}\n")
    server.run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
