"""The files of a profile directory: the current version of each profile, and those that are kept.

    NAME.safetensors                                the current version
    .trimtab/profiles/NAME/SHA256.safetensors       a copy of each version that is kept, the current one too
    .trimtab/profiles/NAME/record.json              when and by whom each was published, and the aliases
    .trimtab/audit.jsonl                            the audit log
    .trimtab/uploads/                               what is being received
    .trimtab/lock                                   held while anything is changed

Copies are files of their own, because a file that is overwritten in place would change what is linked to it. Every file
is written whole, so a process that is killed leaves the old file or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.engines.errors import Unavailable, UnknownProfile
from server.profiles.audit import AuditLog, Author
from server.profiles.references import Alias
from steering_vectors.errors import ProfileError, RequestError
from steering_vectors.profiles.durable import TEMPORARY, sync_directory, write_whole
from steering_vectors.profiles.files import SUFFIX, read_profile, read_regular
from steering_vectors.profiles.profile import NAME_PATTERN, NAME_RULE, Profile

STATE = ".trimtab"
RECORD = "record.json"
UNREADABLE = "unreadable"  # in place of the version of what is no file, or too large for a profile
LOCK_SECONDS = 5.0
OLD_SECONDS = 3600.0  # from which a hidden temporary file of another program counts as left behind
MAX_NAMED = 3  # versions that an error proposes to delete
MOUNT = (
    "mount it writable (Docker: PROFILES_MODE=rw; see docs/deployment.md), or publish by putting files into it from "
    "outside"
)


class ReadOnlyDirectory(RequestError):
    code = "profiles_read_only"
    status: ClassVar[int] = 409  # a 403 would be the key's fault


class QuotaExceeded(RequestError):
    code = "quota_exceeded"
    status: ClassVar[int] = 413


class DiskFull(RequestError):
    code = "disk_full"
    status: ClassVar[int] = 507


class Publication(BaseModel):
    """When a version was published last, and by whom; None for whoever put a file there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: str
    by: str | None = None
    size: int = 0


