"""A candidate for a profile's next version: staged beside the served one, promoted or withdrawn, and the way back.

    stage     keep the candidate under the alias `canary`, with a share of the requests
    promote   make it the version that is served, and keep the one before under the alias `previous`, with a share
    settle    end the trial: the alias `previous` goes, and everybody gets the promoted version
    withdraw  end the trial before a promotion: the alias `canary` goes
    rollback  serve the version before again

Each is one change, with a line in the audit log. A version's name is the sha256 of its bytes, so what is served after a
rollback are the bytes that were served before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from server.engines.errors import Conflict, UnknownProfile
from server.profiles.audit import Author
from server.profiles.directory_changes import Action, Change, DirectoryChanges
from server.profiles.references import STABLE, Alias
from server.profiles.versions import ProfileStore, Publication, Record, now
from steering_vectors.errors import RequestError

CANARY = "canary"
PREVIOUS = "previous"

Phase = Literal["canary", "holdback"]


@dataclass(frozen=True, slots=True)
class Trial:
    """Two versions that share the requests for a plain name. `since` is the Unix time at which that began."""

    phase: Phase
    candidate: str
    baseline: str
    share: float  # of the canary, or of the version before
    since: float


@dataclass(frozen=True, slots=True)
class ProfileDirectory:
    """The profile directory of a server, with the settings that the server has for it."""

    profiles: Path = Path("profiles")
    profile_versions: int = 5
    profile_quota_bytes: int = 2**30
    audit_log: Path | None = None

    def store(self, shipped: Mapping[str, Path]) -> ProfileStore:
        return ProfileStore(
            self.profiles,
            shipped,
            max_versions=self.profile_versions,
            quota=self.profile_quota_bytes,
            audit_log=self.audit_log,
        )


class Candidates:
    """The trials of one profile directory. Several processes may use it. Raises RequestError, and what the store
    raises."""

    def __init__(self, store: ProfileStore) -> None:
        self._store = store
        self._changes = DirectoryChanges(store)

    def served(self, name: str) -> str:
        """The version that the plain name means, apart from shares. Raises UnknownProfile."""
        stable = self._store.record(name).aliases.get(STABLE)
        version = self._store.current(name) if stable is None else stable.version
        if version is None:
            raise UnknownProfile(f"profile {name!r} has no version that is served: fit or upload one first")
        return version

    def trial(self, name: str) -> Trial | None:
        """The trial that runs. An alias that somebody has moved ends it."""
        aliases, served = self._store.record(name).aliases, self.served(name)
        for phase, alias in (("canary", aliases.get(CANARY)), ("holdback", aliases.get(PREVIOUS))):
            if alias is not None and alias.version != served:
                since = datetime.fromisoformat(alias.at).timestamp() if alias.at else 0.0
                if phase == "canary":
                    return Trial("canary", alias.version, served, alias.share, since)
                return Trial("holdback", served, alias.version, alias.share, since)
        return None

    def note(self, name: str, author: Author, reason: str, figures: Mapping[str, Any]) -> None:
        """Write down that a candidate was not staged. Nothing else changes."""
        with self._store.changing():
            served = self.served(name)
            self._store.write_audit("refine", name, served, served, author, reason=reason, figures=figures)

    def stage(
        self,
        name: str,
        data: bytes,
        served: str,
        share: float,
        author: Author,
        reason: str,
        figures: Mapping[str, Any],
    ) -> str:
        """Keep a candidate for the place of the version `served`, and give it a share of the requests; returns its
        version. Raises Conflict if another version is served by now, or if a trial runs."""
        store, version = self._store, hashlib.sha256(data).hexdigest()
        with store.changing():
            self.check_free(name, served)
            record = self._with_kept(name, self._changes.with_current_kept(name, store.record(name)), served)
            made = Alias(version=version, share=share, at=now(), by=author.shown)
            aliases = {**record.aliases, CANARY: made}
            _check_shares(name, aliases)
            store.check_quota(name, version, len(data), record, frozenset())
            store.keep(name, version, data, always=True)
            known = {version: Publication(at=made.at, by=author.shown, size=len(data))}
            staged = record.model_copy(update={"aliases": aliases, "versions": {**known, **record.versions}})
            more = {"alias": CANARY, "share": share, "reason": reason, "figures": figures}
            with self._changes.recorded("refine", name, record, staged, served, version, author, **more):
                pass
            return version

    def promote(
        self, name: str, trial: Trial, holdback: float, author: Author, reason: str, figures: Mapping[str, Any]
    ) -> Change:
        """Serve the candidate of a trial. With a `holdback`, this share of the requests still gets the version before.
        Raises Conflict if the trial is over."""
        with self._store.changing():
            self._check_runs(name, trial)
            kept = Alias(version=trial.baseline, share=holdback, at=now(), by=author.shown)
            return self._serve(
                "promote", name, trial.candidate, {PREVIOUS: kept} if holdback else {}, author, reason, figures
            )

    def withdraw(self, name: str, trial: Trial, author: Author, reason: str, figures: Mapping[str, Any]) -> Change:
        """End a trial before a promotion. Raises Conflict if it is over."""
        with self._store.changing():
            self._check_runs(name, trial)
            self._drop("withdraw", name, CANARY, trial.candidate, trial.baseline, author, reason, figures)
            return Change(trial.candidate, trial.baseline)

    def settle(self, name: str, trial: Trial, author: Author, reason: str, figures: Mapping[str, Any]) -> Change:
        """End a trial after a promotion, for good. Raises Conflict if it is over."""
        with self._store.changing():
            self._check_runs(name, trial)
            self._drop("settle", name, PREVIOUS, trial.baseline, trial.candidate, author, reason, figures)
            return Change(trial.candidate, trial.candidate)

    def rollback(
        self, name: str, text: str | None, author: Author, reason: str, figures: Mapping[str, Any] | None = None
    ) -> Change:
        """Serve an earlier version again, the one that begins with `text`, and end every trial. By default, a candidate
        that was not promoted is withdrawn; else the version before is served."""
        trial = self.trial(name)
        if text is None and trial is not None and trial.phase == "canary":
            return self.withdraw(name, trial, author, reason, figures or {})
        with self._store.changing():
            version = trial.baseline if text is None and trial is not None else self._changes.earlier(name, text)
            return self._serve("rollback", name, version, {}, author, reason, figures or {})

    def check_free(self, name: str, served: str) -> None:
        """Raise Conflict if a trial runs, or if another version than this one is served by now."""
        if self.trial(name) is not None:
            raise Conflict(
                f"a candidate for profile {name!r} is being tried: wait for its verdict, or end it with a rollback"
            )
        if self.served(name) != served:
            raise Conflict(f"profile {name!r} was changed meanwhile: refine it again")

    # Within `changing`.

    def _serve(
        self,
        action: Action,
        name: str,
        version: str,
        added: Mapping[str, Alias],
        author: Author,
        reason: str,
        figures: Mapping[str, Any],
    ) -> Change:
        """Make a version that is kept the one that the plain name means, without the aliases of trials but for those
        that are `added`."""
        store, before = self._store, self.served(name)
        record = self._with_kept(name, self._changes.with_current_kept(name, store.record(name)), before)
        aliases = {one: known for one, known in record.aliases.items() if one not in (CANARY, PREVIOUS)}
        if STABLE in aliases:
            aliases[STABLE] = aliases[STABLE].model_copy(update={"version": version, "at": now(), "by": author.shown})
        aliases |= added
        _check_shares(name, aliases)
        upload = self._changes.copied(name, version)
        try:
            store.check_quota(name, version, upload.size, record, frozenset())
            store.keep(name, version, upload.path.read_bytes(), always=True)
            made = record.publish(version, upload.size, author).model_copy(update={"aliases": aliases})
            more = {"size": upload.size, "reason": reason, "figures": figures or None}
            with self._changes.recorded(action, name, record, made, before, version, author, **more):
                store.place(name, upload)
        finally:
            upload.discard()
        with suppress(OSError):  # it is served
            store.forget(name, made, store.surplus(name, made, frozenset()))
        return Change(before, version)

    def _drop(
        self,
        action: Action,
        name: str,
        alias: str,
        before: str,
        after: str,
        author: Author,
        reason: str,
        figures: Mapping[str, Any],
    ) -> None:
        store = self._store
        record = store.record(name)
        left = {one: known for one, known in record.aliases.items() if one != alias}
        changed = record.model_copy(update={"aliases": left})
        more = {"alias": alias, "reason": reason, "figures": figures or None}
        with self._changes.recorded(action, name, record, changed, before, after, author, **more):
            pass
        with suppress(OSError):
            store.forget(name, changed, store.surplus(name, changed, frozenset()))

    def _with_kept(self, name: str, record: Record, version: str) -> Record:
        """The record, with a copy of a version, which may be a shipped one."""
        data = self._store.read(name, version)
        self._store.keep(name, version, data, always=True)
        if version in record.versions:
            return record
        known = {version: Publication(at=now(), size=len(data))}
        return record.model_copy(update={"versions": {**known, **record.versions}})

    def _check_runs(self, name: str, trial: Trial) -> None:
        if self.trial(name) != trial:
            raise Conflict(f"the trial of profile {name!r} was changed meanwhile: look at it again")


def _check_shares(name: str, aliases: Mapping[str, Alias]) -> None:
    if (total := sum(alias.share for alias in aliases.values())) > 1 + 1e-9:
        raise RequestError(
            f"the shares of the aliases of profile {name!r} would add up to {total:g}, which is more than 1",
            param="share",
        )
