"""The status of a running server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from agentlightning.doctor import Finding, Mark, Unreachable
from agentlightning.doctor.patches import patch_findings, release_findings
from agentlightning.instrumentation.vllm._status import STATUS_ROUTE

__all__ = ["BEHIND_ROUTER", "base_of", "bearer", "findings", "read"]

SECONDS = 30
REPORTED = (
    "agentlightning",
    "vllm",
    "python",
    "pid",
    "api_servers",
    "switches",
    "patches",
    "counters",
    "limits",
    "recording",
    "continuation",
    "sampling",
)

BEHIND_ROUTER = (
    Finding(
        "server",
        Mark.NOTE,
        f"instrumented, and behind a router that does not let {STATUS_ROUTE} through",
        "ask each server behind it for more",
    ),
)
"""Findings on a server whose status cannot be read, though it answers as an instrumented one."""


def base_of(url: str) -> str:
    """Return the address of a server: what stands before `/v1` in `[http://]host:port`, with or without `/v1`."""
    server = url.rstrip("/").removesuffix("/v1")
    return server if "://" in server else f"http://{server}"


def bearer(api_key: str | None) -> dict[str, str]:
    """Return the headers of a request with this API key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def read(url: str, api_key: str | None) -> dict[str, Any]:
    """Fetch the status of the server at `url`: `[http://]host:port`, with or without `/v1`.

    Raises:
        Unreachable: there is no server at `url`, or it has no status.
    """
    address = f"{base_of(url)}{STATUS_ROUTE}"
    try:
        request = urllib.request.Request(address, headers=bearer(api_key))
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        raise Unreachable(*_refused(address, error.code)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(
            f"{address} does not answer: {reason}", "is the server up, and is this its address?"
        ) from error
    try:
        status = json.loads(body)
    except ValueError:
        status = None
    if not _is_status(status):
        advice = "is this the address of a vLLM server, with the same version of agentlightning as here?"
        raise Unreachable(f"{address} answers with something other than a status", advice)
    return status


def _is_status(answer: Any) -> TypeGuard[dict[str, Any]]:
    """Tell whether the answer has the expected shape; that of another version may not."""
    if not isinstance(answer, dict) or not all(key in answer for key in REPORTED):
        return False
    mappings = (answer["switches"], answer["patches"], answer["counters"])
    return (
        isinstance(answer["api_servers"], int)
        and all(isinstance(mapping, dict) for mapping in mappings)
        and all(isinstance(patch, dict) and patch.keys() >= {"state", "reason"} for patch in answer["patches"].values())
        and isinstance(answer["counters"].get("failures"), dict)
        and isinstance(answer["limits"], list)
        and isinstance(answer["recording"], dict | None)
        and isinstance(answer["continuation"], dict | None)
        and isinstance(answer["sampling"], dict | None)
    )


def _refused(address: str, code: int) -> tuple[str, str]:
    if code in (401, 403):
        return f"{address} needs the server's API key", "pass --api-key KEY, or set VLLM_API_KEY"
    if code == 404:
        rust = "vLLM's Rust frontend that answers, with token ids only where a request asks for them"
        records = "`agl doctor --store` shows what its engine cores record"
        return (
            f"{address} does not exist: this server is not instrumented, or it is {rust}: {records}",
            "set AGL_INSTRUMENT=1 in the environment of the server, and run `agl doctor` where it runs",
        )
    return f"{address} answers with HTTP {code}", "see the server's log"


def findings(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Explain the status of a server."""
    process = f"process {status['pid']}"
    if status["api_servers"] > 1:
        process += f", one of {status['api_servers']} API servers (each answers for itself: ask again for another)"
    versions = f"agentlightning {status['agentlightning']}, Python {status['python']}"
    yield Finding("vLLM", Mark.OK, f"{status['vllm']}, {versions}; {process}")
    switches = ", ".join(f"{name}={value}" for name, value in status["switches"].items())
    # A note: it was set on purpose, but explains answers without ids.
    silent = status["switches"].get("AGL_RETURN_TOKEN_IDS") == "none"
    yield Finding("switches", Mark.NOTE if silent else Mark.OK, switches)
    yield from release_findings(status["vllm"], status["patches"])
    yield from patch_findings(status["patches"])
    for limit in status["limits"]:
        yield Finding("engine", Mark.NOTE, limit)
    if status["recording"] is not None:
        yield from _recording(status["recording"])
    if status["continuation"] is not None:
        yield _continuation(status["continuation"])
    if status["sampling"] is not None:
        yield _sampling(status["sampling"])
    for kind, count in status["counters"]["failures"].items():
        yield Finding(
            "failures",
            Mark.PROBLEM,
            f"{count} times an answer went out as vLLM made it, after an error of ours: {kind}",
            "the server's log has the traceback of the first; please report it",
        )


def _continuation(continuation: Mapping[str, Any]) -> Finding:
    results = ", ".join(f"{count} {result}" for result, count in continuation["results"].items() if count)
    kept = f"{continuation['calls']} calls kept in {continuation['bytes']} bytes, {continuation['dropped']} dropped"
    return Finding("continuation", Mark.OK, f"chat prompts of rollouts: {results or 'none so far'}; {kept}")


def _sampling(sampling: Mapping[str, Any]) -> Finding:
    pinned = {
        "report": "nothing is pinned",
        "rollout": "pinned to what rollouts name",
        "pin": f"pinned to {sampling['pins']}",
    }[sampling["mode"]]
    differing = ", ".join(f"{count} by {name}" for name, count in sampling["differing"].items())
    return Finding("sampling", Mark.OK, f"{pinned}; calls that asked for something else: {differing or 'none so far'}")


def _recording(recording: Mapping[str, Any]) -> Iterator[Finding]:
    kept = (
        f"this API server has recorded {recording['generations']} generations in {recording['store']}, "
        f"{recording['queue_bytes']} bytes wait for it"
    )
    if recording["trouble"] is None:
        yield Finding("store", Mark.OK, kept)
    else:
        advice = (
            "make the store writable again; waiting generations are written then, and those that find no room are lost"
        )
        yield Finding("store", Mark.PROBLEM, f"{kept}: {recording['trouble']}", advice)
    lost = {reason: count for reason, count in recording["lost"].items() if count}
    if lost:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in lost.items())
        advice = "the server's log says why; `agl doctor --store` shows what was lost, and when"
        yield Finding("store", Mark.PROBLEM, f"generations lost: {reasons}", advice)
