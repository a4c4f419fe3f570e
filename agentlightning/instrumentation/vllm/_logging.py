"""Log as vLLM does: through its handlers, and so in its format, at its level and to where its own lines go."""

from __future__ import annotations

import logging
from types import ModuleType

from agentlightning.importhook import when_imported

__all__ = ["use_vllm_handlers"]

logger = logging.getLogger("agentlightning")

LOGGER_MODULE = "vllm.logger"
"""The module that configures vLLM's logging when it is imported, in every release."""


def use_vllm_handlers() -> None:
    """Let our logger use vLLM's handlers from the moment that vLLM has some. Idempotent.

    A logger that the program has configured itself stays as it is. So does ours where vLLM configures none
    (`VLLM_CONFIGURE_LOGGING=0`).
    """
    if logger.level != logging.NOTSET or logger.handlers:
        return
    # A library that vLLM brings along (model_hosting_container_standards) lets nothing below an error through the root.
    logger.setLevel(logging.WARNING)
    when_imported(LOGGER_MODULE, _share, once=True)


def _share(_: ModuleType) -> None:
    vllms = logging.getLogger("vllm")
    if vllms.handlers:
        logger.handlers = list(vllms.handlers)
        logger.propagate = vllms.propagate
        logger.setLevel(vllms.level)
