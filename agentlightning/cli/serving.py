"""The server behind `agl store` and `agl agentops`, and the options that both have."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import logging
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import agentlightning
from agentlightning import settings
from agentlightning.cli import interruption
from agentlightning.cli.arguments import Parser
from agentlightning.cli.listening import CannotListen, bound_socket, listen, url_of
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.store import open_database

__all__ = ["AGENTOPS_PACKAGES", "PACKAGES", "Serving", "add_options", "key_of", "serve"]

SECONDS_TO_DRAIN = 10
SECONDS_TO_SWITCH = 0.0005
DEFAULT_PORTS = {"http": 80, "https": 443}
ANY_KEY = "agl"
# A shell in which the variable is not set prints this message and sets nothing.
KEY = '"${AGL_STORE_KEY:?is the key of the store}"'
DEFAULT_STORE = "agl-store.db"
PACKAGES = (
    "fastapi",
    "httptools",
    "jinja2",
    "msgspec",
    "opentelemetry-proto",
    "prometheus-client",
    "urllib3",
    "uvicorn",
    "uvloop",
)
"""The packages of the extra `store`, and those that it needs of a plain installation.

Named one by one, since `agentlightning` on a package index is another project.
"""
AGENTOPS_PACKAGES = (*PACKAGES, "pyjwt")
"""The packages of the extra `agentops`."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that listens.

    Attributes:
        url: its address, without a slash at the end.
        place: the address of its store, without secrets.
        key: the key that clients must send; None if they need none.
    """

    url: str
    place: str
    key: str | None

    @property
    def announcement(self) -> str:
        asks = "asks for a key" if self.key else "asks for no key"
        return f"{self.place} is served at {self.url} and {asks}"

    @property
    def exports(self) -> str:
        """Lines to paste into a shell for the AgentOps SDK; never with the key, since logs and terminals are shared."""
        variables = {
            "AGENTOPS_API_KEY": ANY_KEY if self.key is None else KEY,
            "AGENTOPS_API_ENDPOINT": self.url,
            "AGENTOPS_EXPORTER_ENDPOINT": f"{self.url}/v1/traces",
            "AGENTOPS_APP_URL": self.url,
        }
        return "".join(f"export {name}={value}\n" for name, value in variables.items())


def add_options(parser: Parser, port: int) -> None:
    """Add the options of a server.

    Args:
        port: the default of `--port`.
    """
    store = settings.read("AGL_STORE") or DEFAULT_STORE
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=port, help="0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--store",
        metavar="URL",
        default=store,
        help=f"a file, or a postgresql:// URL (default: AGL_STORE, or {DEFAULT_STORE})",
    )
    parser.add_argument("--api-key", metavar="KEY", help="the key that clients must send (default: AGL_STORE_KEY)")
    parser.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        type=_origin,
        action="append",
        default=[],
        help="let web pages of this origin, such as https://app.example.org, use the server; * is any origin; may be "
        "repeated",
    )
    parser.add_argument(
        "--log-level",
        type=str.lower,
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="how much is logged; debug has a line for every request (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body-mb",
        metavar="N",
        type=_megabytes,
        default=64,
        help="the largest body, in MiB (default: %(default)s)",
    )
    parser.add_argument("--insecure", action="store_true", help="listen for other machines without a key")
    parser.add_argument(
        "--root-path",
        metavar="PATH",
        type=_root_path,
        default="",
        help="the path below which a proxy serves this, such as /agl; not needed if it sends X-Forwarded-Prefix",
    )
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")


def key_of(parser: Parser, options: Any) -> str | None:
    """Return the key that clients must send. End the program if there is none and other machines could connect."""
    key = options.api_key or settings.store_key()
    if key is None and not options.insecure and not is_loopback(options.host):
        parser.error(
            f"{options.host} can be reached from other machines: set --api-key (or AGL_STORE_KEY), or use --insecure "
            "in a network that only trusted machines can reach"
        )
    return key


def serve(
    prog: str, options: Any, key: str | None, *, agentops: bool, announce: Callable[[str], None] | None = None
) -> int:
    """Serve until a signal ends it, or print why that is impossible; return the exit status.

    Args:
        options: the values of `add_options`.
        agentops: also serve the AgentOps SDK's routes, and print the variables that the SDK needs.
        announce: prints them, once the server answers; None for stdout.
    """
    packages = AGENTOPS_PACKAGES if agentops else PACKAGES
    try:
        return _serve(prog, options, key, agentops, announce or _print)
    except ImportError as error:
        install = f"{sys.executable} -m pip install {' '.join(packages)}"
        sys.stderr.write(f"{prog}: a package is missing ({error.name}); install what the server needs: {install}\n")
    except (CannotListen, StoreRefused, StoreUnavailable) as reason:
        sys.stderr.write(f"{prog}: {reason}\n")
    return 1


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own, which no other machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port; ports go from 0 to 65535")


def _origin(text: str) -> str:
    if text == "*":
        return text
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts = host = port = None
    if parts is None or not parts.scheme or not host:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an origin; write it like https://app.example.org or http://localhost:3000, or * for any"
        )
    origin = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}"
    if port is not None and port != DEFAULT_PORTS.get(parts.scheme):
        origin += f":{port}"
    if text != origin:
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin as browsers send it; write it as {origin}")
    return text


def _megabytes(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= 4096:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 4096")


def _root_path(text: str) -> str:
    path = text.rstrip("/")
    if re.fullmatch(r"(?:/[A-Za-z0-9._~%-]+)*", path):
        return path
    raise argparse.ArgumentTypeError(f"{text!r} is not a path, such as /agl")


def _serve(prog: str, options: Any, key: str | None, agentops: bool, announce: Callable[[str], None]) -> int:
    import uvicorn

    from agentlightning.server import create_app
    from agentlightning.server.connections import ClientConnection, raise_file_limit

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                sys.stderr.write(f"{prog}: {serving.announcement}\n")
                if agentops:
                    announce(serving.exports)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if self.server_state.tasks:
                logging.info(
                    "finishing %d open requests, for at most %d s; a second Ctrl-C ends at once",
                    len(self.server_state.tasks),
                    SECONDS_TO_DRAIN,
                )
            await super().shutdown(sockets)

    # The writing thread releases the interpreter for each statement, and waits up to this long to get it back.
    sys.setswitchinterval(SECONDS_TO_SWITCH)
    _log_as(prog, options.log_level.upper())
    # First, so that nothing is created or migrated if the port is in use.
    listening = bound_socket(options.host, options.port)
    ClientConnection.limit = raise_file_limit()
    database = open_database(options.store)
    server: Server
    app = create_app(
        database,
        key=key,
        cors_origins=options.cors_origin,
        # Without a key, only the check of the Host header keeps out web pages whose own name resolves to this machine.
        is_own_name=is_loopback if key is None and is_loopback(options.host) else None,
        body_limit=options.max_body_mb << 20,
        agentops=agentops,
        root_path=options.root_path,
        is_stopping=lambda: server.should_exit,
    )
    server = Server(
        uvicorn.Config(
            app,
            http=ClientConnection,
            log_config=None,
            access_log=options.log_level == "debug",
            timeout_graceful_shutdown=SECONDS_TO_DRAIN,
        )
    )
    serving = Serving(url_of(listening), settings.without_secrets(options.store), key)
    listen(listening, options.host, options.port)
    # Imported modules stay for good: without this, each full collection would scan them, for a tenth of a second.
    gc.collect()
    gc.freeze()
    interruption.install(prog, "stopped")
    server.run(sockets=[listening])
    return 0


def _log_as(prog: str, level: str) -> None:
    """Give all log lines one format, with the name of the command."""
    logging.basicConfig(level=level, format=f"%(levelname)s {prog}: %(message)s")
    if level == "INFO":
        # Of the start and the end of its parts.
        logging.getLogger("uvicorn.error").setLevel("WARNING")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
