"""How requests name a profile: NAME, NAME#SHA8 or NAME#ALIAS; and which version a plain NAME means for a request."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from server.engines.errors import UnknownProfile
from steering_vectors.errors import RequestError

REFERENCE = re.compile(r"(?P<name>[^#]+)(?:#(?:(?P<version>[0-9a-f]{8,64})|(?P<alias>[a-z][a-z0-9_-]{0,31})))?")
ALIAS_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
VERSION_TEXT = re.compile(r"[0-9a-f]{8,64}")
STABLE = "stable"  # the alias that a plain name means
LATEST = "latest"  # the version of the profile's file, always
ALIAS_RULE = "use 1 to 32 of a-z, 0-9, '_' and '-', beginning with a letter, and not only hexadecimal digits"


class Alias(BaseModel):
    """A name of a version. `share` is the part of the requests for the plain name that go to it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str = Field(pattern=r"^[0-9a-f]{64}$")
    share: float = Field(0.0, ge=0, le=1)
    at: str = ""
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """`version` is the beginning of a sha256, `alias` the name of one; at most one of them is there."""

    name: str
    version: str | None = None
    alias: str | None = None


def parse_reference(text: str) -> Reference | None:
    """None for what is none."""
    match = REFERENCE.fullmatch(text)
    return None if match is None else Reference(match["name"], match["version"], match["alias"])


def checked_alias(alias: str) -> str:
    """A name that an alias may have. Raises RequestError."""
    if alias == LATEST:
        raise RequestError(f"{LATEST!r} always is the profile's newest version: choose another alias", param="alias")
    if not ALIAS_NAME.fullmatch(alias) or VERSION_TEXT.fullmatch(alias):
        message = f"{alias[:80]!r} is no name of an alias: {ALIAS_RULE}"
        raise RequestError(message, param="alias", code="invalid_name")
    return alias


class Draw:
    """Decides for one request which version a plain name means where aliases have shares.

    Requests of one `user` and `tenant` always get the same, as long as the shares and versions stay; one with a share
    that grows keeps those that it had. Without a user each request draws anew. `preferred` are versions that are taken
    if they may be, such as those that a generation runs with.
    """

    def __init__(self, user: str | None = None, tenant: str = "", preferred: Collection[str] = ()) -> None:
        self._key = secrets.token_hex(16) if user is None else f"{tenant}/{user}"
        self._preferred = frozenset(preferred)

    def choose(self, name: str, default: str, aliases: Mapping[str, Alias]) -> str:
        """The version of an alias with a share, or else the default."""
        shares = [alias for _, alias in sorted(aliases.items()) if alias.share > 0]
        for version in (*(alias.version for alias in shares), default):
            if version in self._preferred:
                return version
        left = 1.0
        for alias in shares:
            if self._fraction(name, alias.version) * left < alias.share:
                return alias.version
            left -= alias.share
        return default

    def _fraction(self, name: str, version: str) -> float:
        """Uniform in [0, 1)."""
        digest = hashlib.blake2b(f"{self._key}/{name}/{version}".encode("utf-8", "surrogatepass"), digest_size=8)
        return int.from_bytes(digest.digest(), "big") / 2**64


def unknown_alias(name: str, alias: str, aliases: Mapping[str, Alias]) -> UnknownProfile:
    known = ", ".join(sorted(aliases)) or "none"
    return UnknownProfile(f"profile {name!r} has no alias {alias!r}; it has: {known}")
