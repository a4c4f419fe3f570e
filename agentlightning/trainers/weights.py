"""A trainer's weights for a vLLM that serves, by vLLM's own routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import urllib3

from agentlightning.errors import WeightsRefused

__all__ = ["hand_over"]

SECONDS = 600


def hand_over(server: str, folder: str | Path, version: str) -> None:
    """Let vLLM load weights, forget what its prefix cache has of the old ones, and name the version in what it records.

    vLLM has these routes if it was started with `VLLM_SERVER_DEV_MODE=1`; 0.32 was tested. Call this while no agent
    runs, or answers are made of two versions of the weights (`mixed_weights`).

    Args:
        server: URL of the vLLM server, such as `http://localhost:8000`.
        folder: of a checkpoint in the format of transformers, on a disk that vLLM sees by the same path.
        version: an integer as text, if rows are to be chosen by `max_staleness`.

    Raises:
        WeightsRefused: vLLM cannot be reached or did not load them. It may serve the old weights or the new ones.
    """
    weights = {"method": "reload_weights", "kwargs": {"weights_path": str(Path(folder).absolute())}}
    steps: dict[str, Any] = {
        "collective_rpc": weights,
        "reset_prefix_cache": None,
        "update_weight_version": {"new_version": version},
    }
    root = server.rstrip("/").removesuffix("/v1")
    client = urllib3.PoolManager(headers={"Content-Type": "application/json"}, timeout=SECONDS, retries=False)
    for route, body in steps.items():
        try:
            answer = client.request("POST", f"{root}/{route}", body=b"" if body is None else json.dumps(body).encode())
        except urllib3.exceptions.HTTPError as error:
            raise WeightsRefused(f"vLLM at {root} cannot be reached ({error})", "look at its log") from error
        if answer.status == 404:
            raise WeightsRefused(
                f"vLLM at {root} has no route /{route}", "start it with VLLM_SERVER_DEV_MODE=1; 0.32 has all of them"
            )
        if answer.status != 200:
            said = answer.data.decode(errors="replace")[:200]
            raise WeightsRefused(f"vLLM at {root} answered /{route} with {answer.status} ({said})", "look at its log")
