"""Who sent a request, and which generations are theirs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass


def _free_of_charge(tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key. The default is anybody, on a server without keys: nothing is kept from them.

    `tenant` is whose prompts and generations a request's are. Feedback may also name generations of the tenants
    `speaks_for`. `charge` counts generated tokens against the key's budget. The id of a generation ends in a code made
    from `secret` and the tenant, which shows later whose it is, so nothing has to be remembered for it.
    """

    name: str = ""
    tenant: str = ""
    is_admin: bool = True
    secret: bytes = b""
    charge: Callable[[int], None] = _free_of_charge
    speaks_for: frozenset[str] = frozenset()

    def new_id(self, prefix: str) -> str:
        """The id of a new generation."""
        random = secrets.token_hex(12)
        return f"{prefix}-{random}{self._code(random)}"

    def may_change(self, generation_id: str) -> bool:
        """Whether the generation is this caller's, or the caller's key is an admin's."""
        random = generation_id.rpartition("-")[2][:24]
        expected = random + self._code(random)
        return self.is_admin or hmac.compare_digest(generation_id.rpartition("-")[2].encode(), expected.encode())

    def _code(self, random: str) -> str:
        """Empty for the ids of anybody."""
        if not self.tenant:
            return ""
        return hashlib.blake2s(f"{random}/{self.tenant}".encode(), key=self.secret, digest_size=8).hexdigest()
