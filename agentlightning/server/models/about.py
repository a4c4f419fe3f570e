"""What the server tells of itself, as the LightningStore interface of Agent Lightning 0.3 has it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

__all__ = ["Health", "Statistics"]


class Statistics(BaseModel):
    """How much there is."""

    name: str
    total_rollouts: int
    total_attempts: int
    total_spans: int
    total_resources: int
    total_workers: int
    total_generations: int
    uptime: float = Field(description="Seconds.")


class Health(BaseModel):
    """That the server works."""

    status: Literal["ok"]
