"""The audit log of a profile directory: one JSON object per line for each change, in a file that only grows."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_READ_BYTES = 8 * 2**20  # of the end of the file
MODE = 0o640


@dataclass(frozen=True, slots=True)
class Author:
    """Who asks for a change: the name of the key, or None without keys; the client's address; the request's id. The
    default is whoever changes files in the directory."""

    key: str | None = None
    address: str | None = None
    request_id: str | None = None

    @property
    def shown(self) -> str | None:
        return self.key or self.address


class AuditLog:
    """Appends are durable when they return. Called in a thread; several processes may append to one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry without its empty fields. Raises OSError, and then the file has no part of it."""
        line = json.dumps({name: value for name, value in entry.items() if value is not None}, ensure_ascii=True)
        data = f"{line}\n".encode()
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # the writer before was killed
                data = b"\n" + data
            try:
                written = os.write(descriptor, data)
                if written < len(data):
                    raise OSError(28, os.strerror(28))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    def read(self, limit: int, profile: str | None = None) -> list[dict[str, Any]]:
        """The latest entries, of one profile or of all, the newest first. Raises OSError."""
        found = []
        for entry in self._backwards():
            if profile is None or entry.get("profile") == profile:
                found.append(entry)
                if len(found) == limit:
                    break
        return found

    def _backwards(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - MAX_READ_BYTES))
                lines = file.read(MAX_READ_BYTES).split(b"\n")
        except FileNotFoundError:
            return
        for line in reversed(lines):
            try:
                entry = json.loads(line)
            except ValueError:  # the last words of a writer that was killed, or the cut at the beginning
                continue
            if isinstance(entry, dict):
                yield entry
