"""The log of requests that were refused."""

from __future__ import annotations

import logging

from starlette.types import Scope

from server.http.throttle import Throttle

logger = logging.getLogger(__name__)


class Refusals:
    """Logs refusals with the name of the key, or else the client's address, one line per client and reason in ten
    seconds."""

    def __init__(self) -> None:
        self._throttle = Throttle()

    def note(self, scope: Scope, code: str, key: str | None = None) -> None:
        address = scope["client"][0] if scope.get("client") else "a local socket"
        who = address if key is None else f"key {key!r}"
        left_out = self._throttle.admit(f"{code} {who}")
        if left_out is not None:
            more = f"; {left_out} more refusals were not logged" if left_out else ""
            # a path may hold newlines
            logger.warning("refused %s %.200r of %s: %s%s", scope["method"], scope["path"], who, code, more)
