"""The HTML reference of the HTTP API, from the application's OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

__all__ = ["ApiReference", "api_reference_of"]

OpenApi = Mapping[str, Any]
"""A part of an OpenAPI document."""

TITLES = {"about": "The server itself", "agentops": "AgentOps", "otlp": "OpenTelemetry (OTLP)"}
"""Headings of tags that are not the tag itself, capitalised."""
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "min. length {}",
    "maxLength": "max. length {}",
    "minItems": "min. items {}",
    "maxItems": "max. items {}",
}

_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, slots=True)
class Field:
    """A parameter, or a field of an object."""

    name: str
    where: str
    type: Markup
    is_required: bool
    description: Markup
    limits: str


@dataclass(frozen=True, slots=True)
class Content:
    """A body in one media type; `example` is JSON, or empty."""

    media_type: str
    type: Markup
    fields: Sequence[Field]
    example: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful response."""

    status: str
    description: Markup
    contents: Sequence[Content]


@dataclass(frozen=True, slots=True)
class Operation:
    """A method of a route; `errors` are statuses that `ApiReference.errors` describes."""

    id: str
    method: str
    path: str
    needs_key: bool
    paragraphs: Sequence[Markup]
    parameters: Sequence[Field]
    body: Sequence[Content]
    answers: Sequence[Answer]
    errors: Sequence[str]


@dataclass(frozen=True, slots=True)
class Group:
    """The operations of a tag."""

    id: str
    title: str
    operations: Sequence[Operation]


@dataclass(frozen=True, slots=True)
class Schema:
    """A named type of a body."""

    id: str
    name: str
    paragraphs: Sequence[Markup]
    fields: Sequence[Field]
    example: str


@dataclass(frozen=True, slots=True)
class ApiReference:
    """An OpenAPI document, arranged for the template; `errors` has a description for each status."""

    title: str
    version: str
    paragraphs: Sequence[Markup]
    groups: Sequence[Group]
    schemas: Sequence[Schema]
    errors: Mapping[str, Markup]


def api_reference_of(document: OpenApi) -> ApiReference:
    """Arrange an OpenAPI document for the template."""
    return _Arrangement(document).reference()


