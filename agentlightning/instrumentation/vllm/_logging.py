"""Log as vLLM does: through its handlers, and so in its format, at its level and to where its own lines go.

vLLM may configure its logging several times, when it is imported and again when its arguments are read, so nothing of
that is copied.
"""

from __future__ import annotations

import logging
from types import ModuleType

from agentlightning.importhook import when_imported

__all__ = ["log_through_vllm"]

logger = logging.getLogger("agentlightning")

LOGGER_MODULE = "vllm.logger"
"""The module that makes vLLM's logger: older releases configure it at its import, 0.32 when arguments are read."""


def log_through_vllm() -> None:
    """Make our logger a child of vLLM's as soon as vLLM has one. Idempotent.

    A logger that the program has configured itself stays as it is. Where vLLM configures none
    (`VLLM_CONFIGURE_LOGGING=0`), its lines and ours go to the root.
    """
    if logger.level != logging.NOTSET or logger.handlers:
        return
    # A library that vLLM brings along (model_hosting_container_standards) lets nothing below an error through the root.
    logger.setLevel(logging.WARNING)
    when_imported(LOGGER_MODULE, _become_child, once=True)


def _become_child(_: ModuleType) -> None:
    logger.parent = logging.getLogger("vllm")
    logger.setLevel(logging.NOTSET)
