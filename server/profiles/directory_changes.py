"""What a change does to the files of a profile directory, whoever asks for it: a server or a command.

Each change is whole: its line in the audit log is durable before the change is, so no change is without one, and a
change that fails is taken back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from server.engines.errors import Conflict, UnknownProfile
from server.profiles.audit import Author
from server.profiles.references import VERSION_TEXT, Alias, unknown_alias
from server.profiles.versions import ProfileStore, Publication, Record, Upload, checked_name, now
from steering_vectors.errors import ProfileError, RequestError
from steering_vectors.profiles.files import read_profile

ETAG = re.compile(r'\s*(?P<weak>W/)?(?:"(?P<quoted>[^"]*)"|(?P<plain>[0-9a-f]{8,64}))\s*')

Action = Literal[
    "upload", "delete", "rollback", "alias", "unalias", "delete_version", "refine", "promote", "withdraw", "settle"
]


class PreconditionFailed(RequestError):
    code = "precondition_failed"
    status: ClassVar[int] = 412


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


class DirectoryChanges:
    """Changes the files of one directory. Called in threads. One change is carried out after the other, also among
    several processes. Raises RequestError, and what the store raises."""

    def __init__(self, store: ProfileStore) -> None:
        self._store = store

    def place(
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
            record = self.with_current_kept(name, store.record(name))
            store.check_quota(name, upload.version, upload.size, record, in_use)
            store.keep(name, upload.version, upload.path.read_bytes())
            made = record.publish(upload.version, upload.size, author)
            with self.recorded(action, name, record, made, before, upload.version, author, size=upload.size):
                store.place(name, upload)
            with suppress(OSError):  # it is published
                store.forget(name, made, store.surplus(name, made, in_use))
            return Change(before, upload.version)

    def delete(self, name: str, conditions: Conditions, author: Author) -> Change:
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
            record = self.with_current_kept(name, store.record(name))
            left = record.model_copy(update={"current": None, "aliases": {}})
            with self.recorded("delete", name, record, left, before, shipped, author):
                store.remove(name)
            return Change(before, shipped)

    def delete_version(
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

    def set_alias(
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
            with self.recorded("alias", name, record, changed, old, version, author, alias=alias, share=share):
                pass
            return made

    def delete_alias(self, name: str, alias: str, conditions: Conditions, author: Author) -> Alias:
        store = self._store
        with store.changing():
            record = store.record(name)
            if alias not in record.aliases:
                raise unknown_alias(name, alias, record.aliases)
            conditions.check(name, store.current(name))
            left = {one: known for one, known in record.aliases.items() if one != alias}
            changed = record.model_copy(update={"aliases": left})
            gone = record.aliases[alias]
            with self.recorded("unalias", name, record, changed, gone.version, None, author, alias=alias):
                pass
            return gone

    @contextmanager
    def recorded(
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
        """Write a change into the audit log and the record, then carry it out; if that fails, take both back. Within
        `changing`."""
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

    def with_current_kept(self, name: str, record: Record) -> Record:
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

    def earlier(self, name: str, text: str | None) -> str:
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

    def wanted(self, name: str, text: str | None) -> str:
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

    def copied(self, name: str, version: str) -> Upload:
        """A version as an upload."""
        upload = self._store.receive()
        try:
            upload.write(self._store.read(name, version))
            upload.finish()
        except BaseException:
            upload.discard()
            raise
        return upload

    def versions(self, name: str, in_use: Counter[str]) -> list[ListedVersion]:
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
