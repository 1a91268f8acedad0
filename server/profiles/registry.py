"""The profiles that are served: the files of a directory, which is watched, and the shipped ones of the model.

Putting a file there publishes it, removing it withdraws it. A bad file leaves the version that was served before, and
no file keeps another from being served. A file with the name of a shipped profile takes its place. Requests keep the
versions that they started with. Versions that were replaced are loaded again when a request or an alias names them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from server.engines.errors import Unavailable, UnknownProfile
from server.engines.pool import DaemonPool
from server.engines.protocol import Engine
from server.profiles.references import LATEST, STABLE, Alias, Draw, Reference, parse_reference, unknown_alias
from server.profiles.versions import NOTHING, ProfileStore, ReadOnlyDirectory, Record
from steering_vectors.errors import ProfileError, RequestError
from steering_vectors.profiles.files import SUFFIX, load_profile
from steering_vectors.profiles.profile import NAME_PATTERN, Profile

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
READ_SECONDS = 10.0  # after which a directory or a file counts as one that cannot be read
NAME_RULE = "names have a to z, 0 to 9, dots, hyphens and underscores, up to 64"
MAX_LOADED = 32  # versions that are not current, besides those of aliases and of what runs


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
    Without a `store`, there are no versions but the current ones.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        *,
        shipped: Mapping[str, Path] | None = None,
        interval: float = POLL_SECONDS,
        changed: Callable[[Collection[str]], None] | None = None,
        store: ProfileStore | None = None,
    ) -> None:
        self._directory = directory
        self._store = store
        self._shipped = dict(shipped or {})
        self._engine = engine
        self._interval = interval
        self._changed = changed
        self.loads = 0  # versions that were loaded, since the start
        self.rejections = 0
        self._entries: dict[str, ProfileEntry] = {}
        self._records: dict[str, Record] = {}
        self._marks: dict[str, tuple[int, int]] = {}  # the state of each record that was read
        self._kept: dict[str, Profile] = {}  # versions that the engine holds besides the current ones, the latest last
        self._kept_errors: dict[str, str] = {}  # why a version cannot be served
        self._loading_kept = asyncio.Lock()
        self._held: Counter[str] = Counter()  # versions that requests are about to use
        self._using: dict[str, set[str]] = {}  # versions by generation that runs
        self._not_noted: str | None = None  # why versions cannot be kept
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
            await self._clean()
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
        held = [*self.served, *self._kept.values()]
        self._entries, self._known, self._unreadable, self._kept = {}, {}, {}, {}
        with suppress(Unavailable):
            for profile in held:
                await self._engine.unload_profile(profile.version)

    async def refresh(self) -> None:
        """Look at the directory once and load every change there is, settled or not. Raises OSError."""
        found = await self._read(self._scan)
        await self._apply(found, present=set(found))
        await self._take_records()

    async def look_at(self, name: str) -> None:
        """Load what has been written for one profile: its file, or that it is gone, and its record. Raises OSError."""
        signature = await self._read(lambda: self._signature(name))
        self._unreadable.pop(name, None)
        async with self._refreshing:
            if signature is None:
                await self._swap(name, None)
            else:
                await self._update(name, signature)
        await self._take_records()

    @property
    def unreadable(self) -> int:
        """The number of files that cannot be looked at."""
        return len(self._unreadable)

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

    def find(self, text: str, *, param: str = "steering", draw: Draw | None = None) -> Profile:
        """The profile of `NAME`, `NAME#SHA8` or `NAME#ALIAS`. A plain name is the version of the alias `stable`, if
        there is one, or else the current version; with `draw`, another alias may have a share of it. Raises
        UnknownProfile, which names the request's field `param`, if it, or that version, is not served."""
        reference = parse_reference(text)
        if reference is None:
            forms = "neither NAME, NAME#SHA8 nor NAME#ALIAS"
            raise UnknownProfile(f"{text!r} is {forms}; {self._advice()}", param=param)
        entry = self.entry(reference.name, param=param)
        if entry.profile is None:
            raise UnknownProfile(f"profile {entry.name!r} is not served: {entry.error}", param=param)
        try:
            return self._of_reference(reference, entry.profile, draw)
        except UnknownProfile as error:
            error.param = param
            raise

    def record(self, name: str) -> Record:
        """What is known of the versions and aliases of a profile."""
        return self._records.get(name, NOTHING)

    @asynccontextmanager
    async def holding(self, references: Iterable[str]) -> AsyncIterator[None]:
        """Load the versions that some references may mean, unless they are current, and hold them until a request uses
        them. `find` says what could not be loaded. Raises Unavailable."""
        held: list[str] = []
        try:
            for text in references:
                name = text.partition("#")[0]
                for version in self._needed(text):
                    self._held[version] += 1
                    held.append(version)
                    await self._load_kept(name, version)
            yield
        finally:
            self._held -= Counter(held)

    def use(self, generations: Iterable[str], versions: Collection[str]) -> None:
        """Some generations run with these versions, until they are released."""
        for generation in generations:
            self._using[generation] = set(versions)

    def use_too(self, generation: str, versions: Collection[str]) -> None:
        """A generation, if it still runs, runs with these versions as well."""
        if generation in self._using:
            self._using[generation].update(versions)

    def used_by(self, generation: str) -> Collection[str]:
        """The versions that a running generation has used."""
        return self._using.get(generation, ())

    def release(self, generations: Iterable[str]) -> None:
        for generation in generations:
            self._using.pop(generation, None)

    @property
    def in_use(self) -> Counter[str]:
        """The number of generations that run with each version."""
        return Counter(version for versions in self._using.values() for version in versions)

    def _advice(self) -> str:
        names = ", ".join(profile.name for profile in self.served)
        return f"served are: {names}" if names else "no profile is served: put one into the profile directory"

    def _needed(self, text: str) -> list[str]:
        """The versions, besides the current one, that a reference may mean."""
        if "#" not in text:
            return [alias.version for alias in self.record(text).aliases.values()]
        reference = parse_reference(text)
        if reference is None:
            return []
        if reference.alias is not None:
            alias = self.record(reference.name).aliases.get(reference.alias)
            return [] if alias is None else [alias.version]
        version = self._kept_version(reference)
        return [] if version is None else [version]

    def _of_reference(self, reference: Reference, current: Profile, draw: Draw | None) -> Profile:
        name, record = reference.name, self.record(reference.name)
        if reference.version is not None:
            if current.version.startswith(reference.version):
                return current
            version = self._kept_version(reference)
            if version is None:
                shown = f"served in version {current.version[:8]}, not in {reference.version[:8]}"
                raise UnknownProfile(f"profile {name!r} is {shown}")
            return self._loaded(name, version, current)
        if reference.alias is not None and reference.alias != LATEST:
            if reference.alias not in record.aliases:
                raise unknown_alias(name, reference.alias, record.aliases)
            return self._loaded(name, record.aliases[reference.alias].version, current)
        if reference.alias == LATEST or not record.aliases:
            return current
        return self._of_plain_name(name, record.aliases, current, draw)

    def _of_plain_name(self, name: str, aliases: Mapping[str, Alias], current: Profile, draw: Draw | None) -> Profile:
        default = aliases[STABLE].version if STABLE in aliases else current.version
        chosen = default if draw is None else draw.choose(name, default, aliases)
        with suppress(UnknownProfile):
            return self._loaded(name, chosen, current)
        return self._loaded(name, default, current)

    def _loaded(self, name: str, version: str, current: Profile) -> Profile:
        """A version that the engine holds. Raises UnknownProfile."""
        if version == current.version:
            return current
        if version not in self._kept:
            reason = self._kept_errors.get(version, "it is not loaded; try again")
            raise UnknownProfile(f"version {version[:8]} of profile {name!r} is not served: {reason}")
        return self._kept[version]

    def _kept_version(self, reference: Reference) -> str | None:
        """The one version, besides the current one, that a reference by version means."""
        if reference.version is None or self._store is None:
            return None
        known = dict.fromkeys([*self.record(reference.name).versions, self._store.shipped(reference.name)])
        found = [version for version in known if version is not None and version.startswith(reference.version)]
        return found[0] if len(found) == 1 else None

    async def _load_kept(self, name: str, version: str) -> None:
        """Have the engine hold a version that is not current. Raises Unavailable."""
        store = self._store
        assert store is not None
        async with self._loading_kept:
            entry = self._entries.get(name)
            if entry is not None and entry.profile is not None and entry.profile.version == version:
                return
            if version in self._kept:
                self._kept[version] = self._kept.pop(version)  # the latest
                return
            try:
                profile = await self._read(lambda: store.load(name, version))
                await self._engine.load_profile(profile)
            except (UnknownProfile, ProfileError, OSError) as error:
                if self._kept_errors.get(version) != str(error):
                    logger.warning("version %s of profile %r cannot be served: %s", version[:8], name, error)
                self._kept_errors[version] = str(error)
                return
            self._kept[version] = profile
            self._kept_errors.pop(version, None)
            await self._evict()

    async def _evict(self) -> None:
        """Let the engine forget the versions that were not asked for in the longest time."""
        aliased = {alias.version for record in self._records.values() for alias in record.aliases.values()}
        pinned = aliased | self.in_use.keys() | self._held.keys()
        unpinned = [version for version in self._kept if version not in pinned]
        for version in unpinned[: max(0, len(unpinned) - MAX_LOADED)]:
            await self._drop(version)

    async def _drop(self, version: str) -> None:
        if self._kept.pop(version, None) is not None:
            await self._engine.unload_profile(version)

    async def _take_records(self) -> None:
        """Read the records that have changed, and load the versions of their aliases. Raises OSError."""
        store = self._store
        if store is None:
            return
        async with self._refreshing:
            marks = await self._read(store.record_marks)
            for name in self._marks.keys() - marks.keys():
                del self._marks[name]
                self._records.pop(name, None)
            for name, mark in marks.items():
                if self._marks.get(name) != mark:
                    await self._take_record(store, name)
                    self._marks[name] = mark

    async def _take_record(self, store: ProfileStore, name: str) -> None:
        record = await self._read(lambda: store.record(name))
        with suppress(Unavailable):  # an engine that starts again is asked again by the next request
            for alias in record.aliases.values():
                await self._load_kept(name, alias.version)
        self._records[name] = record

    async def _clean(self) -> None:
        if self._store is not None:
            with suppress(RequestError):  # it is read-only, or another server does the same
                await self._read(self._store.clean)

    async def _note(self, name: str, version: str | None) -> None:
        """Have what was found in the directory noted and kept."""
        store, in_use = self._store, frozenset(self.in_use)
        if store is None:
            return
        try:
            self._records[name] = await self._read(lambda: store.note(name, version, in_use))
            self._not_noted = None
        except (RequestError, OSError) as error:
            if self._not_noted is None:
                level = logging.INFO if isinstance(error, ReadOnlyDirectory) else logging.WARNING
                logger.log(level, "replaced versions of profiles are not kept: %s", error)
            self._not_noted = str(error)

    async def _watch(self) -> None:
        previous = dict(self._known)
        while True:
            await asyncio.sleep(self._interval)
            try:
                found = await self._read(self._scan)
                self.problem = None
                settled = {name: mark for name, mark in found.items() if previous.get(name) == mark}
                await self._apply(settled, present=set(found))
                await self._take_records()
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

    def _signature(self, name: str) -> Signature | None:
        for path in (self._directory / f"{name}{SUFFIX}", self._shipped.get(name)):
            with suppress(FileNotFoundError):
                if path is not None and stat.S_ISREG((status := path.stat()).st_mode):
                    return signature_of(status)
        return None

    def _entry_with_error(self, name: str, reason: str) -> ProfileEntry:
        known = self._entries.get(name)
        return ProfileEntry(name, None if known is None else known.profile, reason)

    async def _apply(self, found: dict[str, Signature], *, present: set[str]) -> None:
        async with self._refreshing:
            for name, signature in found.items():
                await self._update(name, signature)
            for name in set(self._entries) - present - self._unreadable.keys():
                if await self._read(partial(self._signature, name)) is None:  # it may have come after the look
                    await self._swap(name, None)

    async def _update(self, name: str, signature: Signature) -> None:
        """Load a profile whose file has changed."""
        if self._known.get(name) != signature:
            with suppress(Unavailable):  # an engine that starts again is asked again
                await self._swap(name, await self._load(name))
                self._known[name] = signature

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
        if retired is not None and serving is not None and retired.version not in self._kept:
            self._kept[retired.version] = retired  # at once, without a gap for aliases
            retired = None
        await self._note(name, None if serving is None else serving.version)
        if retired is not None:
            await self._engine.unload_profile(retired.version)
        elif before is not None and before.profile is not None:
            await self._keep_loaded(before.profile)
        logger.info("profile %r: version %s is served", name, serving.version[:8] if serving is not None else "none")

    async def _keep_loaded(self, profile: Profile) -> None:
        """A version is not current any more: let it go unless it is kept."""
        if profile.version in self.record(profile.name).versions:
            await self._evict()
        else:
            await self._drop(profile.version)


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
