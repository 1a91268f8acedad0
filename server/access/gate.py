"""The check of API keys: before anything is read of a request's body, its key, the scope of its route and the key's
budgets are looked at."""

from __future__ import annotations

import secrets
from functools import partial

from fastapi import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.budgets import Budgets
from server.access.callers import Caller
from server.access.keyring import KeyRing
from server.access.keys import Key, digest_of
from server.access.keys import Scope as KeyScope
from server.access.refusals import Refusals
from server.http.error_responses import error_response
from server.http.middleware import PAGE_FILES
from server.observability import request_record

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/docs", "/openapi.json"})
CALLER = "caller"  # in the state of a request
READING = frozenset({"GET", "HEAD", "OPTIONS"})


def tenant_of(scope: Scope) -> str:
    """Whose a request is that has passed the gate."""
    caller: Caller = scope["state"][CALLER]
    return caller.tenant


def is_open(path: str) -> bool:
    """Routes about the server's state, and the page of docs, for which a browser has no key yet."""
    return path in OPEN_PATHS or path.startswith(f"{PAGE_FILES}/")


def scope_needed(method: str, path: str) -> KeyScope:
    """What a key must be for: `admin` to change profiles or settings, to read the files and history of profiles, for
    jobs, and to read or delete feedback; `feedback` to give feedback, else `generate`."""
    first, *rest = path.split("/")[1:]
    if first in ("audit", "jobs") or (first in ("profiles", "settings") and (method not in READING or len(rest) > 1)):
        return "admin"
    if first == "feedback":
        return "feedback" if method not in READING and path == "/feedback" else "admin"
    return "generate"


class Gate:
    """Requires `Authorization: Bearer KEY` if there are keys. Routes find the request's `Caller` in its state."""

    def __init__(self, app: ASGIApp, keys: KeyRing, budgets: Budgets, refusals: Refusals) -> None:
        self._app = app
        self._keys = keys
        self._budgets = budgets
        self._refusals = refusals
        self._secret = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        method, path = scope["method"], scope["path"]
        if not self._keys.is_required:
            return await self._pass(Caller(), scope, receive, send)
        key = self._key(Headers(scope=scope))
        if key is not None and (record := request_record.current()) is not None:
            record.key = key.name
        if is_open(path):
            caller = self._caller(key) if key else Caller(is_admin=False)
            return await self._pass(caller, scope, receive, send)
        if key is None:
            message = "this server requires a key: send it as 'Authorization: Bearer KEY'"
            response = error_response(401, message, code="invalid_api_key")
            response.headers["www-authenticate"] = "Bearer"
            return await self._refuse(response, "invalid_api_key", None, scope, receive, send)
        needed = scope_needed(method, path)
        if not key.allows(needed):
            message = f"the key {key.name!r} lacks the scope {needed!r}, which this route needs"
            response = error_response(403, message, code="insufficient_scope")
            return await self._refuse(response, "insufficient_scope", key, scope, receive, send)
        async with self._budgets.admit(key, generates=method == "POST" and needed == "generate") as exceeded:
            if exceeded is None:
                return await self._pass(self._caller(key), scope, receive, send)
        response = error_response(429, exceeded.message, code="rate_limit_exceeded")
        response.headers["retry-after"] = str(exceeded.retry_after)
        return await self._refuse(response, "rate_limit_exceeded", key, scope, receive, send)

    async def _pass(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[CALLER] = caller
        await self._app(scope, receive, send)

    async def _refuse(
        self, response: Response, code: str, key: Key | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._refusals.note(scope, code, key.name if key else None)
        await response(scope, receive, send)

    def _key(self, headers: Headers) -> Key | None:
        kind, _, secret = headers.get("authorization", "").partition(" ")
        found = self._keys.find(secret.strip().encode("latin-1"))
        return found if kind.lower() == "bearer" else None

    def _caller(self, key: Key) -> Caller:
        return Caller(
            name=key.name,
            tenant=_tenant(key),
            is_admin="admin" in key.scopes,
            secret=self._secret,
            charge=partial(self._budgets.charge, key),
            speaks_for=frozenset(map(_tenant, self._keys.named(key.speaks_for))) if key.speaks_for else frozenset(),
        )


def _tenant(key: Key) -> str:
    return digest_of(f"tenant {key.sha256}".encode())
