"""`agl store`: a LightningStore over HTTP that keeps what it is given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from agentlightning.cli.serving import add_options, key_of, serve

DESCRIPTION = """\
Serve a store of rollouts, spans, resources, workers and generations over HTTP: the LightningStore interface of Agent
Lightning 0.3 under /v1/agl, and OpenTelemetry's at /v1/traces. A page to look at it all is at /, and
the document of all routes at /openapi.json.
"""
EPILOG = """\
The key is asked for as `Authorization: Bearer KEY`, or in the URL: http://agl:KEY@HOST:4747. Who can see the processes
of this machine can see --api-key; AGL_STORE_KEY is for its owner alone.

On SIGTERM it finishes open requests, for at most ten seconds, and exits."""

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
    return serve(parser.prog, options, key_of(parser, options), agentops=options.agentops)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agl store", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, 4747)
    parser.add_argument("--agentops", action="store_true", help="have what the AgentOps SDK calls, as agl agentops")
    for name, instead in INSTEAD.items():
        parser.add_argument(name, nargs="*", action=_Instead, help=argparse.SUPPRESS, const=instead)
    return parser


class _Instead(argparse.Action):
    """An option that is none here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error(f"{self.option_strings[0]} is of Agent Lightning 0.3; {self.const}")
