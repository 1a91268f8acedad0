"""The keys that a running server accepts: those of its key file, and one from its settings."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from server.access.keys import OF_SETTINGS, Key, KeyFileError, digest_of, read_keys

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKS = 1.0


class KeyRing:
    """Reads the key file again when it has changed, at most once a second. While the new file is not usable, the keys
    read before stay valid. A file without keys revokes them all."""

    def __init__(self, path: Path | None, secret: str | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeyFileError if the file is not usable, or if there is no key at all."""
        self._path = path
        self._own = [] if secret is None else [Key.plain(OF_SETTINGS, secret)]
        self._clock = clock
        self._checked = clock()
        self._seen = self._signature()
        self._of_file = [] if path is None else read_keys(path)
        if path is not None and not self._keys:
            raise KeyFileError(f"the API key file {path} holds no key: add one with `trimtab keys add NAME`")

    @property
    def is_required(self) -> bool:
        """Whether requests need a key: always, unless neither a file nor a key was set."""
        return self._path is not None or bool(self._own)

    def find(self, secret: bytes) -> Key | None:
        """The key with this text. Every digest is compared, each in constant time."""
        self._refresh()
        digest = digest_of(secret)
        matches = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return matches[0] if matches else None

    def named(self, names: Collection[str]) -> list[Key]:
        """Those of the keys that have these names, as of the last look at the file."""
        return [key for key in self._keys if key.name in names]

    @property
    def _keys(self) -> list[Key]:
        return [*self._own, *self._of_file]

    def _refresh(self) -> None:
        now = self._clock()
        if self._path is None or now - self._checked < SECONDS_BETWEEN_CHECKS:
            return
        self._checked = now
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._of_file = read_keys(self._path)
        except KeyFileError as error:
            logger.error("%s; the keys read before stay valid", error)
            return
        logger.info("read the API key file %s again: %d keys", self._path, len(self._of_file))
        if not self._of_file:
            logger.warning("the API key file %s holds no key any more: its keys are revoked", self._path)

    def _signature(self) -> tuple[int, ...] | None:
        """Changes with the file; None if it is not there."""
        try:
            found = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
