"""Routers of vLLM servers, each in an environment of its own: their dependencies are not vLLM's.

`python -m tools.routers` tries them in front of a real server, and writes the table of `docs/routers.md`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from agentlightning.doctor import carriers
from agentlightning.instrumentation.vllm._carriers import CARRIERS
from tests.common.routers import ROUTERS, VERSIONS, keeps_ids, router
from tests.recording.server import RecordingServer
from tools.make_env import CHECKOUT

__all__ = ["PAGE", "row", "table"]

PAGE = CHECKOUT / "docs" / "routers.md"
BEGIN, END = "<!-- written by python -m tools.routers -->", "<!-- until here -->"
SHOWN = {
    "path": "prefix `/rollout/ROLLOUT`",
    "x-agl-rollout-id": "`x-agl-rollout-id`",
    "baggage": "`baggage`",
    "x-request-id": "`x-request-id`",
    "x-correlation-id": "`x-correlation-id`",
    "user": "`user` of the body",
    "key": "end of the API key",
}
IDS = "ids in the answer"
OVER = {"chat/completions": "chat", "completions": "completions", "responses": "Responses", "messages": "Messages"}


def row(arrived: carriers.Arrived, carrier: str) -> str:
    """Say over which endpoints a carrier arrives."""
    possible = [OVER[each] for each in OVER if (carrier, each) != ("user", "messages")]
    over = [OVER[endpoint] for endpoint, found in arrived.items() if carrier in (found or ())]
    return "all" if over == possible else ", ".join(over) or "**none**"


def table(found: Mapping[str, carriers.Arrived], kept: Mapping[str, str]) -> str:
    """Make the table of what arrives behind each router."""
    head = ["carrier", *(f"{name} {VERSIONS[name]}".strip() for name in found)]
    lines = [head, ["---"] * len(head)]
    lines += [[SHOWN[carrier], *(row(arrived, carrier) for arrived in found.values())] for carrier in CARRIERS]
    lines.append([IDS, *kept.values()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Try all routers, and write the page."""
    found: dict[str, carriers.Arrived] = {}
    kept: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, RecordingServer(Path(folder) / "store.db") as server:
        for name in ROUTERS:
            with router(name, [server.url], server.model) as url:
                found[name] = carriers.read(url, None)
                kept[name] = keeps_ids(url, server.model)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    tried = f"Tried on {time.strftime('%Y-%m-%d')} with vLLM {version('vllm')}, one server behind each."
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(found, kept)}\n{tried}\n\n{END}{after}")


if __name__ == "__main__":
    main()
