"""`agl store`: a LightningStore over HTTP, in a SQLite file or in PostgreSQL."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from agentlightning.cli.arguments import Parser
from agentlightning.cli.serving import add_options, key_of, serve

DESCRIPTION = """\
Serve a store of rollouts, spans, resources, workers and generations over HTTP: the LightningStore interface of Agent
Lightning 0.3 under /v1/agl, OpenTelemetry's at /v1/traces, a page for a browser at /, and a description of all routes
at /openapi.json."""
EPILOG = """\
Clients send the key as `Authorization: Bearer KEY`, or in the URL: http://agl:KEY@HOST:4747. Other users of this
machine can see --api-key in the list of processes, but not AGL_STORE_KEY. On SIGTERM it finishes open requests, for at
most ten seconds, and exits."""

INSTEAD = {
    "--backend": "use --store agl-store.db, or --store postgresql://…",
    "--mongo-uri": "MongoDB is not supported: use --store agl-store.db, or --store postgresql://…",
    "--tracker": "metrics are always on, at /metrics",
    "--n-workers": "one process is enough; if you need more, start each with a --port of its own on the same store",
}
"""Options of `agl store` in Agent Lightning 0.3, and what to use instead."""


def main(arguments: Sequence[str]) -> int:
    """Run `agl store` and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return serve(parser.prog, options, key_of(parser, options), agentops=options.agentops)


def _parser() -> Parser:
    parser = Parser(prog="agl store", description=DESCRIPTION, epilog=EPILOG)
    add_options(parser, 4747)
    parser.add_argument("--agentops", action="store_true", help="also serve the AgentOps SDK's routes")
    for name, instead in INSTEAD.items():
        parser.add_argument(name, nargs="*", action=_Instead, help=argparse.SUPPRESS, const=instead)
    return parser


class _Instead(argparse.Action):
    """Refuse an option of Agent Lightning 0.3, and name what replaces it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error(f"{self.option_strings[0]} is an option of Agent Lightning 0.3; {self.const}")
