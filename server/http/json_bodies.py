"""Reading JSON strictly: NaN, Infinity and halves of surrogate pairs are no JSON; deep nesting is refused, and so are
names that occur twice in one object, of which a parser keeps the last and drops the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json


class StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            read = from_json(body, allow_inf_nan=False)
            json.loads(body, object_pairs_hook=_refuse_repeated)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error
        return read


class StrictRoute(APIRoute):
    """A route whose body is read by `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object"
        )
