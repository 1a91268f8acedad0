"""The rules of every request body.

Unknown fields are refused, null means absent, and numbers are finite and of their own type. A field of OpenAI's API
that is not supported is accepted at its no-op values and refused by name at any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

MAX_SHORT = 1024  # characters of a field that is a name or a note
NoOps = Mapping[str, tuple[Any, ...]]
Examples = Sequence[Mapping[str, Any]]
NO_OPS_KEY = "x-accepted-only-as"
ABOUT = {"title", "description", "default", "examples"}  # a schema's keys that do not restrict its values
NULL = {"type": "null"}

OPENAI_NO_OPS: NoOps = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "reasoning_effort": ("none",),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


def _document(schema: dict[str, Any], body: type[Body]) -> None:
    """Add to the schema what pydantic does not know: null for absent, examples, the fields of `no_ops`."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            forms = field.pop("anyOf", None) or [{name: field.pop(name) for name in field.keys() - ABOUT}]
            field["anyOf"] = forms if NULL in forms else [*forms, NULL]
    if body.examples:
        schema["examples"] = list(body.examples)
    if body.no_ops:
        schema[NO_OPS_KEY] = {name: list(allowed) for name, allowed in sorted(body.no_ops.items())}


class Body(BaseModel):
    """A strict request body. `no_ops` has each unsupported field's no-op values; `examples` are whole bodies."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, json_schema_extra=_document
    )
    no_ops: ClassVar[NoOps] = {}
    examples: ClassVar[Examples] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_no_ops(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.no_ops.keys() & data.keys():
            value, allowed = data[name], cls.no_ops[name]
            if value is not None and not any(type(value) is type(one) and value == one for one in allowed):  # 1 ≠ true
                remedy = " or ".join(["leave it out", *(f"set it to {json.dumps(one)}" for one in allowed)])
                detail = {"field": name, "remedy": remedy}
                raise PydanticCustomError("unsupported_field", "field '{field}' is not supported: {remedy}", detail)
        fields = cls.model_fields
        known = fields.keys() | {one.alias for one in fields.values()}
        found: dict[str, Any] = {}
        unknown = 0
        for name, value in data.items():
            if name in cls.no_ops or (value is None and name in fields):
                continue
            if name not in known:
                unknown += 1
                if unknown > 1:  # one is named in the error; each would cost as much
                    continue
            found[name] = value
        return found


def at_most(count: int) -> Callable[[Any], Any]:
    """A validator that counts the entries of an object before any is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            detail = {"count": len(value), "most": count}
            raise PydanticCustomError("too_many", "it has {count} entries; at most {most} are taken", detail)
        return value

    return check


ABOUT_USER = "Whose generation this is, if the server keeps generations: it is deleted with this user's feedback."
Short = Annotated[str, Field(max_length=MAX_SHORT)]
FAIL_FAST = Field(fail_fast=True)  # for lists: each error costs as much as the first


@dataclass(frozen=True, slots=True, eq=False)
class OrElse:
    """Annotates a field whose validator takes another form too, for the OpenAPI document."""

    form: Mapping[str, Any]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [dict(self.form), handler(schema)]}
