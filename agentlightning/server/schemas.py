"""Schemas that several routes share: ids, numbers, and pages."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from agentlightning.server.limits import ID_LIMIT, NUMBER_LIMIT, PAGE_LIMIT

__all__ = [
    "LEFT_OUT",
    "CallerFilters",
    "Id",
    "Logic",
    "Nanoseconds",
    "NullableFilters",
    "Page",
    "Part",
    "Query",
    "Seconds",
    "Sent",
    "Whole",
    "example",
]

# Not every database can hold a NUL in a text.
_WITHOUT_NUL = r"^[^\x00]*$"
Id = Annotated[str, StringConstraints(min_length=1, max_length=ID_LIMIT, pattern=_WITHOUT_NUL)]
Part = Annotated[str, StringConstraints(max_length=ID_LIMIT, pattern=_WITHOUT_NUL)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Nanoseconds = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A time since the epoch."""
# In JSON, 1.0 and 1 are the same number.
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
]
Order = Literal["asc", "desc"]
Logic = Literal["and", "or"]


def example(**fields: Any) -> ConfigDict:
    """Show an example of a body in the OpenAPI document."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


def _without_default(schema: dict[str, JsonValue]) -> None:
    del schema["default"]


# An omitted field is unchanged; null is invalid.
LEFT_OUT: Any = Field(None, json_schema_extra=_without_default)


class Sent(BaseModel):
    """A JSON body, in which `true` and `"1"` are not numbers."""

    model_config = ConfigDict(strict=True)


class CallerFilters(BaseModel):
    """Filters by what calls say of their callers."""

    agent_id: str | None = Field(None, description="Only those of this agent.")
    parent_agent_id: str | None = Field(None, description="Only those of agents that this one has started.")
    purpose: str | None = Field(None, description="Only those with this purpose, such as `main` or `title`.")
    retry: int | None = Field(
        None, ge=0, le=NUMBER_LIMIT, description="Only those that the client's SDK had tried so often before."
    )


Name = TypeVar("Name")


class NullableFilters(BaseModel, Generic[Name]):
    """Filters, of which those with a name may also select records that have no such value."""

    # A misspelt filter would match everything.
    model_config = ConfigDict(extra="forbid")

    without: list[Name] = Field([], description="Only those without these fields.")

    @model_validator(mode="after")
    def _not_with_and_without(self) -> Self:
        if both := [name for name in map(str, self.without) if getattr(self, name) is not None]:
            raise ValueError(f"{both[0]} is given, and listed in without")
        return self

    def given(self, filters: type) -> Any:
        """Return those of a store's filters that are given."""
        known = {name: getattr(self, name, None) for name in filters.__annotations__}
        return {name: value for name, value in known.items() if value is not None} | dict.fromkeys(self.without)


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """A page of a list."""

    items: list[Item]
    limit: int
    offset: int
    total: int = Field(description="Number of items on all pages.")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be an integer")
    return value


class Query(BaseModel):
    """Page and order of a list."""

    # In a URL everything is text, so these cannot be as strict as a JSON body.
    limit: Annotated[int, BeforeValidator(_number)] = Field(
        -1, ge=-1, le=PAGE_LIMIT, description="-1 for all.", json_schema_extra={"not": {"const": 0}}
    )
    offset: Annotated[int, BeforeValidator(_number)] = Field(0, ge=0, le=NUMBER_LIMIT)
    sort_order: Order = "asc"

    @field_validator("limit")
    @classmethod
    def _not_nothing(cls, limit: int) -> int:
        if limit == 0:
            raise ValueError(f"must be from 1 to {PAGE_LIMIT}, or -1 for all")
        return limit
