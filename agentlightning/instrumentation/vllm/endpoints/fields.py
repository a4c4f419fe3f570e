"""Fields of vLLM's pydantic models: declare one more in place, or require one that wrappers rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_args

from agentlightning.patching import Mismatch, NotForThisRelease

__all__ = ["ExtraField", "RequestField", "model_of"]


@dataclass(frozen=True)
class ExtraField:
    """A patch that adds an optional field to a model, in place; the field is left out of JSON if it was not set.

    Most of vLLM's models accept extra attributes even without it, but no schema shows those.

    Args:
        model: the model's name in the patched module.
        field: the field's name.
        annotation: its type.
        written_without_null: whether vLLM itself leaves out nulls wherever it writes this model.
    """

    model: str
    field: str
    annotation: Any
    written_without_null: bool = False

    def check(self, module: ModuleType) -> None:
        import pydantic

        if self.field in model_of(module, self.model).model_fields:
            raise NotForThisRelease(f"{self.model} already has a field {self.field}")
        if not (self.written_without_null or _can_exclude()):
            raise NotForThisRelease(
                f"pydantic {pydantic.VERSION} cannot leave out a field that was not set, 2.12 can; "
                f"answers still carry {self.field}, but no schema shows it"
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
            # pydantic caches how an attribute is set; the cached way would still set the removed field.
            getattr(model, "__pydantic_setattr_handlers__", {}).pop(self.field, None)
            _rebuild(model)

        try:
            _rebuild(model)
        except BaseException:
            undo()
            raise
        return undo


def model_of(module: ModuleType, name: str) -> Any:
    """Return the pydantic model of this name in `module`.

    Raises:
        Mismatch: there is none, or it is not a model.
    """
    from pydantic import BaseModel

    model = getattr(module, name, None)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise Mismatch(f"{module.__name__} has no model {name}")
    return model


def _rebuild(model: Any) -> None:
    """Rebuild `model`, and the models with a field of its type: they write it as it was when they were built.

    Up to 0.11.2 run-batch's results are such models, in the same module; later they exist if run-batch was imported
    first.
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


_DESCRIPTION = "The token ids that the engine produced: one list per choice, in index order. Added by Agent Lightning."


def _can_exclude() -> bool:
    from pydantic.fields import FieldInfo

    return "exclude_if" in FieldInfo.__slots__  # from pydantic 2.12


def _is_none(value: object) -> bool:
    return value is None


@dataclass(frozen=True)
class RequestField:
    """A check without a change: a request model must have a field that wrappers read and set.

    Args:
        model: the request model's name in the patched module.
        field: the field that it must have.
        since: the first vLLM release with that field; in older ones there is nothing to patch.
    """

    model: str
    field: str
    since: str

    def check(self, module: ModuleType) -> None:
        if self.field not in model_of(module, self.model).model_fields:
            raise NotForThisRelease(f"{self.model} has no field {self.field}, which came with vLLM {self.since}")

    def is_applied(self, module: ModuleType) -> bool:
        return True

    def apply(self, module: ModuleType) -> Callable[[], None]:
        return lambda: None
