"""API keys, and the file that holds them.

A line of the file is a JSON object with the SHA-256 of a key, as `trimtab keys add` writes it, or a key in plain text.
Blank lines and lines that begin with # are skipped. SHA-256 is enough for generated keys: they have 256 random bits,
so there is nothing to guess that a slow hash would protect, and a fast one costs little per request.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from steering_vectors.errors import TrimtabError

Scope = Literal["generate", "feedback", "admin"]
KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

BYTES_OF_RANDOMNESS = 32
GENERATED = "trimtab_"  # how generated keys begin, so that scanners for leaked secrets recognise them
MAX_FILE_BYTES = 2**20
PLAIN_LINE = "line-{number}"  # the name of a key in plain text
OF_PLAIN_LINE = re.compile(r"line-\d+")
OF_SETTINGS = "settings"  # the name of the key that is given as a setting


class KeyFileError(TrimtabError):
    """The key file, or a change to it, is not usable."""

    code = "invalid_configuration"


class Key(BaseModel):
    """One key, by its digest. Budgets that are None are those of the server's settings. `speaks_for` are the names of
    keys whose generations its feedback may name, beside its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: KeyName
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    scopes: list[Scope] = Field(default=["generate"], min_length=1)
    created: str = ""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)
    speaks_for: list[KeyName] | None = Field(default=None, min_length=1)

    @field_validator("speaks_for")
    @classmethod
    def _names_that_last(cls, names: list[str] | None, known: ValidationInfo) -> list[str] | None:
        if names and "feedback" not in known.data.get("scopes", ()):
            raise PydanticCustomError("scope", "it is for keys with the scope feedback")
        if plain := [name for name in names or () if OF_PLAIN_LINE.fullmatch(name)]:
            message = "{name} is the name of a line, which changes: give that key a name of its own"
            raise PydanticCustomError("name", message, {"name": plain[0]})
        return names

    @classmethod
    def plain(cls, name: str, secret: str) -> Self:
        """A key of which only the text is known."""
        return cls(name=name, sha256=digest_of(secret.encode()))

    def allows(self, scope: Scope) -> bool:
        """Whether it has a scope; admin includes the others."""
        return scope in self.scopes or "admin" in self.scopes


def digest_of(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys of a file, which may be none. Raises KeyFileError that names the line."""
    return _parse(path, _read(path))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")  # editors on Windows begin files with a BOM
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise KeyFileError(f"the API key file {path} cannot be read ({reason})") from error
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"the API key file {path} is larger than {MAX_FILE_BYTES} bytes")
    return text


def _parse(path: Path, text: str) -> list[Key]:
    found: dict[str, Key] = {}
    names: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key = _key(path, number, line)
        if key.sha256 in found and not line.startswith("{"):
            continue
        if key.name in names or key.sha256 in found:
            raise KeyFileError(f"the API key file {path}, line {number}: the key {key.name!r} stands there twice")
        found[key.sha256] = key
        names.add(key.name)
    return list(found.values())


def _key(path: Path, number: int, line: str) -> Key:
    if not line.startswith("{"):
        return Key.plain(PLAIN_LINE.format(number=number), line)
    try:
        return Key.model_validate_json(line)
    except ValidationError as error:
        detail = error.errors(include_input=False)[0]
        field = ".".join(map(str, detail["loc"]))
        reason = f"{field}: {detail['msg']}" if field else detail["msg"]
        raise KeyFileError(f"the API key file {path}, line {number}: {reason}") from error


def add_key(
    path: Path,
    name: str,
    scopes: Sequence[Scope] = (),
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrent_requests: int | None = None,
    speaks_for: Sequence[str] = (),
) -> tuple[str, Key]:
    """Generate a key and write its digest into a file, which is created if it is missing. `speaks_for` names keys of
    the file, or the one of the settings. Returns the key's text, which is stored nowhere. Raises KeyFileError."""
    secret = GENERATED + secrets.token_urlsafe(BYTES_OF_RANDOMNESS)
    try:
        key = Key(
            name=name,
            sha256=digest_of(secret.encode()),
            scopes=list(dict.fromkeys(scopes)) or ["generate"],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_requests=concurrent_requests,
            speaks_for=list(dict.fromkeys(speaks_for)) or None,
        )
    except ValidationError as error:
        detail = error.errors(include_input=False)[0]
        raise KeyFileError(f"{'.'.join(map(str, detail['loc']))} is not valid: {detail['msg']}") from error
    with _changing(path) as (lines, known):
        if any(one.name == name for one in known):
            raise KeyFileError(f"the key {name!r} exists already: revoke it first, or choose another name")
        names = {OF_SETTINGS, *(one.name for one in known)}
        if unknown := [one for one in key.speaks_for or () if one not in names]:
            raise KeyFileError(f"there is no key {unknown[0]!r} in {path} to speak for: add that one first")
        lines.append(key.model_dump_json(exclude_none=True))
    return secret, key


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of a file. Raises KeyFileError if it is not there."""
    with _changing(path) as (lines, known):
        revoked = {key.sha256 for key in known if key.name == name}
        if not revoked:
            raise KeyFileError(f"there is no key {name!r} in {path}: `trimtab keys list` shows the names")
        lines[:] = [line for line in lines if not revoked & {key.sha256 for key in _parse(path, line)}]


@contextmanager
def _changing(path: Path) -> Iterator[tuple[list[str], list[Key]]]:
    """The lines of a file and its keys. The lines are written back as a whole, readable by the file's owner only. One
    process at a time."""
    try:
        with FileLock(path.with_name(f".{path.name}.lock")):
            lines = _read(path).splitlines() if path.exists() else []
            yield lines, _parse(path, "\n".join(lines))
            _write(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise KeyFileError(f"the API key file {path} cannot be written ({error.strerror or error})") from error


def _write(path: Path, text: str) -> None:
    target = path.resolve()  # of a link, what it points to
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # with mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
