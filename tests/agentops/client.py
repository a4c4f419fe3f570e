"""A client that sends what the AgentOps SDK sends, one request at a time."""

from __future__ import annotations

from typing import Any

import httpx

from tests.server.test_otlp import a_span


class SdkClient:
    """Log in with a key, and send with the token."""

    def __init__(self, client: httpx.Client, key: str = "any") -> None:
        self.http = client
        login = client.post("/v3/auth/token", json={"api_key": key})
        assert login.status_code == 200, login.text
        self.token: str = login.json()["token"]
        self.project_id: str = login.json()["project_id"]
        self.headers = {"Authorization": f"Bearer {self.token}"}

    def send(self, *spans: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Send spans in one batch, as the SDK's exporter does."""
        resource = {"attributes": [{"key": "agentops.project.id", "value": {"stringValue": "temporary"}}]}
        body = {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": spans}]}]}
        answer = self.http.post("/v1/traces", json=body, headers={**self.headers, **(headers or {})})
        assert answer.status_code == 200, answer.text

    def session(self, trace_id: str, *attributes: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """Make the root span of a session."""
        return a_span(traceId=trace_id, **{"name": "default.session", "attributes": list(attributes), **fields})

    def rollout(self, rollout_id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/agl/rollouts/{rollout_id}").json()

    def place(self, trace_id: str) -> tuple[str, str]:
        """Return the rollout and the attempt of all spans of a trace."""
        found = self.http.get("/v1/agl/spans", params={"trace_id": trace_id}).json()["items"]
        [place] = {(each["rollout_id"], each["attempt_id"]) for each in found}
        return place
