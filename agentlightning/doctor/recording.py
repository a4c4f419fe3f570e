"""The store: whether a server can record there, the generations that it has, and why it has none for a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from agentlightning import settings
from agentlightning.doctor import Finding, Mark, Unreachable
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import Via
from agentlightning.recorder import QUEUE_FULL, STOPPED
from agentlightning.store import open_store, try_to_record
from agentlightning.store.absence import IS_IT_CALLED, NAME_IT, explain_absence

__all__ = ["destination", "findings", "read"]

ADVICE = {
    QUEUE_FULL: "give the store a faster disk, or the server a larger AGL_QUEUE_MB",
    STOPPED: "give the store a faster disk: it was behind when the server ended",
}
"""Advice for losses that are not bugs."""


UNNAMED: Mapping[Via | None, tuple[str, str]] = {
    "http": ("over HTTP", NAME_IT),
    "router": (
        "through a router or a proxy",
        "use a way to name it that arrives: `agl doctor --url http://ROUTER` tries each, docs/routers.md lists them",
    ),
    "process": (
        "from a program in vLLM's own process",
        "let the program name it with agl.rollout, as docs/in-process.md says, or ignore what is no agent's",
    ),
    "grpc": ("over gRPC", "make the request's id ROLLOUT, ROLLOUT.ATTEMPT, or agl/ROLLOUT/ATTEMPT/anything"),
    "engine": (
        "from a frontend that is not instrumented, such as vLLM's Rust frontend",
        "send X-Request-Id: ROLLOUT or ROLLOUT.ATTEMPT, which is all that reaches the engine core",
    ),
    None: ("in a way that an older version did not record", NAME_IT),
}
"""Ways that calls without a rollout came, each with what to do so that they have one."""

LATER = "look into the store's own log, and try again"
"""Advice for a store that answers, and says no more than that it cannot be used."""


def destination() -> Iterator[Finding]:
    """Check that a server could record where `AGL_STORE` says, as far as that needs no writing."""
    url = settings.read("AGL_STORE")
    if not url or settings.complaint("AGL_STORE"):
        return
    try:
        yield Finding("AGL_STORE", Mark.OK, try_to_record(url))
    except (StoreRefused, StoreUnavailable) as reason:
        yield Finding("AGL_STORE", Mark.PROBLEM, reason.happened, reason.advice or LATER)


def read(url: str, rollout_id: str | None) -> dict[str, Any]:
    """Count what the store at `url` has: generations by status, in all and for the rollout, and losses; with the
    status of the rollout in the queue.

    Raises:
        Unreachable: there is no store at `url`, or it cannot be read.
    """
    try:
        with open_store(url, read_only=True) as store:
            lost: dict[str, dict[str, int]] = {}
            for loss in store.losses():
                so_far = lost.setdefault(loss.reason.partition(":")[0], {"count": 0, "last_at": 0})
                so_far["count"] += loss.count
                so_far["last_at"] = max(so_far["last_at"], loss.last_at)
            report: dict[str, Any] = {
                "generations": store.tally(),
                "without_rollout": sum(store.tally(rollout_id=None).values()),
                "without_rollout_by_way": {
                    via or "unknown": count
                    for via in UNNAMED
                    if (count := sum(store.tally(rollout_id=None, via=via).values()))
                },
                "lost": lost,
            }
            if rollout_id is not None:
                report |= {
                    "rollout_id": rollout_id,
                    "of_rollout": store.tally(rollout_id=rollout_id),
                    "status": getattr(store.get_rollout_by_id(rollout_id), "status", None),
                }
            return report
    except (StoreRefused, StoreUnavailable) as reason:
        raise Unreachable(reason.happened, reason.advice or LATER) from reason


def findings(report: Mapping[str, Any]) -> Iterator[Finding]:
    """Explain the report of a store."""
    total = sum(report["generations"].values())
    if "rollout_id" in report:
        yield _of_rollout(report, total)
    if total:
        yield Finding("generations", Mark.OK, _counted(report["generations"]))
    elif not report["lost"]:
        yield Finding("generations", Mark.PROBLEM, "none: no server that records here was ever called", IS_IT_CALLED)
    for way, count in report["without_rollout_by_way"].items():
        how, advice = UNNAMED[None if way == "unknown" else way]
        every = "all of them" if count == total else f"{count} of them"
        yield Finding(
            "no rollout", Mark.NOTE, f"{every} belong to no rollout: their calls came {how}, and named none", advice
        )
    for reason, loss in report["lost"].items():
        when = datetime.fromtimestamp(loss["last_at"] / 1e9, timezone.utc).isoformat(" ", "seconds")
        text = f"{loss['count']} could not be kept, the last at {when}: {reason}"
        advice = ADVICE.get(reason, "the server's log has the error; please report it")
        yield Finding("lost", Mark.NOTE if total else Mark.PROBLEM, text, advice)


def _of_rollout(report: Mapping[str, Any], total: int) -> Finding:
    counts, subject = report["of_rollout"], "rollout"
    absence = explain_absence(
        counts,
        has_any=total > 0,
        has_unassigned_calls=report["without_rollout"] > 0,
        has_losses=bool(report["lost"]),
        status=report["status"],
    )
    if absence is None:
        return Finding(subject, Mark.OK, _counted(counts))
    return Finding(subject, Mark.PROBLEM, f"{report['rollout_id'][:100]!r}: {absence.reason}", absence.advice)


def _counted(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values())}: {', '.join(f'{count} {status}' for status, count in counts.items() if count)}"