class _Arrangement:
    def __init__(self, document: OpenApi) -> None:
        self._document = document
        self._schemas: Mapping[str, OpenApi] = document["components"]["schemas"]

    def reference(self) -> ApiReference:
        groups: dict[str, list[Operation]] = {}
        errors: dict[str, Markup] = {}
        for path, methods in self._document["paths"].items():
            for method, about in methods.items():
                groups.setdefault(about["tags"][0], []).append(self._operation(method, path, about))
                refusals = {status: each for status, each in about["responses"].items() if _is_error(status)}
                errors |= {status: _inline(each["description"]) for status, each in refusals.items()}
        info = self._document["info"]
        return ApiReference(
            title=info["title"],
            version=info["version"],
            paragraphs=_paragraphs(info.get("description", "")),
            groups=[Group(f"tag-{tag}", TITLES.get(tag, tag.capitalize()), each) for tag, each in groups.items()],
            schemas=[self._schema(name) for name in sorted(self._schemas, key=self._title)],
            errors=dict(sorted(errors.items())),
        )

    def _operation(self, method: str, path: str, about: OpenApi) -> Operation:
        responses = about["responses"]
        return Operation(
            id=about["operationId"],
            method=method.upper(),
            path=path,
            needs_key="401" in responses,
            paragraphs=_paragraphs(about["description"]),
            parameters=[
                self._field(each["name"], each["schema"] | each, each.get("required", False), where=each["in"])
                for each in about.get("parameters", ())
            ],
            body=self._contents(about.get("requestBody", {}), with_examples=True),
            answers=[
                Answer(status, _inline(each["description"]), self._contents(each))
                for status, each in sorted(responses.items())
                if not _is_error(status)
            ],
            errors=sorted(filter(_is_error, responses)),
        )

    def _contents(self, about: OpenApi, with_examples: bool = False) -> list[Content]:
        return [
            Content(
                media_type,
                self._type(each["schema"]),
                self._fields(each["schema"]),
                _json(each.get("example", self._example(each["schema"]))) if with_examples else "",
            )
            for media_type, each in about.get("content", {}).items()
        ]

    def _schema(self, name: str) -> Schema:
        schema = self._schemas[name]
        paragraphs = _paragraphs(schema.get("description", ""))
        example = _json(self._example(schema))
        return Schema(_anchor(name), self._title(name), paragraphs, self._fields(schema), example)

    def _title(self, name: str) -> str:
        return self._schemas[name].get("title", name)

    def _fields(self, schema: OpenApi) -> list[Field]:
        required = schema.get("required", ())
        return [self._field(name, each, name in required) for name, each in schema.get("properties", {}).items()]

    def _field(self, name: str, schema: OpenApi, is_required: bool, where: str = "") -> Field:
        return Field(
            name=name,
            where=where,
            type=self._type(schema.get("schema", schema)),
            is_required=is_required,
            description=_inline(schema.get("description", "")),
            limits=", ".join(_limits(schema)),
        )

    def _type(self, schema: OpenApi) -> Markup:
        """Name the type of a value, with links to schemas."""
        if "$ref" in schema:
            name = _referenced(schema)
            return Markup('<a href="#{}">{}</a>').format(_anchor(name), self._title(name))
        if "const" in schema:
            return _code(schema["const"])
        if "enum" in schema:
            return Markup(" or ").join(map(_code, schema["enum"]))
        for key in ("anyOf", "oneOf"):
            # Some alternatives are conditions, such as which field is required: those have no type.
            if alternatives := [each for each in schema.get(key, ()) if each.keys() - {"required", "not"}]:
                return Markup(" or ").join(dict.fromkeys(map(self._type, alternatives)))
        match schema.get("type"):
            case "array" if "prefixItems" in schema:
                return Markup("array of {}").format(Markup(", ").join(map(self._type, schema["prefixItems"])))
            case "array" if schema.get("items"):
                return Markup("array of {}").format(self._type(schema["items"]))
            case "object" if isinstance(schema.get("additionalProperties"), dict) and schema["additionalProperties"]:
                return Markup("object of {}").format(self._type(schema["additionalProperties"]))
            case list() as types:
                return escape(" or ".join(types))
            case None:
                return Markup("any JSON value")
            case name:
                return escape(f"{name} ({schema['format']})" if "format" in schema else name)

    def _example(self, schema: OpenApi) -> Any:
        """Return the first example of a schema, or of one that it refers to; None if there is none."""
        for each in (schema, *schema.get("anyOf", ())):
            found = self._schemas[_referenced(each)] if "$ref" in each else each
            if "examples" in found:
                return found["examples"][0]
        return None


def _is_error(status: str) -> bool:
    return int(status) >= 400


def _referenced(schema: OpenApi) -> str:
    return schema["$ref"].rpartition("/")[2]


def _anchor(name: str) -> str:
    return f"schema-{name}"


def _limits(schema: OpenApi) -> Iterator[str]:
    # Of several types, such as a number or null, one has the limits.
    for each in (schema, *schema.get("anyOf", ())):
        yield from (text.format(each[key]) for key, text in BOUNDS.items() if key in each)
    if schema.get("default") is not None:
        yield f"default {json.dumps(schema['default'], ensure_ascii=False)}"


def _code(value: Any) -> Markup:
    return Markup("<code>{}</code>").format(json.dumps(value, ensure_ascii=False))


def _json(example: Any) -> str:
    return "" if example is None else json.dumps(example, indent=2, ensure_ascii=False)


def _paragraphs(text: str) -> list[Markup]:
    return [_inline(each) for each in text.split("\n\n") if each.strip()]


def _inline(text: str) -> Markup:
    """Escape a text, with `code` between backticks."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))
