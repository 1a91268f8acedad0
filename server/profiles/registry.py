"""The profiles that are served: the files of a directory, which is watched, and the shipped ones of the model.

Putting a file there publishes it, removing it withdraws it. A bad file leaves the version that was served before. A
file with the name of a shipped profile takes its place. Requests keep the versions that they started with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from server.engines.errors import Unavailable, UnknownProfile
from server.engines.protocol import Engine
from steering_vectors.errors import ProfileError
from steering_vectors.profiles.files import SUFFIX, load_profile
from steering_vectors.profiles.profile import Profile

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
MAX_FILE_BYTES = 256 * 2**20  # a hundred blocks of width 16384 take 6.5 MB; what is near this is a model
REFERENCE = re.compile(r"(?P<name>[^#]+)(?:#(?P<version>[0-9a-f]{8,64}))?")


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
        self._refreshing = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Create the directory if it is missing, load what lies in it, and begin to watch. Raises ProfileError."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            await self.refresh()
        except OSError as error:
            raise ProfileError(
                f"the profile directory {self._directory} cannot be used ({error.strerror}); choose another"
            ) from error
        self._watcher = asyncio.create_task(self._watch(), name="trimtab-profiles")

    async def stop(self) -> None:
        """Stop watching, and let the engine forget what was served."""
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        served, self._entries, self._known = self.served, {}, {}
        with suppress(Unavailable):
            for profile in served:
                await self._engine.unload_profile(profile.version)

    async def refresh(self) -> None:
        """Look at the directory once and load every change there is, settled or not. Raises OSError."""
        found = await asyncio.to_thread(self._scan)
        await self._apply(found, present=set(found))

    @property
    def entries(self) -> list[ProfileEntry]:
        """What lies in the directory, served or rejected, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    @property
    def served(self) -> list[Profile]:
        return [entry.profile for entry in self.entries if entry.profile is not None]

    def entry(self, name: str, *, param: str | None = None) -> ProfileEntry:
        """The entry of a name, also of a rejected file. Raises UnknownProfile."""
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
        previous, troubled = dict(self._known), False
        while True:
            await asyncio.sleep(self._interval)
            try:
                found = await asyncio.to_thread(self._scan)
                settled = {name: mark for name, mark in found.items() if previous.get(name) == mark}
                await self._apply(settled, present=set(found))
                previous, troubled = found, False
            except Exception:  # whatever happens to the directory, what is served stays served
                if not troubled:
                    logger.exception("the profile directory %s cannot be read", self._directory)
                troubled = True

    def _scan(self) -> dict[str, Signature]:
        shipped = {name: signature_of(path.stat()) for name, path in self._shipped.items()}
        return {**shipped, **scan(self._directory)}

    async def _apply(self, found: dict[str, Signature], *, present: set[str]) -> None:
        async with self._refreshing:
            for name, signature in found.items():
                if self._known.get(name) != signature:
                    await self._swap(name, await self._load(name, signature.size))
                    self._known[name] = signature
            for name in set(self._entries) - present:
                await self._swap(name, None)

    async def _load(self, name: str, size: int) -> ProfileEntry:
        """The entry of a file of this many bytes. The engine holds its profile."""
        current = self._entries[name].profile if name in self._entries else None
        path = self._directory / f"{name}{SUFFIX}"
        if not path.exists():
            path = self._shipped.get(name, path)
        try:
            if size > MAX_FILE_BYTES:
                raise ProfileError(f"{path} has {size} bytes, which is too large for a profile; is it a model?")
            profile = await asyncio.to_thread(load_profile, path)
            if current is not None and current.version == profile.version:
                profile = current
            else:
                await self._engine.load_profile(profile)
                self.loads += 1
            return ProfileEntry(name, profile)
        except ProfileError as error:
            self.rejections += 1
            logger.warning("profile %r is rejected: %s", name, error.message)
            # clients see names, not where the server keeps its files
            return ProfileEntry(name, current, error.message.replace(f"{path.parent}/", ""))

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


def scan(directory: Path) -> dict[str, Signature]:
    """The profile files of a directory by name; dot-files and other suffixes do not count. Raises OSError."""
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.endswith(SUFFIX):
                continue
            with suppress(FileNotFoundError):
                if entry.is_file():
                    found[entry.name.removesuffix(SUFFIX)] = signature_of(entry.stat())
    return found


def signature_of(status: os.stat_result) -> Signature:
    return Signature(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
