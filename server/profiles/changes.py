"""Changes of the profile directory by requests: upload, delete, rollback and aliases.

A change is checked before anything is published, and a refused one changes nothing. Its line in the audit log is
durable before the change is, so no change is without one.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from server.engines.errors import Conflict, Overloaded, UnknownProfile
from server.engines.pool import DaemonPool
from server.engines.protocol import Engine
from server.profiles.audit import Author
from server.profiles.references import VERSION_TEXT, Alias, checked_alias, unknown_alias
from server.profiles.registry import ProfileRegistry
from server.profiles.versions import (
    ProfileStore,
    Publication,
    Record,
    Upload,
    checked_name,
    now,
    storage_error,
)
from steering_vectors.errors import ProfileError, RequestError, TrimtabError
from steering_vectors.profiles.files import MAX_FILE_BYTES, MAX_HEADER_BYTES, read_profile
from steering_vectors.profiles.profile import Profile

logger = logging.getLogger(__name__)

MAX_UPLOADS = 4  # at once
MAX_WAITING = 64  # changes
WRITE_BYTES = 2**20
TOO_LARGE = f"the file has more than {MAX_FILE_BYTES} bytes: it is no profile; is it a model?"
ETAG = re.compile(r'\s*(?P<weak>W/)?(?:"(?P<quoted>[^"]*)"|(?P<plain>[0-9a-f]{8,64}))\s*')

Action = Literal["upload", "delete", "rollback", "alias", "unalias", "delete_version"]
Result = TypeVar("Result")


class PreconditionFailed(RequestError):
    code = "precondition_failed"
    status: ClassVar[int] = 412


class UploadTooLarge(RequestError):
    code = "body_too_large"
    status: ClassVar[int] = 413


@dataclass(frozen=True, slots=True)
class Conditions:
    """The headers If-Match and If-None-Match. Versions may be cut to 8 digits, and need no quotes."""

    if_match: str | None = None
    if_none_match: str | None = None

    def check(self, name: str, current: str | None) -> None:
        """Raise PreconditionFailed unless they hold for the current version of a profile, and RequestError if they
        cannot be read."""
        state = "does not exist" if current is None else f"has the version {current}"
        if self.if_match is not None and not _matches("if-match", self.if_match, current):
            raise PreconditionFailed(
                f"profile {name!r} {state}, which if-match does not allow: look at it again, then repeat the change",
                param="if-match",
            )
        if self.if_none_match is not None and _matches("if-none-match", self.if_none_match, current):
            raise PreconditionFailed(
                f"profile {name!r} {state}, which if-none-match does not allow: leave it out to replace the profile",
                param="if-none-match",
            )


@dataclass(frozen=True, slots=True)
class Change:
    """What a change did. `before` and `after` are versions, None where there is no profile."""

    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class ListedVersion:
    version: str
    published: Publication | None  # None for a shipped profile
    current: bool
    shipped: bool
    aliases: tuple[str, ...]
    in_use: int  # generations that run with it


class ProfileChanges:
    """Changes one directory, for the registry that serves it. Methods are called from the event loop. One change is
    carried out after the other, also among several servers. They raise RequestError, and what the store raises."""

    def __init__(self, store: ProfileStore, registry: ProfileRegistry, engine: Engine) -> None:
        self._store = store
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
            version = await self._run(lambda: self._earlier(name, text))
            profile = await self._run(lambda: self._store.load(name, version))
            async with self._checked(profile):
                upload = await self._run(lambda: self._copied(name, version))
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
            change = await self._run(lambda: self._delete(name, conditions, author))
            await self._registry.look_at(name)
            return change

    async def delete_version(self, name: str, text: str, conditions: Conditions, author: Author) -> str:
        """Delete a version that was replaced; returns it."""
        with self._counted("delete_version", name, author):
            in_use = frozenset(self._registry.in_use)
            version = await self._run(lambda: self._delete_version(name, text, in_use, conditions, author))
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
            version = await self._run(lambda: self._wanted(name, text))
            if entry.profile is None or entry.profile.version != version:
                profile = await self._run(lambda: self._store.load(name, version))
                async with self._checked(profile):
                    pass
            made = await self._run(lambda: self._set_alias(name, alias, version, share, conditions, author))
            await self._registry.look_at(name)
            return made

    async def delete_alias(self, name: str, alias: str, conditions: Conditions, author: Author) -> Alias:
        with self._counted("unalias", name, author):
            gone = await self._run(lambda: self._delete_alias(name, alias, conditions, author))
            await self._registry.look_at(name)
            return gone

    async def versions(self, name: str) -> list[ListedVersion]:
        """The versions of a profile, also of one that was deleted, the latest first. Raises UnknownProfile."""
        in_use = self._registry.in_use
        found = await self._run(lambda: self._versions(checked_name(name), in_use))
        if not found:
            raise UnknownProfile(f"profile {name!r} is not served, and no version of it is kept", param="name")
        return found

    async def file(self, name: str, text: str | None) -> tuple[str, bytes]:
        """A version, by default the current one, and the bytes of its file."""

        def read() -> tuple[str, bytes]:
            version = self._wanted(name, text)
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
        return await self._run(lambda: self._place(action, name, upload, conditions, author, in_use))

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

    # In a thread.

    def _place(
        self,
        action: Action,
        name: str,
        upload: Upload,
        conditions: Conditions,
        author: Author,
        in_use: frozenset[str],
    ) -> Change:
        """Make an upload the current version, keep the one before, and forget what is too old."""
        store = self._store
        with store.changing():
            before = store.current(name)
            conditions.check(name, before)
            if store.on_disk(name) == upload.version:
                return Change(before, before)
            record = self._with_current_kept(name, store.record(name))
            store.check_quota(name, upload.version, upload.size, record, in_use)
            store.keep(name, upload.version, upload.path.read_bytes())
            made = record.publish(upload.version, upload.size, author)
            with self._recorded(action, name, record, made, before, upload.version, author, size=upload.size):
                store.place(name, upload)
            with suppress(OSError):  # it is published
                store.forget(name, made, store.surplus(name, made, in_use))
            return Change(before, upload.version)

    def _delete(self, name: str, conditions: Conditions, author: Author) -> Change:
        store = self._store
        with store.changing():
            before, shipped = store.on_disk(name), store.shipped(name)
            conditions.check(name, before or shipped)
            if before is None and shipped is not None:
                raise Conflict(
                    f"profile {name!r} comes with trimtab and has no file that could be deleted: upload one of its "
                    "name to replace it",
                    param="name",
                )
            if before is None:
                raise UnknownProfile(f"profile {name!r} has no file in the profile directory", param="name")
            record = self._with_current_kept(name, store.record(name))
            left = record.model_copy(update={"current": None, "aliases": {}})
            with self._recorded("delete", name, record, left, before, shipped, author):
                store.remove(name)
            return Change(before, shipped)

    def _delete_version(
        self, name: str, text: str, in_use: frozenset[str], conditions: Conditions, author: Author
    ) -> str:
        store = self._store
        with store.changing():
            version, record = store.find(name, _version_text(text)), store.record(name)
            conditions.check(name, store.current(name))
            aliases = [alias for alias, one in record.aliases.items() if one.version == version]
            problem = None
            if version == store.current(name):
                problem = "is the current one: replace or delete the profile first"
            elif aliases:
                problem = f"has the alias {aliases[0]!r}: move or delete that first"
            elif version in in_use:
                problem = "is in use by a running generation: try again later"
            elif version not in record.versions:
                problem = "comes with trimtab"
            if problem is not None:
                raise Conflict(f"version {version[:8]} of profile {name!r} {problem}", param="version")
            store.write_audit("delete_version", name, version, None, author)
            store.forget(name, record, [version])
            return version

    def _set_alias(
        self, name: str, alias: str, version: str, share: float | None, conditions: Conditions, author: Author
    ) -> Alias:
        store = self._store
        with store.changing():
            conditions.check(name, store.current(name))
            record = store.record(name)
            before = record.aliases.get(alias)
            share = (before.share if before else 0.0) if share is None else share
            made = Alias(version=version, share=share, at=now(), by=author.shown)
            aliases = {**record.aliases, alias: made}
            if (total := sum(one.share for one in aliases.values())) > 1 + 1e-9:
                raise RequestError(
                    f"the shares of the aliases of profile {name!r} would add up to {total:g}, which is more than 1",
                    param="share",
                )
            data = store.read(name, version)
            store.keep(name, version, data, always=True)
            if version not in record.versions:
                known = Publication(at=now(), size=len(data))
                record = record.model_copy(update={"versions": {version: known, **record.versions}})
            changed = record.model_copy(update={"aliases": aliases})
            old = None if before is None else before.version
            with self._recorded("alias", name, record, changed, old, version, author, alias=alias, share=share):
                pass
            return made

    def _delete_alias(self, name: str, alias: str, conditions: Conditions, author: Author) -> Alias:
        store = self._store
        with store.changing():
            record = store.record(name)
            if alias not in record.aliases:
                raise unknown_alias(name, alias, record.aliases)
            conditions.check(name, store.current(name))
            left = {one: known for one, known in record.aliases.items() if one != alias}
            changed = record.model_copy(update={"aliases": left})
            gone = record.aliases[alias]
            with self._recorded("unalias", name, record, changed, gone.version, None, author, alias=alias):
                pass
            return gone

    @contextmanager
    def _recorded(
        self,
        action: Action,
        name: str,
        before: Record,
        after: Record,
        old: str | None,
        new: str | None,
        author: Author,
        **more: Any,
    ) -> Iterator[None]:
        """Write a change into the audit log and the record, then carry it out; if that fails, take both back."""
        store = self._store
        store.write_audit(action, name, old, new, author, **more)
        try:
            store.write_record(name, after)
            yield
        except BaseException as error:
            with suppress(OSError):
                store.write_record(name, before)
            with suppress(OSError, RequestError):
                store.write_audit(f"{action}_failed", name, old, new, author, error=str(error))
            raise

    def _with_current_kept(self, name: str, record: Record) -> Record:
        """The record, with a copy of the current file even if nobody has noted it yet."""
        version = self._store.on_disk(name)
        if version is None or not self._store.max_versions or version == record.current:
            return record
        try:
            data = self._store.read(name, version)
            read_profile(data, name)
        except (UnknownProfile, ProfileError):  # it never was served
            return record
        self._store.keep(name, version, data)
        return record.publish(version, len(data), Author())

    def _earlier(self, name: str, text: str | None) -> str:
        """The version to go back to."""
        checked_name(name)
        if text is not None:
            return self._store.find(name, _version_text(text))
        record, current, shipped = self._store.record(name), self._store.current(name), self._store.shipped(name)
        found = [version for version in record.versions if version != current]
        if not found and shipped not in (None, current):
            found = [str(shipped)]
        if not found:
            raise UnknownProfile(f"no earlier version of profile {name!r} is kept", param="version")
        return found[-1]

    def _wanted(self, name: str, text: str | None) -> str:
        """The version of a text, which is the beginning of one or an alias; by default the current one."""
        checked_name(name)
        if text is not None and not VERSION_TEXT.fullmatch(text):
            aliases = self._store.record(name).aliases
            if text not in aliases:
                raise unknown_alias(name, text[:80], aliases)
            return aliases[text].version
        if text is not None:
            return self._store.find(name, text)
        if (current := self._store.current(name)) is None:
            raise UnknownProfile(f"profile {name!r} is not served", param="name")
        return current

    def _copied(self, name: str, version: str) -> Upload:
        """A version as an upload."""
        upload = self._store.receive()
        try:
            upload.write(self._store.read(name, version))
            upload.finish()
        except BaseException:
            upload.discard()
            raise
        return upload

    def _versions(self, name: str, in_use: Counter[str]) -> list[ListedVersion]:
        store = self._store
        record, current, shipped = store.record(name), store.current(name), store.shipped(name)
        known: dict[str, Publication | None] = dict(reversed(record.versions.items()))
        for version in (current, shipped):
            if version is not None and version not in known:
                known = {version: None, **known} if version == current else {**known, version: None}
        return [
            ListedVersion(
                version,
                published,
                version == current,
                version == shipped,
                tuple(sorted(alias for alias, one in record.aliases.items() if one.version == version)),
                in_use[version],
            )
            for version, published in known.items()
        ]


def _matches(header: str, value: str, current: str | None) -> bool:
    """Whether the current version is among the entity tags of a header. Weak ones match nothing (RFC 9110)."""
    if value.strip() == "*":
        return current is not None
    found = [ETAG.fullmatch(part) for part in value.split(",")]
    if any(match is None for match in found):
        raise RequestError(f'{header} must be * or versions, such as "fb09e9ae", not {value[:80]!r}', param=header)
    texts = [match["quoted"] or match["plain"] or "" for match in found if match is not None and not match["weak"]]
    return current is not None and any(len(text) >= 8 and current.startswith(text) for text in texts)


def _version_text(text: str) -> str:
    if not VERSION_TEXT.fullmatch(text):
        raise RequestError(f"{text[:80]!r} is no version: give at least 8 of its hexadecimal digits", param="version")
    return text


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
