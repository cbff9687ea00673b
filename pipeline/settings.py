"""Sections of settings: fields with types, bounds and descriptions, read from the mappings of a YAML file."""

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, PlainSerializer, ValidationError

from shards.errors import UserError
from shards.storage import paths

TYPES = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "a mapping",
    "string": "text",
}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class Section(BaseModel):
    """Base class. A field takes values of its type only (a whole number is also a number), and finite numbers; the
    string under it describes it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class FrozenSection(Section):
    """A Section whose fields do not change."""

    model_config = ConfigDict(frozen=True)


S = TypeVar("S", bound=Section)


def expanded(path: str) -> str:
    try:
        return paths.expanded(path)
    except UserError as error:
        raise ValueError(str(error)) from None  # which pydantic takes


# A path. ~ and variables in it are replaced when it is read, and only then.
Place = Annotated[str, AfterValidator(expanded), PlainSerializer(paths.escaped, return_type=str)]


class FromMapping:
    """Annotation of a field whose type is a dataclass: lets it be given as a mapping, which strict types do not."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        schema = handler(source)
        found: Any = handler.resolve_ref_schema(schema)
        found["strict"] = False
        return schema


@dataclass(frozen=True)
class Key:
    """A field of a Section. allowed, about: text."""

    name: str
    default: object
    allowed: str
    about: str


def read(kind: type[S], values: Any, where: str = "", renamed: Mapping[str, str] = {}) -> S:
    """The Section `kind` with the mapping `values`. Raises UserError for the first wrong key or value, named behind
    `where`; renamed: {former key: present key}."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(complaint(schema_of(kind), error.errors()[0], where, renamed)) from None


def keys(kind: type[Section], where: str = "") -> list[Key]:
    """The fields of a Section, then those of the sections in it."""
    schema = schema_of(kind)

    def walk(node: dict, where: str) -> Iterator[Key]:
        fields = {where + name: resolved(schema, field) for name, field in node["properties"].items()}
        for name, field in fields.items():
            if "properties" not in field:
                yield Key(name, field.get("default"), allowed(field), " ".join(field.get("description", "").split()))
        for name, field in fields.items():
            if "properties" in field:
                yield from walk(field, f"{name}.")

    return list(walk(schema, where))


@functools.cache
def schema_of(kind: type[Section]) -> dict:
    return kind.model_json_schema()


def resolved(schema: dict, node: dict) -> dict:
    """A node of a JSON schema with what a $ref names in place of it."""
    named = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    node = {**named, **{key: value for key, value in node.items() if key != "$ref"}}
    return node | ({"anyOf": [resolved(schema, one) for one in node["anyOf"]]} if "anyOf" in node else {})


def allowed(node: dict) -> str:
    """The values that a node of a JSON schema allows, in words."""
    if "anyOf" in node:
        return " or ".join(map(allowed, node["anyOf"]))
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    if "properties" in node:
        return f"a mapping of {', '.join(node['properties'])}"
    if node.get("items"):
        count = f" of {node['minItems']}" if "minItems" in node and node["minItems"] == node.get("maxItems") else ""
        return f"a list{count} (each {allowed(node['items'])})"
    bounds = " and ".join(f"{sign} {node[bound]:.10g}" for bound, sign in BOUNDS.items() if bound in node)
    return f"{TYPES[node['type']]} {bounds}".strip() if "type" in node else "a value of JSON"


def complaint(schema: dict, error: Any, where: str, renamed: Mapping[str, str]) -> str:
    """One line on an error of pydantic."""
    node, key = schema, where.rstrip(".")
    for name in error["loc"]:
        mapping: dict = next((one for one in node.get("anyOf", [node]) if one.get("type") == "object"), {})
        known = mapping.get("properties", {})
        found = known.get(name) or mapping.get("additionalProperties")
        if name == "[key]":
            node = {"type": "string"}
        elif found:
            node, key = resolved(schema, found), f"{key}.{name}".lstrip(".")
        elif known:
            prefix, key = f"{key}.".lstrip("."), f"{key}.{name}".lstrip(".")
            close = [prefix + one for one in difflib.get_close_matches(str(name), known, 1)]
            close = [renamed[key]] if key in renamed else close
            return f"{key}: unknown; " + (f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}")
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    got = repr(error["input"])
    got = "missing" if error["type"] == "missing" else f"got {got if len(got) <= 80 else got[:77] + '...'}"
    wanted = allowed(node).replace("a number", "a finite number" if error["type"] == "finite_number" else "a number")
    return f"{key}: {got}, expected {wanted}"
