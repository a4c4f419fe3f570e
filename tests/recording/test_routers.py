"""Which carriers of a rollout arrive behind real routers, and what `agl doctor` says of them."""

from __future__ import annotations

from typing import Any

import pytest

from agentlightning.doctor import carriers
from agentlightning.instrumentation.vllm._carriers import CARRIERS, PROBE
from tests.common.debian import NGINX
from tests.common.routers import router
from tests.common.vllm import SCRIPTS
from tests.doctor.command import run
from tests.recording.server import RecordingServer
from tools.routers import PAGE, SHOWN, row

BY_NAME = [
    "vllm-router",
    "smg",
    pytest.param("LiteLLM", marks=pytest.mark.tier("all")),
    pytest.param("nginx", marks=pytest.mark.tier("all")),
]


def documented(name: str) -> dict[str, str]:
    """Return what the documentation says of a router, by carrier."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = next(at for at, cell in enumerate(cells[0]) if cell.split(" ")[0] == name)
    by_carrier = {line[0]: line[column] for line in cells if len(line) > column}
    return {carrier: by_carrier[SHOWN[carrier]] for carrier in CARRIERS}


@pytest.mark.takes_long("it may install the router")
@pytest.mark.parametrize("name", BY_NAME)
def test_carriers_arrive_behind_a_router_as_documented(two_api_servers: RecordingServer, name: str) -> None:
    if name == "nginx" and NGINX.find() is None:
        pytest.skip(NGINX.missing)
    server = two_api_servers
    with router(name, server.url, server.model) as url:
        found = carriers.read(url, None)
        said: Any = run(SCRIPTS / "agl", "doctor", "--url", url)

    assert {carrier: row(found, carrier) for carrier in CARRIERS} == documented(name)
    assert said.status == 0
    expected = ["ok rollouts every way to name one arrives, over chat/completions"]
    if name != "nginx":
        expected = [
            f"{carriers.SHOWN.get(carrier, carrier)} "
            f"{'does not arrive' if row(found, carrier) == '**none**' else 'arrives over'}"
            for carrier in CARRIERS
        ]
    assert [each for each in expected if each not in said.text] == []
    assert not [each for each in server.recorded() if str(each.rollout_id).startswith(PROBE)]


def test_every_carrier_arrives_without_a_router(two_api_servers: RecordingServer) -> None:
    assert carriers.read(two_api_servers.url, None) == {
        endpoint: [each for each in CARRIERS if (each, endpoint) != ("user", "messages")]
        for endpoint in carriers.ENDPOINTS
    }
