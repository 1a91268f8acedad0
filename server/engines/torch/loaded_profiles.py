"""The profiles that an engine holds, by version, counted by who uses them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from server.engines.errors import UnknownProfile
from steering_vectors.errors import ProfileError
from steering_vectors.profiles.profile import Profile


class LoadedProfiles:
    """A version stays as long as it is loaded, or a request holds it. May be used from any thread."""

    def __init__(self) -> None:
        self._profiles: dict[str, Profile] = {}
        self._uses: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._profiles)

    def add(self, profile: Profile) -> None:
        """Hold a profile once more. Raises ProfileError for one that was never stored, which has no version."""
        if not profile.version:
            raise ProfileError(f"profile {profile.name!r} has no version: store it in a file first")
        with self._lock:
            self._profiles.setdefault(profile.version, profile)
            self._uses[profile.version] += 1

    def acquire(self, versions: Iterable[str]) -> dict[str, Profile]:
        """Hold all of these versions once more. Raises UnknownProfile, and then holds none."""
        wanted = tuple(versions)
        with self._lock:
            for version in wanted:
                if version not in self._profiles:
                    raise UnknownProfile(f"no profile of version {version[:8]!r} is loaded", param="version")
            self._uses.update(wanted)
            return {version: self._profiles[version] for version in wanted}

    def release(self, versions: Iterable[str]) -> None:
        """Let go of versions, and drop those that nobody holds any more."""
        with self._lock:
            for version in versions:
                if version not in self._profiles:
                    continue
                self._uses[version] -= 1
                if self._uses[version] <= 0:
                    del self._uses[version], self._profiles[version]