class Record(BaseModel):
    """What is known of a profile besides its file. `versions` are in the order of their publication, the latest last;
    `current` is the version that was published last, as far as this was noted."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    current: str | None = None
    versions: dict[str, Publication] = Field(default_factory=dict)
    aliases: dict[str, Alias] = Field(default_factory=dict)

    def publish(self, version: str, size: int, author: Author) -> Self:
        """The record after a version was published."""
        rest = {one: known for one, known in self.versions.items() if one != version}
        return self.model_copy(
            update={
                "current": version,
                "versions": {**rest, version: Publication(at=now(), by=author.shown, size=size)},
            }
        )

    def without(self, versions: Collection[str]) -> Self:
        return self.model_copy(
            update={"versions": {one: known for one, known in self.versions.items() if one not in versions}}
        )


NOTHING = Record()


class Upload:
    """A file that is being received. It is locked, so that nobody takes it for one that was left behind."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._file = path.open("xb")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def version(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> None:
        """Make it durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Remove it, unless it was renamed. May be called again."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self.path.unlink()


class ProfileStore:
    """The files of one directory. Called in threads. What changes files is called within `changing`, which holds off
    other servers of the directory. `max_versions` is the number of replaced versions of a profile that are kept, and
    `quota` limits the bytes of all files."""

    def __init__(
        self,
        directory: Path,
        shipped: Mapping[str, Path] | None = None,
        *,
        max_versions: int = 5,
        quota: int = 2**30,
        audit_log: Path | None = None,
    ) -> None:
        self.directory = directory
        self.max_versions = max_versions
        self.quota = quota
        self._shipped = dict(shipped or {})
        self._state = directory / STATE
        self._uploads = self._state / "uploads"
        self.audit = AuditLog(audit_log or self._state / "audit.jsonl")

    def path(self, name: str) -> Path:
        """The file of a profile. Raises RequestError for what is no name of one, and so for every other path."""
        return self.directory / f"{checked_name(name)}{SUFFIX}"

    def clean(self) -> None:
        """Remove what processes that were killed left behind. Raises OSError, and Unavailable if another server
        changes the directory all the time."""
        if self._state.is_dir():
            with self.changing():
                for path in self._uploads.glob("*"):
                    _remove_unlocked(path)
                for path in (self._state / "profiles").glob(f"*/.*{TEMPORARY}"):
                    path.unlink(missing_ok=True)
        last = time.time() - OLD_SECONDS
        for path in self.directory.glob(f".*{TEMPORARY}"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < last:
                    path.unlink()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Be the only one that changes the directory. Raises ReadOnlyDirectory, DiskFull and Unavailable, also for an
        OSError inside."""
        try:
            self._uploads.mkdir(parents=True, exist_ok=True)
            with FileLock(self._state / "lock", timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise Unavailable("another server is changing the profile directory: try again later") from error
        except OSError as error:
            raise storage_error(error) from error

    def receive(self) -> Upload:
        """A new upload. Raises ReadOnlyDirectory, DiskFull and Unavailable."""
        try:
            self._uploads.mkdir(parents=True, exist_ok=True)
            return Upload(self._uploads / secrets.token_hex(12))
        except OSError as error:
            raise storage_error(error) from error

    def on_disk(self, name: str) -> str | None:
        """The version of a profile's file; None if there is none. Raises OSError."""
        try:
            return hashlib.sha256(read_regular(self.path(name))).hexdigest()
        except FileNotFoundError:
            return None
        except ProfileError:
            return UNREADABLE

    def shipped(self, name: str) -> str | None:
        """The version of the shipped profile of a name."""
        return shipped_version(self._shipped[name]) if name in self._shipped else None

    def current(self, name: str) -> str | None:
        """The version of a profile's file, or else of the shipped profile. Raises OSError."""
        found = self.on_disk(name)
        return self.shipped(name) if found is None else found

    def record(self, name: str) -> Record:
        """What is known of a profile. A record that is missing or unreadable is made from the files. Raises OSError."""
        folder = self._folder(name)
        try:
            return Record.model_validate_json((folder / RECORD).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            pass
        files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
        versions = {path.stem: path.stat() for path in files if len(path.stem) == 64}
        known = {
            version: Publication(at=_time(status.st_mtime), size=status.st_size) for version, status in versions.items()
        }
        return Record(versions=known) if known else NOTHING

    def record_marks(self) -> dict[str, tuple[int, int]]:
        """What tells one state of each profile's record from the next, by name."""
        marks = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self._state / "profiles") as folders:
            for folder in folders:
                if NAME_PATTERN.fullmatch(folder.name):
                    with suppress(OSError):
                        status = (Path(folder.path) / RECORD).stat()
                        marks[folder.name] = (status.st_mtime_ns, status.st_ino)
        return marks

    def read(self, name: str, version: str) -> bytes:
        """The bytes of a version: of the current file, a kept copy or the shipped file. Raises UnknownProfile."""
        for path in (self._copy(name, version), self.path(name), self._shipped.get(name)):
            if path is not None:
                with suppress(OSError, ProfileError):
                    data = read_regular(path)
                    if hashlib.sha256(data).hexdigest() == version:
                        return data
        raise UnknownProfile(f"version {version[:8]} of profile {name!r} is not there any more")

    def load(self, name: str, version: str) -> Profile:
        """A version as a profile. Raises UnknownProfile and ProfileError."""
        return read_profile(self.read(name, version), name)

    def find(self, name: str, text: str) -> str:
        """The version whose sha256 begins with a text of at least 8 digits. Raises UnknownProfile."""
        known = dict.fromkeys([*self.record(name).versions, self.current(name), self.shipped(name)])
        found = [version for version in known if version is not None and version.startswith(text)]
        if len(found) != 1:
            problem = "several versions begin" if found else "no version that is kept begins"
            kept = ", ".join(version[:8] for version in known if version is not None) or "none"
            raise UnknownProfile(f"profile {name!r}: {problem} with {text[:64]!r}; there are: {kept}")
        return found[0]

    def note(self, name: str, loaded: str | None, in_use: Collection[str]) -> Record:
        """Note what somebody has done to a profile's file, of which `loaded` is the version that is served, and keep a
        copy. Returns the record. Raises OSError, ReadOnlyDirectory, DiskFull and Unavailable."""
        record, version = self.record(name), self.on_disk(name)
        if version is not None and version != loaded:  # invalid, or it has changed again
            return record
        if record.current == version and (version is None or self._is_kept(name, version)):
            return record
        with self.changing():
            record = self.record(name)
            if self.on_disk(name) != version:
                return record
            if version is not None:
                data = self.read(name, version)
                with suppress(QuotaExceeded):  # the file is there already: only its copy is left out
                    self.check_quota(name, version, len(data), record, in_use)
                    self.keep(name, version, data)
            if record.current != version:
                action = "removed" if version is None else "found"
                self.write_audit(action, name, record.current, version, Author())
                gone = record.model_copy(update={"current": None})
                record = gone if version is None else record.publish(version, len(data), Author())
                self.write_record(name, record)
            return self.forget(name, record, self.surplus(name, record, in_use))

    # Within `changing`.

    def write_audit(
        self, action: str, name: str, before: str | None, after: str | None, author: Author, **more: Any
    ) -> None:
        """Add a line: who has changed what, when, from which version to which. Raises DiskFull and Unavailable."""
        entry = {
            "at": now(),
            "action": action,
            "profile": name,
            "from_version": before,
            "to_version": after,
            "key": author.key,
            "address": author.address,
            "request_id": author.request_id,
            **more,
        }
        try:
            self.audit.append(entry)
        except OSError as error:
            failure = storage_error(error)
            if isinstance(failure, DiskFull):
                raise failure from error
            reason = error.strerror or type(error).__name__
            raise Unavailable(f"the audit log cannot be written ({reason}): check --audit-log") from error

    def keep(self, name: str, version: str, data: bytes, *, always: bool = False) -> None:
        """Keep a copy of a version, if replaced versions are kept or it is `always` to be. Raises OSError."""
        copy = self._copy(name, version)
        if (self.max_versions or always) and not copy.exists():
            _make(copy.parent)
            write_whole(copy, data)

    def write_record(self, name: str, record: Record) -> None:
        """Raises OSError."""
        folder = self._folder(name)
        if record == NOTHING:
            (folder / RECORD).unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()
            return
        _make(folder)
        write_whole(folder / RECORD, record.model_dump_json(indent=1).encode())

    def place(self, name: str, upload: Upload) -> None:
        """Make an upload the current version. Raises OSError."""
        upload.path.replace(self.path(name))
        sync_directory(self.directory)

    def remove(self, name: str) -> None:
        """Remove the current version. Raises OSError."""
        self.path(name).unlink()
        sync_directory(self.directory)

    def surplus(self, name: str, record: Record, in_use: Collection[str]) -> list[str]:
        """The versions of a record that are not kept: all but the current one, the latest, and those in use or with an
        alias."""
        pinned = {record.current, *in_use, *(alias.version for alias in record.aliases.values())}
        replaced = [version for version in reversed(record.versions) if version != record.current]
        return [version for version in replaced[self.max_versions :] if version not in pinned]

    def forget(self, name: str, record: Record, versions: Collection[str]) -> Record:
        """Delete kept versions; returns the record without them. Raises OSError."""
        if not versions:
            return record
        left = record.without(versions)
        self.write_record(name, left)
        for version in versions:
            self._copy(name, version).unlink(missing_ok=True)
        return left

    def check_quota(self, name: str, version: str, size: int, record: Record, in_use: Collection[str]) -> None:
        """Raise QuotaExceeded if a new current version, and a copy of it, would be too much."""
        target, copy = self.path(name), self._copy(name, version)
        surplus = self.surplus(name, record.publish(version, size, Author()), in_use)
        freed = sum(_size(self._copy(name, one)) for one in surplus)
        freed += target.stat().st_size if target.is_file() else 0
        added = size + (size if self.max_versions and not copy.exists() else 0)
        total = self._usage() + added - freed
        if total > self.quota:
            raise QuotaExceeded(
                f"the profile directory would hold {total} bytes, of at most {self.quota} (--profile-quota-bytes): "
                f"delete {self._largest(in_use)}"
            )

    def _usage(self) -> int:
        """The bytes of all profiles and kept versions."""
        files = [*self.directory.glob(f"[!.]*{SUFFIX}"), *(self._state / "profiles").glob(f"*/*{SUFFIX}")]
        return sum(_size(path) for path in files)

    def _largest(self, in_use: Collection[str]) -> str:
        """What to delete: the largest of the versions that could be, or else profiles."""
        found: list[tuple[int, str]] = []
        for folder in (self._state / "profiles").glob("*"):
            if NAME_PATTERN.fullmatch(folder.name):
                record, current = self.record(folder.name), self.current(folder.name)
                pinned = {current, *in_use, *(alias.version for alias in record.aliases.values())}
                found += [
                    (one.size, f"/profiles/{folder.name}/versions/{version[:8]} ({one.size} bytes)")
                    for version, one in record.versions.items()
                    if version not in pinned
                ]
        if not found:
            files = list(self.directory.glob(f"[!.]*{SUFFIX}"))
            found = [(_size(path), f"/profiles/{path.stem} ({_size(path)} bytes)") for path in files]
        named = [text for _, text in sorted(found, reverse=True)[:MAX_NAMED]]
        return ", ".join(named) or "files in it"

    def _is_kept(self, name: str, version: str) -> bool:
        return not self.max_versions or self._copy(name, version).exists()

    def _folder(self, name: str) -> Path:
        return self._state / "profiles" / checked_name(name)

    def _copy(self, name: str, version: str) -> Path:
        return self._folder(name) / f"{version}{SUFFIX}"


def checked_name(name: str) -> str:
    """A name that a profile may have, and so no path. Raises RequestError."""
    if not NAME_PATTERN.fullmatch(name):
        raise RequestError(f"{name[:80]!r} is no name of a profile: {NAME_RULE}", param="name", code="invalid_name")
    return name


def storage_error(error: OSError) -> RequestError:
    """What a client is told of a directory that cannot be written."""
    reason = error.strerror or type(error).__name__
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ReadOnlyDirectory(f"the profile directory cannot be written ({reason}): {MOUNT}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(f"the profile directory cannot take the file ({reason}): free space on its disk")
    return Unavailable(f"the profile directory cannot be written ({reason}): see its disk, or try again")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@cache
def shipped_version(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _make(folder: Path) -> None:
    """Make a folder that is still there after a crash. Raises OSError."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_directory(folder.parent)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _remove_unlocked(path: Path) -> None:
    """Remove an upload that nobody writes."""
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
