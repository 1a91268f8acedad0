"""The fields of a request that say what form its text must have: OpenAI's `response_format` and vLLM's `guided_*`.

Owns their shapes and that only one of them may be given. Whether a schema or a grammar can be followed is the engine's
to say.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from server.api.fields.body import Body
from server.api.fields.sampling import SamplingBody
from server.engines.protocol import Constraint
from steering_vectors.errors import RequestError

MOST_CHOICES = 1024
ANY_OBJECT = {"type": "object"}

Schema = dict[str, Any]


class JsonSchema(Body):
    """OpenAI's named schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="A name for the schema; it is not used.")
    description: str | None = Field(None, description="What the schema is for; it is not used.")
    schema_: Schema = Field(alias="schema", description="The JSON schema.")
    strict: bool = Field(False, description="The schema is always kept to, whatever this says.")


class ResponseFormat(Body):
    """What OpenAI's chats may be asked to answer in."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Any text, any JSON object, or JSON of a schema."
    )
    json_schema: JsonSchema | None = Field(None, description="The schema, for the type json_schema.")

    def schema_text(self) -> str | None:
        """The schema to keep to; None for any text. Raises RequestError unless type and schema belong together."""
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
        return _text(ANY_OBJECT) if self.type == "json_object" else None


class ConstrainedBody(SamplingBody):
    """A text under a constraint ends where it is complete, `finish_reason` "stop", or is cut off at its limit."""

    response_format: ResponseFormat | None = Field(
        None, description="Keep to JSON, or to JSON of a schema. Only one of this and guided_* may be given."
    )
    guided_json: Schema | None = Field(None, description="Keep to a JSON schema.")
    guided_regex: str | None = Field(
        None, description="Match a regular expression as a whole, in the syntax of Rust's regex."
    )
    guided_choice: list[str] | None = Field(
        None, min_length=1, max_length=MOST_CHOICES, description="Be one of these texts."
    )
    guided_grammar: str | None = Field(
        None,
        description="Follow a grammar in llguidance's variant of Lark; its rules may have the attributes max_tokens, "
        "lazy and suffix.",
    )

    def constraint(self) -> Constraint | None:
        """Raises RequestError that names the second of two constraints, or one that is too long."""
        asked = self._asked()
        if len(asked) > 1:
            first, second = asked[0].field, asked[1].field
            raise RequestError(f"{first} and {second} both constrain the text: use only one of them", param=second)
        return asked[0] if asked else None

    def _asked(self) -> list[Constraint]:
        found = []
        if self.response_format is not None and (schema := self.response_format.schema_text()) is not None:
            found.append(Constraint("json", schema, "response_format"))
        if self.guided_json is not None:
            found.append(Constraint("json", _text(self.guided_json), "guided_json"))
        if self.guided_regex is not None:
            found.append(Constraint("regex", self.guided_regex, "guided_regex"))
        if self.guided_choice is not None:
            found.append(Constraint("choice", _text(self.guided_choice), "guided_choice"))
        if self.guided_grammar is not None:
            found.append(Constraint("lark", self.guided_grammar, "guided_grammar"))
        return found


def _text(value: Schema | list[str]) -> str:
    """The order of properties is the order in which they are written."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
