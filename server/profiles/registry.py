"""The profiles that are served: the files of a directory, which is watched, and the shipped ones of the model.

Putting a file there publishes it, removing it withdraws it. A bad file leaves the version that was served before, and
no file keeps another from being served. A file with the name of a shipped profile takes its place. Requests keep the
versions that they started with.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from server.engines.errors import Unavailable, UnknownProfile
from server.engines.pool import DaemonPool
from server.engines.protocol import Engine
from steering_vectors.errors import ProfileError
from steering_vectors.profiles.files import SUFFIX, load_profile
from steering_vectors.profiles.profile import NAME_PATTERN, Profile

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
READ_SECONDS = 10.0  # after which a directory or a file counts as one that cannot be read
NAME_RULE = "names have a to z, 0 to 9, dots, hyphens and underscores, up to 64"
REFERENCE = re.compile(r"(?P<name>[^#]+)(?:#(?P<version>[0-9a-f]{8,64}))?")


Result = TypeVar("Result")


class Signature(NamedTuple):
    """What tells one state of a file from the next without reading it."""

    modified: int
    changed: int
    size: int
    inode: int


@dataclass(frozen=True, slots=True, eq=False)
class ProfileEntry:
    """One file of the directory: `profile` is the version served, `error` says why the newest file was refused."""

    name: str
    profile: Profile | None
    error: str | None = None

    @property
    def status(self) -> Literal["served", "rejected"]:
        return "served" if self.error is None else "rejected"


class ProfileRegistry:
    """Keeps the current version of every profile in `directory`, and of the `shipped` files by name. All methods are
    called from the event loop.

    A file that appears or changes is read in a thread, once two polls in a row found it unchanged, then checked
    by the engine, and swapped in whole. `changed` is called with the names of all that are served when that changes.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        *,
        shipped: Mapping[str, Path] | None = None,
        interval: float = POLL_SECONDS,
        changed: Callable[[Collection[str]], None] | None = None,
    ) -> None:
        self._directory = directory
        self._shipped = dict(shipped or {})
        self._engine = engine
        self._interval = interval
        self._changed = changed
        self.loads = 0  # versions that were loaded, since the start
        self.rejections = 0
        self._entries: dict[str, ProfileEntry] = {}
        self._known: dict[str, Signature] = {}
        self._unreadable: dict[str, str] = {}  # why, by name: what the last scan could not look at
        self._reading = DaemonPool(1, "trimtab-profiles")  # a file system that hangs holds nothing else
        self.problem: str | None = None  # why the directory cannot be read now
        self._refreshing = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Create the directory if it is missing, load what lies in it, and begin to watch. Raises ProfileError."""
        try:
            if await self._read(self._make_directory):
                logger.warning("the profile directory %s did not exist: an empty one was created", self._directory)
            await self.refresh()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ProfileError(
                f"the profile directory {self._directory} cannot be used ({reason}); choose another"
            ) from error
        if not self.served:
            logger.warning("no profile is served: the profile directory %s has none", self._directory)
        self._watcher = asyncio.create_task(self._watch(), name="trimtab-profiles")

    async def stop(self) -> None:
        """Stop watching, and let the engine forget what was served."""
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        self._reading.close()
        served, self._entries, self._known, self._unreadable = self.served, {}, {}, {}
        with suppress(Unavailable):
            for profile in served:
                await self._engine.unload_profile(profile.version)

    async def refresh(self) -> None:
        """Look at the directory once and load every change there is, settled or not. Raises OSError."""
        found = await self._read(self._scan)
        await self._apply(found, present=set(found))

    @property
    def entries(self) -> list[ProfileEntry]:
        """What lies in the directory, served or rejected, by name."""
        unread = {name: self._entry_with_error(name, reason) for name, reason in self._unreadable.items()}
        entries = {**self._entries, **unread}
        return [entries[name] for name in sorted(entries)]

    @property
    def rejected(self) -> list[str]:
        """The names of the files that are not served in their newest version."""
        return [entry.name for entry in self.entries if entry.error is not None]

    @property
    def served(self) -> list[Profile]:
        return [entry.profile for entry in self.entries if entry.profile is not None]

    def entry(self, name: str, *, param: str | None = None) -> ProfileEntry:
        """The entry of a name, also of a rejected file. Raises UnknownProfile."""
        if name in self._unreadable:
            return self._entry_with_error(name, self._unreadable[name])
        if name not in self._entries:
            raise UnknownProfile(f"profile {name!r} is not served; {self._advice()}", param=param)
        return self._entries[name]

    def find(self, reference: str, *, param: str = "steering") -> Profile:
        """The current profile of `NAME` or `NAME#SHA8`. Raises UnknownProfile, which names the request's field `param`,
        if it, or that version, is not served."""
        match = REFERENCE.fullmatch(reference)
        if match is None:
            raise UnknownProfile(f"{reference!r} is neither NAME nor NAME#SHA8; {self._advice()}", param=param)
        entry = self.entry(match["name"], param=param)
        if entry.profile is None:
            raise UnknownProfile(f"profile {entry.name!r} is not served: {entry.error}", param=param)
        wanted, version = match["version"] or "", entry.profile.version
        if not version.startswith(wanted):
            raise UnknownProfile(
                f"profile {entry.name!r} is served in version {version[:8]}, not in {wanted[:8]}", param=param
            )
        return entry.profile

    def _advice(self) -> str:
        names = ", ".join(profile.name for profile in self.served)
        return f"served are: {names}" if names else "no profile is served: put one into the profile directory"

    async def _watch(self) -> None:
        previous = dict(self._known)
        while True:
            await asyncio.sleep(self._interval)
            try:
                found = await self._read(self._scan)
                self.problem = None
                settled = {name: mark for name, mark in found.items() if previous.get(name) == mark}
                await self._apply(settled, present=set(found))
                previous = found
            except Exception as error:  # whatever happens to the directory, what is served stays served
                if self.problem is None:
                    logger.exception("the profile directory %s cannot be read", self._directory)
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                self.problem = f"the profile directory cannot be read ({reason})"

    async def _read(self, work: Callable[[], Result]) -> Result:
        """Run what touches the file system. Raises OSError if it takes too long."""
        try:
            return await asyncio.wait_for(self._reading.run(work), READ_SECONDS)
        except TimeoutError as error:
            raise OSError(errno.ETIMEDOUT, f"it has not answered in {READ_SECONDS:g} s") from error

    def _make_directory(self) -> bool:
        """Whether it was missing."""
        if self._directory.is_dir():
            return False
        self._directory.mkdir(parents=True, exist_ok=True)
        return True

    def _scan(self) -> dict[str, Signature]:
        found: dict[str, Signature] = {}
        unreadable: dict[str, str] = {}
        for name, path in self._shipped.items():
            with suppress(OSError):
                found[name] = signature_of(path.stat())
        found |= scan(self._directory, unreadable)
        for name in unreadable.keys() - self._unreadable.keys():
            logger.warning("profile %r is rejected: %s", name, unreadable[name])
        self._unreadable = unreadable
        return found

    def _entry_with_error(self, name: str, reason: str) -> ProfileEntry:
        known = self._entries.get(name)
        return ProfileEntry(name, None if known is None else known.profile, reason)

    async def _apply(self, found: dict[str, Signature], *, present: set[str]) -> None:
        async with self._refreshing:
            for name, signature in found.items():
                if self._known.get(name) != signature:
                    with suppress(Unavailable):  # an engine that starts again is asked again
                        await self._swap(name, await self._load(name))
                        self._known[name] = signature
            for name in set(self._entries) - present - self._unreadable.keys():
                await self._swap(name, None)

    async def _load(self, name: str) -> ProfileEntry:
        """The entry of a file. The engine holds its profile. Raises Unavailable."""
        current = self._entries[name].profile if name in self._entries else None
        try:
            profile = await self._read(lambda: self._load_file(name))
            if current is not None and current.version == profile.version:
                profile = current
            else:
                await self._engine.load_profile(profile)
                self.loads += 1
            return ProfileEntry(name, profile)
        except ProfileError as error:
            # clients see names, not the server's directories
            message = error.message.replace(f"{self._directory}/", "")
        except Unavailable:
            raise
        except Exception as error:  # no file keeps another from being served
            logger.exception("profile %r cannot be read", name)
            message = f"it cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
        self.rejections += 1
        logger.warning("profile %r is rejected: %s", name, message)
        return ProfileEntry(name, current, message)

    def _load_file(self, name: str) -> Profile:
        path = self._directory / f"{name}{SUFFIX}"
        if not path.exists():
            path = self._shipped.get(name, path)
        return load_profile(path)

    async def _swap(self, name: str, entry: ProfileEntry | None) -> None:
        """Replace the entry of a name, and let the engine forget the profile that is no longer served."""
        before = self._entries.pop(name, None)
        if entry is None:
            self._known.pop(name, None)
        else:
            self._entries[name] = entry
        retired, serving = (one.profile if one is not None else None for one in (before, entry))
        if serving is retired:
            return
        if self._changed is not None:
            self._changed([profile.name for profile in self.served])
        if retired is not None:
            await self._engine.unload_profile(retired.version)
        logger.info("profile %r: version %s is served", name, serving.version[:8] if serving is not None else "none")


def scan(directory: Path, unreadable: dict[str, str]) -> dict[str, Signature]:
    """The profile files of a directory by name; dot-files and other suffixes do not count, nor do folders and links to
    nothing. Why an entry cannot be looked at goes into `unreadable`. Raises OSError for the directory."""
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.endswith(SUFFIX):
                continue
            name = entry.name.removesuffix(SUFFIX)
            try:
                status = entry.stat()
                if stat.S_ISDIR(status.st_mode):
                    continue
                if not NAME_PATTERN.fullmatch(name):
                    unreadable[printable(name)] = f"its file has a name that no profile has: rename it; {NAME_RULE}"
                elif not stat.S_ISREG(status.st_mode):
                    unreadable[name] = "it is not a regular file: put a profile there, or remove it"
                else:
                    found[name] = signature_of(status)
            except FileNotFoundError:
                continue
            except OSError as error:
                unreadable[printable(name)] = f"it cannot be read ({error.strerror})"
    return found


def printable(name: str) -> str:
    """A file's name without what a terminal or JSON could not take: escaped as in Python."""
    return name.encode("unicode_escape").decode("ascii")


def signature_of(status: os.stat_result) -> Signature:
    return Signature(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
