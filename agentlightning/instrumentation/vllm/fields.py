"""A field more on one of vLLM's pydantic models, declared in place, so that every name the model goes by has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from agentlightning.patching import Mismatch, NotForThisRelease

__all__ = ["ExtraField"]


@dataclass(frozen=True)
class ExtraField:
    """A patch: `model` gets the optional field `field`, left out of what it writes where it was not set.

    Without it the attribute can be set all the same, since vLLM's models allow extra ones, but no schema shows it.
    """

    model: str
    field: str
    annotation: Any

    def check(self, module: ModuleType) -> None:
        import pydantic
        from pydantic.fields import FieldInfo

        model = getattr(module, self.model, None)
        if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
            raise Mismatch(f"{module.__name__} has no model {self.model}")
        if self.field in model.model_fields:
            raise NotForThisRelease(f"{self.model} has a {self.field} of its own")
        if "exclude_if" not in FieldInfo.__slots__:
            raise NotForThisRelease(f"pydantic {pydantic.VERSION} cannot leave out a field that was not set (2.12 can)")

    def is_applied(self, module: ModuleType) -> bool:
        model = getattr(module, self.model, None)
        field = getattr(model, "model_fields", {}).get(self.field)
        return getattr(field, "description", None) == _DESCRIPTION

    def apply(self, module: ModuleType) -> Callable[[], None]:
        from pydantic import Field
        from pydantic.fields import FieldInfo

        model = getattr(module, self.model)
        default = Field(default=None, description=_DESCRIPTION, exclude_if=_is_none)
        model.model_fields[self.field] = FieldInfo.from_annotated_attribute(self.annotation, default)

        def undo() -> None:
            del model.model_fields[self.field]
            model.model_rebuild(force=True)

        try:
            model.model_rebuild(force=True)
        except BaseException:
            undo()
            raise
        return undo


_DESCRIPTION = "The token ids that the engine produced: one list a choice, in index order. Added by Agent Lightning."


def _is_none(value: object) -> bool:
    return value is None
