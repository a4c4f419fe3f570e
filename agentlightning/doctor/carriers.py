"""Find which carriers of a rollout's id arrive at a server, maybe through a router, by one call with each."""

from __future__ import annotations

import json
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import Any, NamedTuple

from agentlightning.doctor import Finding, Mark
from agentlightning.doctor.server import BEHIND_ROUTER, base_of, bearer
from agentlightning.instrumentation.vllm._carriers import CARRIER_HEADER, CARRIERS, PROBE, PROBE_PARAMS

__all__ = ["ENDPOINTS", "Arrived", "findings", "findings_with", "may_arrive", "read"]

SECONDS = 10
TALK = [{"role": "user", "content": "one"}]
ENDPOINTS: Mapping[str, Mapping[str, Any]] = {
    "chat/completions": {"messages": TALK, "max_tokens": 1},
    "completions": {"prompt": "one", "max_tokens": 1},
    "responses": {"input": "one", "max_output_tokens": 1},
    "messages": {"messages": TALK, "max_tokens": 1},
}
"""The endpoints by their paths below `/v1`, each with the shortest call of it."""
SHOWN = {
    "path": "http://HOST/rollout/ROLLOUT/v1",
    "user": "user of the body",
    "key": "KEY@rollout=ROLLOUT",
}
HOW_TO = "docs/routers.md has a carrier for each router"


class _Call(NamedTuple):
    """A call that names a rollout by one carrier: what stands before `/v1`, and what is added to headers and body."""

    prefix: str = ""
    headers: Mapping[str, str] = {}
    body: Mapping[str, str] = {}


Arrived = dict[str, list[str] | None]
"""The carriers that arrive, by endpoint; None for one that did not answer in time, after which no other was tried."""


def read(url: str, api_key: str | None) -> Arrived:
    """Make one call with each carrier to each endpoint, for one token each; they are not recorded.

    Returns:
        What arrives; empty where the server lists no model.
    """
    server = base_of(url)
    model = _model(server, api_key)
    if model is None:
        return {}
    found: Arrived = {}
    for endpoint in ENDPOINTS:
        try:
            found[endpoint] = [each for each in CARRIERS if _arrives(server, api_key, model, endpoint, each)]
        except TimeoutError:
            found[endpoint] = None
        if found[endpoint] is None or not any(found.values()):
            # Such as a busy server, or one without this package: it is not asked again in vain.
            break
    return found


def may_arrive(status: Mapping[str, Any]) -> bool:
    """Tell whether a server with this status records, and so looks for carriers.

    Args:
        status: empty where it cannot be read: a router may hide the status of the servers behind it.
    """
    return not status or status["recording"] is not None


def findings_with(status: Mapping[str, Any], of_status: Sequence[Finding], report: Arrived) -> list[Finding]:
    """Say what a server's status and the carriers that arrive there mean together.

    Args:
        status: empty where it cannot be read.
        of_status: what its status says, or that it cannot be read.
    """
    arrived = [*findings(report)]
    return [*(BEHIND_ROUTER if any(report.values()) and not status else of_status), *arrived]


def findings(report: Mapping[str, Sequence[str] | None]) -> Iterator[Finding]:
    """Say which carriers arrive: in one finding where all do, or else in one for each."""
    arrived = {endpoint: carriers for endpoint, carriers in report.items() if carriers is not None}
    for endpoint in report.keys() - arrived.keys():
        text = f"{endpoint} did not answer within {SECONDS} s: neither it nor what comes after it was tried"
        yield Finding("rollouts", Mark.NOTE, text, "ask again while the server is less busy")
    served = [endpoint for endpoint, carriers in arrived.items() if carriers]
    if not served:
        return
    # vLLM's messages have no `user`.
    lacks = {
        carrier: [each for each in served if carrier not in arrived[each] and (carrier, each) != ("user", "messages")]
        for carrier in CARRIERS
    }
    if not any(lacks.values()):
        yield Finding("rollouts", Mark.OK, f"every way to name one arrives, over {', '.join(served)}")
        return
    for carrier in CARRIERS:
        over = ", ".join(each for each in served if carrier in arrived[each])
        subject = SHOWN.get(carrier, carrier)
        if not over:
            yield Finding(subject, Mark.NOTE, "does not arrive: calls that it names have no rollout", HOW_TO)
        elif lacks[carrier]:
            yield Finding(subject, Mark.NOTE, f"arrives over {over}; not over {', '.join(lacks[carrier])}", HOW_TO)
        else:
            yield Finding(subject, Mark.OK, f"arrives over {over}")


def _model(server: str, api_key: str | None) -> str | None:
    try:
        request = urllib.request.Request(f"{server}/v1/models", headers=bearer(api_key))
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return None


def _arrives(server: str, api_key: str | None, model: str, endpoint: str, carrier: str) -> bool:
    """Tell whether a carrier arrives, which only a call that the server serves can show.

    Raises:
        TimeoutError: there was no answer in time.
    """
    rollout = f"{PROBE}{uuid.uuid4().hex}"
    call = _call(carrier, rollout, api_key)
    request = urllib.request.Request(
        f"{server}{call.prefix}/v1/{endpoint}",
        json.dumps({"model": model, **PROBE_PARAMS, **ENDPOINTS[endpoint], **call.body}).encode(),
        {"Content-Type": "application/json", **bearer(api_key), **call.headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            headers = answer.headers
    except TimeoutError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise TimeoutError from error
        return False
    # LiteLLM's proxy puts llm_provider- in front of it.
    return any(name.lower().endswith(CARRIER_HEADER) and value == carrier for name, value in headers.items())


def _call(carrier: str, rollout: str, api_key: str | None) -> _Call:
    """Name a rollout by a carrier."""
    text = f"agl/{rollout}/{uuid.uuid4().hex}"
    if carrier == "path":
        return _Call(prefix=f"/rollout/{rollout}")
    if carrier == "user":
        return _Call(body={"user": f"agl/{rollout}"})
    if carrier == "key":
        return _Call(headers={"Authorization": f"Bearer {api_key or 'none'}@rollout={rollout}"})
    values = {"x-agl-rollout-id": rollout, "baggage": f"agentlightning.rollout_id={rollout}"}
    return _Call(headers={carrier: values.get(carrier, text)})
