"""How answers are declared: as TypedDicts, whose fields have descriptions and examples; and how large ones are encoded.

mypy checks the code that builds an answer against its declaration, the OpenAPI document takes schema and example from
it, and it costs nothing at run time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response
from pydantic import Field

from server.engines.pool import DaemonPool

EXAMPLE = "x-example"
LARGE = 4096  # reported values, from which building and encoding an answer would hold up other requests


def about(description: str, example: Any = None) -> Any:
    """The description of an answer's field, in `Annotated`, and the field's value in the document's examples."""
    return Field(description=description, json_schema_extra=None if example is None else {EXAMPLE: example})


async def json_answer(build: Callable[[], Mapping[str, Any]], values: int, pool: DaemonPool) -> Response:
    """The response of what `build` makes, which reports so many values. Large ones are made in `pool`."""
    if values <= LARGE:
        return JSONResponse(build())
    return Response(await pool.run(lambda: encoded(build())), media_type="application/json")


def encoded(answer: Mapping[str, Any]) -> bytes:
    """The JSON of an answer, as JSONResponse writes it. Entries of lists are encoded one by one, because no other
    thread runs while one is."""
    fields = []
    for name, value in answer.items():
        text = f"[{','.join(map(_json, value))}]" if isinstance(value, list) else _json(value)
        fields.append(f"{_json(name)}:{text}")
    return f"{{{','.join(fields)}}}".encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
