"""A trainer's weights for a vLLM that serves, by vLLM's own routes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import urllib3

from agentlightning.errors import WeightsRefused

__all__ = ["load_weights"]

SECONDS = 600
RESETS, RESET_DELAY = 20, 0.25


def load_weights(server: str, folder: str | Path, version: str) -> None:
    """Let vLLM load weights, forget what its prefix cache has of the old ones, and name the version in what it records.

    vLLM has these routes if it was started with `VLLM_SERVER_DEV_MODE=1`; 0.32 was tested. Call this while no agent
    runs, or answers are made of two versions of the weights (`mixed_weights`).

    Args:
        server: URL of the vLLM server, such as `http://localhost:8000`.
        folder: of a checkpoint in the format of transformers, on a disk that vLLM sees by the same path.
        version: an integer as text, if rows are to be chosen by `max_staleness`.

    Raises:
        WeightsRefused: vLLM cannot be reached, did not load them, or still has blocks of the old ones in its cache. It
            may serve the old weights or the new ones.
    """
    root = server.rstrip("/").removesuffix("/v1")
    weights = {"method": "reload_weights", "kwargs": {"weights_path": str(Path(folder).absolute())}}
    _post(root, "collective_rpc", weights)
    for _ in range(RESETS):
        # vLLM answers 200 with {"success": false} while a request or an offload holds blocks.
        if json.loads(_post(root, "reset_prefix_cache") or b"{}").get("success", True):
            break
        time.sleep(RESET_DELAY)
    else:
        raise WeightsRefused(
            f"vLLM at {root} has the new weights, but its prefix cache still has blocks of the old ones",
            "requests hold them: wait until all agents have ended, and load the weights again",
        )
    _post(root, "update_weight_version", {"new_version": version})


def _post(root: str, route: str, body: dict[str, Any] | None = None) -> bytes:
    client = urllib3.PoolManager(headers={"Content-Type": "application/json"}, timeout=SECONDS, retries=False)
    try:
        answer = client.request("POST", f"{root}/{route}", body=b"" if body is None else json.dumps(body).encode())
    except urllib3.exceptions.HTTPError as error:
        raise WeightsRefused(f"vLLM at {root} cannot be reached ({error})", "look at its log") from error
    if answer.status == 404:
        raise WeightsRefused(
            f"vLLM at {root} has no route /{route}", "start it with VLLM_SERVER_DEV_MODE=1; 0.32 has all of them"
        )
    if answer.status != 200:
        text = answer.data.decode(errors="replace")[:200]
        raise WeightsRefused(f"vLLM at {root} answered /{route} with {answer.status} ({text})", "look at its log")
    return answer.data
