"""Which side records a request to the engine: the first process of ours that sees it.

An API server, a gRPC server or an offline `LLM` of ours claims each request that it sends to an engine core, and the
engine core records what nobody has claimed: requests of the Rust frontend, and of frontends on other machines that are
not instrumented. So nothing is recorded twice, wherever the two sides run, and nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

__all__ = ["asks_for_itself", "claim", "frontend_is_elsewhere", "is_claimed", "uses_rust_frontend"]

# In the parameters' `extra_args`, which vLLM hands to an engine as they are and sends back to nobody. Clients can send
# some too, but of JSON no bytes are made: none can say that its request is recorded already.
_CLAIM = "agentlightning"


def claim(request: Any, **changes: Any) -> None:
    """Claim vLLM's `EngineCoreRequest`, before it is sent.

    Args:
        request: gets parameters of its own. Those that it has may be shared: by the requests that vLLM makes of one
            with n > 1, and by what is recorded, which is to have them as the client made them.
        changes: what else of the parameters is to be another for the engine.
    """
    params = copy(request.sampling_params)
    params.extra_args = {**(params.extra_args or {}), _CLAIM: ",".join(changes).encode()}
    for name, value in changes.items():
        setattr(params, name, value)
    request.sampling_params = params


def is_claimed(sampling_params: Any) -> bool:
    """Whether somebody of ours has sent a request with these parameters."""
    return isinstance((sampling_params.extra_args or {}).get(_CLAIM), bytes)


def asks_for_itself(sampling_params: Any) -> bool:
    """Whether what these parameters ask for is wanted by the recording alone, of whoever has claimed the request."""
    return bool(sampling_params.extra_args[_CLAIM])


def uses_rust_frontend() -> bool:
    """Whether vLLM is told to answer without Python."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def frontend_is_elsewhere(arguments: Sequence[str]) -> bool:
    """Whether a server with these arguments has engine cores alone in Python, so that they may have to record."""
    return uses_rust_frontend() or "--headless" in arguments
