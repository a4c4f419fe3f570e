"""Fields of vLLM's pydantic models: one more, declared in place so that every name of the model has it; one needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_args

from agentlightning.patching import Mismatch, NotForThisRelease

__all__ = ["ExtraField", "RequestField", "model_of"]


@dataclass(frozen=True)
class ExtraField:
    """A patch: `model` gets the optional field `field`, left out of what it writes where it was not set.

    Without it the attribute can be set on most of vLLM's models all the same: they allow extra ones, which no schema
    shows.

    Args:
        model: the model, by the name that the patched module knows it by.
        field: the field's name.
        annotation: its type.
        written_without_null: whether vLLM leaves out itself what is null, wherever it writes this model.
    """

    model: str
    field: str
    annotation: Any
    written_without_null: bool = False

    def check(self, module: ModuleType) -> None:
        import pydantic

        if self.field in model_of(module, self.model).model_fields:
            raise NotForThisRelease(f"{self.model} has a {self.field} of its own")
        if not (self.written_without_null or _can_exclude()):
            raise NotForThisRelease(
                f"pydantic {pydantic.VERSION} cannot leave out a field that was not set, 2.12 can; "
                f"answers carry {self.field} all the same, but no schema shows it"
            )

    def is_applied(self, module: ModuleType) -> bool:
        model = getattr(module, self.model, None)
        field = getattr(model, "model_fields", {}).get(self.field)
        return getattr(field, "description", None) == _DESCRIPTION

    def apply(self, module: ModuleType) -> Callable[[], None]:
        from pydantic import Field
        from pydantic.fields import FieldInfo

        model = getattr(module, self.model)
        exclude: Any = {"exclude_if": _is_none} if _can_exclude() else {}
        default = Field(default=None, description=_DESCRIPTION, **exclude)
        model.model_fields[self.field] = FieldInfo.from_annotated_attribute(self.annotation, default)

        def undo() -> None:
            del model.model_fields[self.field]
            # pydantic remembers how an attribute is set: as the field that it is no longer.
            getattr(model, "__pydantic_setattr_handlers__", {}).pop(self.field, None)
            _rebuild(model)

        try:
            _rebuild(model)
        except BaseException:
            undo()
            raise
        return undo


def model_of(module: ModuleType, name: str) -> Any:
    """The pydantic model that `module` knows by this name.

    Raises:
        Mismatch: where it is not there, or something else.
    """
    from pydantic import BaseModel

    model = getattr(module, name, None)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise Mismatch(f"{module.__name__} has no model {name}")
    return model


def _rebuild(model: Any) -> None:
    """Rebuild `model`, and the models that hold it: they write it as it was when they were built.

    To 0.11.2 run-batch's results are such, in the same module; later they are where run-batch was imported before.
    """
    from pydantic import BaseModel

    model.model_rebuild(force=True)
    for holder in _subclasses(BaseModel):
        if holder.__module__.startswith("vllm.") and any(
            _mentions(field.annotation, model) for field in holder.model_fields.values()
        ):
            holder.model_rebuild(force=True)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _mentions(annotation: Any, model: type[Any]) -> bool:
    return annotation is model or any(_mentions(argument, model) for argument in get_args(annotation))


_DESCRIPTION = "The token ids that the engine produced: one list a choice, in index order. Added by Agent Lightning."


def _can_exclude() -> bool:
    from pydantic.fields import FieldInfo

    return "exclude_if" in FieldInfo.__slots__  # from pydantic 2.12


def _is_none(value: object) -> bool:
    return value is None


@dataclass(frozen=True)
class RequestField:
    """A check without a change: a request model must have a field that the wrappers read and set.

    Args:
        model: the request model, by the name that the patched module knows it by.
        field: the field that it must have.
        since: the vLLM that it came with; before, there is nothing to patch.
    """

    model: str
    field: str
    since: str

    def check(self, module: ModuleType) -> None:
        if self.field not in model_of(module, self.model).model_fields:
            raise NotForThisRelease(f"{self.model} knows no {self.field}, which vLLM has had since {self.since}")

    def is_applied(self, module: ModuleType) -> bool:
        return True

    def apply(self, module: ModuleType) -> Callable[[], None]:
        return lambda: None
