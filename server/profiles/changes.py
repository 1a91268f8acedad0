"""Changes of the profile directory by requests: upload, delete, rollback and aliases.

A change is checked, also by the engine, before anything is published, and a refused one changes nothing.
`directory_changes` carries it out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, TypeVar

from server.engines.errors import Overloaded, UnknownProfile
from server.engines.pool import DaemonPool
from server.engines.protocol import Engine
from server.profiles.audit import Author
from server.profiles.directory_changes import Action, Change, Conditions, DirectoryChanges, ListedVersion
from server.profiles.references import Alias, checked_alias
from server.profiles.registry import ProfileRegistry
from server.profiles.versions import ProfileStore, Upload, checked_name, storage_error
from steering_vectors.errors import ProfileError, RequestError, TrimtabError
from steering_vectors.profiles.files import MAX_FILE_BYTES, MAX_HEADER_BYTES, read_profile
from steering_vectors.profiles.profile import Profile

logger = logging.getLogger(__name__)

MAX_UPLOADS = 4  # at once
MAX_WAITING = 64  # changes
WRITE_BYTES = 2**20
TOO_LARGE = f"the file has more than {MAX_FILE_BYTES} bytes: it is no profile; is it a model?"

Result = TypeVar("Result")


class UploadTooLarge(RequestError):
    code = "body_too_large"
    status: ClassVar[int] = 413


class ProfileChanges:
    """Changes one directory, for the registry that serves it. Methods are called from the event loop. One change is
    carried out after the other, also among several servers. They raise RequestError, and what the store raises."""

    def __init__(self, store: ProfileStore, registry: ProfileRegistry, engine: Engine) -> None:
        self._store = store
        self._files = DirectoryChanges(store)
        self._registry = registry
        self._engine = engine
        self._receiving = DaemonPool(2, "trimtab-uploads")
        self._working = DaemonPool(1, "trimtab-changes", max_waiting=MAX_WAITING)
        self._uploads = 0
        self.counts: Counter[tuple[str, ...]] = Counter()  # changes by action and outcome

    def close(self) -> None:
        self._receiving.close()
        self._working.close()

    async def upload(self, name: str, chunks: AsyncIterator[bytes], conditions: Conditions, author: Author) -> Change:
        """Publish a profile file. It is received into a file, read, checked by the engine, and renamed into place."""
        with self._counted("upload", name, author):
            checked_name(name)
            async with self._received(chunks) as upload:
                profile = await self._run(lambda: _read_upload(name, upload))
                async with self._checked(profile):
                    change = await self._publish("upload", name, upload, conditions, author)
                    await self._registry.look_at(name)
            return change

    async def rollback(self, name: str, text: str | None, conditions: Conditions, author: Author) -> Change:
        """Publish a version again that was replaced: the one that begins with `text`, or the one before the current."""
        with self._counted("rollback", name, author):
            version = await self._run(lambda: self._files.earlier(name, text))
            profile = await self._run(lambda: self._store.load(name, version))
            async with self._checked(profile):
                upload = await self._run(lambda: self._files.copied(name, version))
                try:
                    change = await self._publish("rollback", name, upload, conditions, author)
                finally:
                    await self._run(upload.discard)
                await self._registry.look_at(name)
            return change

    async def delete(self, name: str, conditions: Conditions, author: Author) -> Change:
        """Remove a profile's file and its aliases. Kept versions stay, for a rollback; a shipped profile of the name is
        served again."""
        with self._counted("delete", name, author):
            checked_name(name)
            change = await self._run(lambda: self._files.delete(name, conditions, author))
            await self._registry.look_at(name)
            return change

    async def delete_version(self, name: str, text: str, conditions: Conditions, author: Author) -> str:
        """Delete a version that was replaced; returns it."""
        with self._counted("delete_version", name, author):
            in_use = frozenset(self._registry.in_use)
            version = await self._run(lambda: self._files.delete_version(name, text, in_use, conditions, author))
            await self._registry.look_at(name)
            return version

    async def set_alias(
        self, name: str, alias: str, text: str | None, share: float | None, conditions: Conditions, author: Author
    ) -> Alias:
        """Give a version, by default the current one, another name, and a share of the requests for the plain name. A
        share that is None stays what it was."""
        with self._counted("alias", name, author):
            checked_alias(alias)
            entry = self._registry.entry(name)
            version = await self._run(lambda: self._files.wanted(name, text))
            if entry.profile is None or entry.profile.version != version:
                profile = await self._run(lambda: self._store.load(name, version))
                async with self._checked(profile):
                    pass
            made = await self._run(lambda: self._files.set_alias(name, alias, version, share, conditions, author))
            await self._registry.look_at(name)
            return made

    async def delete_alias(self, name: str, alias: str, conditions: Conditions, author: Author) -> Alias:
        with self._counted("unalias", name, author):
            gone = await self._run(lambda: self._files.delete_alias(name, alias, conditions, author))
            await self._registry.look_at(name)
            return gone

    async def versions(self, name: str) -> list[ListedVersion]:
        """The versions of a profile, also of one that was deleted, the latest first. Raises UnknownProfile."""
        in_use = self._registry.in_use
        found = await self._run(lambda: self._files.versions(checked_name(name), in_use))
        if not found:
            raise UnknownProfile(f"profile {name!r} is not served, and no version of it is kept", param="name")
        return found

    async def file(self, name: str, text: str | None) -> tuple[str, bytes]:
        """A version, by default the current one, and the bytes of its file."""

        def read() -> tuple[str, bytes]:
            version = self._files.wanted(name, text)
            return version, self._store.read(name, version)

        return await self._run(read)

    async def log(self, limit: int, profile: str | None) -> list[dict[str, Any]]:
        """The latest changes, the newest first."""
        return await self._run(lambda: self._store.audit.read(limit, profile))

    async def _run(self, work: Callable[[], Result]) -> Result:
        """Do what touches files in a thread. An OSError becomes what a client is told."""
        try:
            return await self._working.run(work)
        except OSError as error:
            raise storage_error(error) from error

    @asynccontextmanager
    async def _received(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[Upload]:
        """A body as a file, which is removed at the end. Raises ProfileError as soon as it cannot be a profile."""
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} profiles are being uploaded already: try again later")
        self._uploads += 1
        upload: Upload | None = None
        try:
            upload = await self._receiving.run(self._store.receive)
            pending = b""
            async for chunk in chunks:
                pending += chunk
                if not upload.size and len(pending) >= 8:
                    _check_header(pending[:8])
                if upload.size + len(pending) > MAX_FILE_BYTES:
                    raise UploadTooLarge(TOO_LARGE)
                if len(pending) >= WRITE_BYTES:
                    await self._write(upload, pending)
                    pending = b""
            await self._write(upload, pending)
            await self._receiving.run(upload.finish)
            yield upload
        except OSError as error:
            raise storage_error(error) from error
        finally:
            self._uploads -= 1
            if upload is not None:
                upload.discard()

    async def _write(self, upload: Upload, data: bytes) -> None:
        await self._receiving.run(lambda: upload.write(data))

    @asynccontextmanager
    async def _checked(self, profile: Profile) -> AsyncIterator[None]:
        """Have the engine check a profile, and hold it for as long as the context lasts. Raises ProfileError."""
        zero = [layer for layer, direction in profile.directions.items() if not direction.any()]
        if len(zero) == len(profile.directions) or (zero and profile.operator == "ablate"):
            raise ProfileError(
                f"profile {profile.name!r}: the direction at layer {zero[0]} is zero, so it does nothing; fit it again"
            )
        await self._engine.load_profile(profile)
        try:
            yield
        finally:
            await self._engine.unload_profile(profile.version)

    async def _publish(
        self, action: Action, name: str, upload: Upload, conditions: Conditions, author: Author
    ) -> Change:
        in_use = frozenset(self._registry.in_use)
        return await self._run(lambda: self._files.place(action, name, upload, conditions, author, in_use))

    @contextmanager
    def _counted(self, action: Action, name: str, author: Author) -> Iterator[None]:
        """Count and log a change, or that it was refused."""
        who = {"profile": name[:80], "action": action, "key": author.key, "address": author.address}
        try:
            yield
        except BaseException as error:
            self.counts[action, "rejected"] += 1
            code = error.code if isinstance(error, TrimtabError) else type(error).__name__
            logger.warning("a change of a profile was refused", extra={**who, "reason": str(error)[:500], "code": code})
            raise
        self.counts[action, "done"] += 1
        logger.info("a profile was changed", extra=who)


def _check_header(begin: bytes) -> None:
    """Raise ProfileError for a header that is too long, before it is received."""
    length = int.from_bytes(begin, "little")
    if length > MAX_HEADER_BYTES:
        raise ProfileError(
            f"not a profile: its header would have {length} bytes, of at most {MAX_HEADER_BYTES}; send it as it is"
        )


def _read_upload(name: str, upload: Upload) -> Profile:
    """Raises ProfileError."""
    profile = read_profile(upload.path.read_bytes(), name, f"profile {name!r}")
    assert profile.version == upload.version
    return profile
