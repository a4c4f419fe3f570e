"""What `agl store` and `agl agentops` have in common: one application, which listens, and its options."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import agentlightning
from agentlightning import settings
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.store import open_database

__all__ = ["AGENTOPS_PACKAGES", "PACKAGES", "Serving", "add_options", "key_of", "serve"]

SECONDS_TO_DRAIN = 10
SECONDS_TO_SWITCH = 0.0005
DEFAULT_STORE = "agl-store.db"
PACKAGES = (
    "fastapi",
    "httptools",
    "jinja2",
    "msgspec",
    "opentelemetry-proto",
    "prometheus-client",
    "uvicorn",
    "uvloop",
)
"""What the extra `store` installs. Not by its own name: an index may have another package of ours."""
AGENTOPS_PACKAGES = (*PACKAGES, "pyjwt")
"""What the extra `agentops` installs."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that listens.

    Attributes:
        url: without a slash at its end.
        place: of the store, as it may be shown.
        key: what it asks for; None for nothing.
    """

    url: str
    place: str
    key: str | None

    @property
    def announcement(self) -> str:
        asks = "asks for a key" if self.key else "asks for no key"
        return f"{self.place} is served at {self.url} and {asks}"


def add_options(parser: argparse.ArgumentParser, port: int) -> None:
    """Those of a server.

    Args:
        port: where it listens if nothing is said.
    """
    store = settings.read("AGL_STORE") or DEFAULT_STORE
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=port, help="0 is any that is free (default: %(default)s)")
    parser.add_argument("--store", metavar="URL", default=store, help=f"AGL_STORE, or {DEFAULT_STORE}, if not given")
    parser.add_argument("--api-key", metavar="KEY", help="ask for this key; AGL_STORE_KEY if not given")
    parser.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="let pages of this origin ask, * is any; may be repeated",
    )
    parser.add_argument(
        "--log-level",
        type=str.lower,
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="how much is logged; debug has a line for every request (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body-mb", metavar="N", type=_megabytes, default=64, help="largest body, in MiB (default: %(default)s)"
    )
    parser.add_argument("--insecure", action="store_true", help="listen for other machines without a key")
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")


def key_of(parser: argparse.ArgumentParser, options: Any) -> str | None:
    """What to ask for; ends the program where that is nothing, and others could reach it."""
    key = options.api_key or settings.store_key()
    if key is None and not options.insecure and not is_loopback(options.host):
        parser.error(
            f"{options.host} can be reached from other machines: give --api-key (or AGL_STORE_KEY), or --insecure "
            "where the network lets nobody else in"
        )
    return key


def serve(
    prog: str, options: Any, key: str | None, *, agentops: bool, is_up: Callable[[Serving], None] = lambda _: None
) -> int:
    """Serve until a signal ends it; returns the exit status, after saying what is in the way if something is.

    Args:
        options: those of `add_options`.
        agentops: have what the AgentOps SDK calls, too.
        is_up: called when it answers.
    """
    packages = AGENTOPS_PACKAGES if agentops else PACKAGES
    try:
        return _serve(prog, options, key, agentops, is_up)
    except ImportError as error:
        install = f"{sys.executable} -m pip install {' '.join(packages)}"
        sys.stderr.write(f"{prog}: needs more than is installed ({error.name}): {install}\n")
    except (StoreRefused, StoreUnavailable) as reason:
        sys.stderr.write(f"{prog}: {reason}\n")
    except OSError as error:
        sys.stderr.write(f"{prog}: cannot listen on {options.host}:{options.port}: {error.strerror or error}\n")
    return 1


def is_loopback(host: str) -> bool:
    """Whether a host is this machine to itself, which nobody else reaches by it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port, from 0 to 65535")


def _megabytes(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= 4096:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 4096")


def _serve(prog: str, options: Any, key: str | None, agentops: bool, is_up: Callable[[Serving], None]) -> int:
    import uvicorn

    from agentlightning.server import create_app
    from agentlightning.server.connections import ClientConnection, raise_file_limit

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                is_up(serving)

    # The thread that writes gives the interpreter up for each statement, and waits so long to have it back.
    sys.setswitchinterval(SECONDS_TO_SWITCH)
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    ClientConnection.limit = raise_file_limit()
    database = open_database(options.store)
    listening = _listen(options.host, options.port)
    server: Server
    app = create_app(
        database,
        key=key,
        cors_origins=options.cors_origin,
        # Without a key, what keeps pages out whose host is made to mean this machine is that it is no name of it.
        is_own_name=is_loopback if key is None and is_loopback(options.host) else None,
        body_limit=options.max_body_mb << 20,
        agentops=agentops,
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
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        # That is no address that anybody could ask.
        host = socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    serving = Serving(f"http://{host}:{port}", settings.without_secrets(options.store), key)
    sys.stderr.write(f"{prog}: {serving.announcement}\n")
    # What has been imported stays: to look through it for garbage, again and again, takes a tenth of a second.
    gc.collect()
    gc.freeze()
    server.run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
