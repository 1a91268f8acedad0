"""The fields that constrain the form of a text: OpenAI's `response_format` and vLLM's `guided_*`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.fields.body import FAIL_FAST, Body
from server.api.fields.sampling import SamplingBody
from server.engines.protocol import ConstraintKind
from steering_vectors.errors import RequestError

MAX_CHOICES = 1024

Schema = dict[str, Any]


class JsonSchema(Body):
    """OpenAI's named schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="The schema's name. It has no effect.")
    description: str | None = Field(None, description="The schema's description. It has no effect.")
    schema_: Schema = Field(alias="schema", description="The JSON schema.")
    strict: bool = Field(False, description="No effect: the schema is always enforced.")


class ResponseFormat(Body):
    """The format of a chat's reply."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Any text, any JSON object, or JSON that matches a schema."
    )
    json_schema: JsonSchema | None = Field(None, description="The schema, for type json_schema.")

    def schema_text(self) -> str | None:
        """The schema to enforce; None for any text. Raises RequestError unless type and schema match."""
        given, wanted = self.json_schema, self.type == "json_schema"
        if wanted and given is None:
            raise RequestError(
                "response_format of type json_schema needs a json_schema", param="response_format.json_schema"
            )
        if given is not None and not wanted:
            raise RequestError(
                f"json_schema does not belong to type {self.type}: set response_format.type to json_schema",
                param="response_format.json_schema",
            )
        if given is not None:
            return _text(given.schema_)
        return _text({"type": "object"}) if self.type == "json_object" else None


class ConstrainedBody(SamplingBody):
    """A constrained text ends when it is complete, with `finish_reason` "stop", or is cut off at its token limit."""

    response_format: ResponseFormat | None = Field(
        None, description="Generate JSON, or JSON that matches a schema. Excludes the guided_* fields."
    )
    guided_json: Schema | None = Field(None, description="Generate JSON that matches this schema.")
    guided_regex: str | None = Field(
        None, description="Generate a text that matches this regular expression as a whole, in Rust's regex syntax."
    )
    guided_choice: Annotated[list[str], FAIL_FAST] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description="Generate one of these texts."
    )
    guided_grammar: str | None = Field(
        None,
        description="Generate a text of this grammar, in llguidance's variant of Lark; its rules may have the "
        "attributes max_tokens, lazy and suffix.",
    )

    def constraints(self) -> dict[str, tuple[ConstraintKind, str]]:
        """By the field of each. Raises RequestError for a response format whose type and schema do not match."""
        schema = None if self.response_format is None else self.response_format.schema_text()
        found: dict[str, tuple[ConstraintKind, str | None]] = {
            "response_format": ("json", schema),
            "guided_json": ("json", _text(self.guided_json)),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choice", _text(self.guided_choice)),
            "guided_grammar": ("lark", self.guided_grammar),
        }
        return {field: (kind, text) for field, (kind, text) in found.items() if text is not None}


def _text(value: Schema | list[str] | None) -> str | None:
    """Properties keep their order, in which they are generated."""
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
