"""vLLM's instrumentation: token ids in its answers, and a record of every generation. Importing this imports no vLLM.

The public verbs are here; the rest by folder and module:

- `_patches`: the table of patch sets; `_releases`: where each target lives in which release
- `_strict`, `_status`, `_shutdown`: before, while and after a server serves
- `_logging`: our log lines among vLLM's
- `_context`: the HTTP request that an engine request belongs to; `_isolation`: keeps our exceptions away from clients
- `endpoints`: ids in the answers; `capture`: what is recorded
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from agentlightning.instrumentation.vllm import _patches, _releases
from agentlightning.instrumentation.vllm._patches import PATCH_SETS, import_targets
from agentlightning.patching import Status

if TYPE_CHECKING:
    ChatCompletionResponsePatched: type[Any]

__all__ = [
    "PATCH_SETS",
    "ChatCompletionResponsePatched",
    "arm_vllm",
    "import_targets",
    "instrument_vllm",
    "status",
    "uninstrument_vllm",
]

logger = logging.getLogger("agentlightning")

_declined = False


def instrument_vllm() -> None:
    """Patch vLLM's serving modules, each when vLLM imports it, or now if vLLM has.

    Every answer then carries its token ids, as `AGL_RETURN_TOKEN_IDS` says, and with `AGL_STORE` every generation is
    recorded. Raises nothing: `status()` has the outcome. A second call only logs a warning.
    """
    global _declined
    _declined = False
    if not _patches.apply_all():
        logger.warning("agentlightning: vLLM is instrumented already")


def arm_vllm() -> None:
    """Do the same unless the program has called `uninstrument_vllm`, which has the last word; log no warning."""
    if not _declined:
        _patches.apply_all()


def uninstrument_vllm() -> None:
    """Remove every patch in this process, and patch no vLLM that it imports later; idempotent.

    Requests in flight are answered as they began, but are not recorded; the log says how many. `instrument_vllm`
    patches again.
    """
    global _declined
    _declined = True
    _patches.undo_all()


def status() -> dict[str, Status]:
    """Return each patch set's state by name; `pending` until vLLM imports the module that it patches."""
    return _patches.status()


def __getattr__(name: str) -> Any:
    if name == "ChatCompletionResponsePatched":
        return _chat_completion_response()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _chat_completion_response() -> type[Any]:
    """Return vLLM's own `ChatCompletionResponse`, which is extended in place; imports vLLM, instrumented or not."""
    modules = _releases.CHAT_PROTOCOL.modules
    return importlib.import_module(_patches.home(modules) or modules[0]).ChatCompletionResponse
