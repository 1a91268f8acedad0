"""How answers are declared: as TypedDicts, whose fields have descriptions and examples.

mypy checks the code that builds an answer against its declaration, the OpenAPI document takes schema and example from
it, and it costs nothing at run time.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

EXAMPLE = "x-example"


def about(description: str, example: Any = None) -> Any:
    """The description of an answer's field, in `Annotated`, and the field's value in the document's examples."""
    return Field(description=description, json_schema_extra=None if example is None else {EXAMPLE: example})
