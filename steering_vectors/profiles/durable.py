"""Files that are written whole, and are there after a crash."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".tmp"  # the suffix of hidden files that are being written


def write_whole(target: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the new one, also after a crash. Raises OSError."""
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_directory(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_directory(directory: Path) -> None:
    """Make the names of a directory durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
