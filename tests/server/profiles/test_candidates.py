"""Trials of candidates in a profile directory: each step, the way back, and processes that are killed in between."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from server.engines.errors import Conflict, UnknownProfile
from server.profiles.audit import Author
from server.profiles.candidates import PREVIOUS, Candidates, ProfileDirectory
from server.profiles.references import STABLE, Alias
from server.profiles.versions import ProfileStore, QuotaExceeded, now
from steering_vectors.errors import RequestError
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.profile import ModelIdentity
from tests.support.serving import random_profile

MODEL = ModelIdentity("tiny", "Tiny", 8, 4, "f" * 64)
ME = Author("me")
FIGURES: Mapping[str, Any] = {"gain": 1.0}


def made(folder: Path, seed: int, name: str = "warm") -> bytes:
    """The bytes of a profile."""
    return save_profile(random_profile(MODEL, name, seed=seed), folder / f"made-{seed}").read_bytes()


def version_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def old(tmp_path: Path) -> bytes:
    return made(tmp_path, 1)


@pytest.fixture
def new(tmp_path: Path) -> bytes:
    return made(tmp_path, 2)


@pytest.fixture
def store(tmp_path: Path, old: bytes) -> ProfileStore:
    directory = tmp_path / "profiles"
    directory.mkdir()
    (directory / "warm.safetensors").write_bytes(old)
    return ProfileStore(directory)


def served(store: ProfileStore) -> bytes:
    return store.read("warm", Candidates(store).served("warm"))


def history(store: ProfileStore) -> list[tuple[str, str | None, str | None]]:
    """What the audit log says, the oldest first, with the beginnings of versions."""
    found = reversed(store.audit.read(100, "warm"))
    return [(one["action"], one.get("from_version", "")[:8], one.get("to_version", "")[:8]) for one in found]


def staged(store: ProfileStore, old: bytes, new: bytes, share: float = 0.1) -> Candidates:
    candidates = Candidates(store)
    assert candidates.stage("warm", new, version_of(old), share, ME, "better", FIGURES) == version_of(new)
    return candidates


def test_a_candidate_is_promoted_and_settled(store: ProfileStore, old: bytes, new: bytes) -> None:
    candidates = staged(store, old, new, 0.25)
    trial = candidates.trial("warm")
    assert trial is not None
    assert (trial.phase, trial.candidate, trial.baseline) == ("canary", version_of(new), version_of(old))
    assert (trial.share, served(store)) == (0.25, old)
    change = candidates.promote("warm", trial, 0.2, ME, "not worse", {})
    assert (change.before, change.after) == (version_of(old), version_of(new))
    assert store.path("warm").read_bytes() == new
    record = store.record("warm")
    assert {name: (alias.version, alias.share) for name, alias in record.aliases.items()} == {
        PREVIOUS: (version_of(old), 0.2)
    }
    holdback = candidates.trial("warm")
    assert holdback is not None
    assert (holdback.phase, holdback.candidate, holdback.share) == ("holdback", version_of(new), 0.2)
    with pytest.raises(Conflict, match="was changed meanwhile"):
        candidates.withdraw("warm", trial, ME, "late", {})
    candidates.settle("warm", holdback, ME, "not worse", {})
    assert (candidates.trial("warm"), store.record("warm").aliases) == (None, {})
    first, second = version_of(old)[:8], version_of(new)[:8]
    assert history(store) == [("refine", first, second), ("promote", first, second), ("settle", first, second)]
    newest = store.audit.read(1, "warm")[0]
    assert (newest["reason"], newest["key"]) == ("not worse", "me")


def test_a_candidate_is_withdrawn(store: ProfileStore, old: bytes, new: bytes) -> None:
    candidates = staged(store, old, new)
    trial = candidates.trial("warm")
    assert trial is not None
    candidates.withdraw("warm", trial, ME, "worse", {"good": 3})
    assert (candidates.trial("warm"), served(store)) == (None, old)
    assert store.audit.read(1, "warm")[0]["figures"] == {"good": 3}
    staged(store, old, new)  # it may be tried again


@pytest.mark.parametrize("phase", ["canary", "holdback", "settled"])
def test_a_rollback_restores_the_exact_bytes(store: ProfileStore, old: bytes, new: bytes, phase: str) -> None:
    candidates = staged(store, old, new)
    for step in ("canary", "holdback")[: ("canary", "holdback", "settled").index(phase)]:
        trial = candidates.trial("warm")
        assert trial is not None
        if step == "canary":
            candidates.promote("warm", trial, 0.1, ME, "better", {})
        else:
            candidates.settle("warm", trial, ME, "better", {})
    candidates.rollback("warm", None, ME, "by hand")
    assert (store.path("warm").read_bytes(), served(store)) == (old, old)
    assert (candidates.trial("warm"), store.record("warm").aliases) == (None, {})
    if phase == "settled":  # and once more undoes it
        candidates.rollback("warm", None, ME, "by hand")
        assert store.path("warm").read_bytes() == new


def test_a_rollback_may_name_a_version(store: ProfileStore, old: bytes, new: bytes) -> None:
    candidates = staged(store, old, new)
    candidates.rollback("warm", version_of(new)[:8], ME, "try it")
    assert (served(store), candidates.trial("warm")) == (new, None)
    with pytest.raises(UnknownProfile, match="no version that is kept begins with"):
        candidates.rollback("warm", "0" * 8, ME, "none")


def test_the_alias_stable_moves_with_a_promotion_and_back(
    store: ProfileStore, old: bytes, new: bytes, tmp_path: Path
) -> None:
    """The plain name means `stable`, so that is the version which a candidate replaces."""
    third = made(tmp_path, 3)
    store.path("warm").write_bytes(third)
    store.keep("warm", version_of(old), old)
    record = store.record("warm").publish(version_of(old), len(old), ME)
    store.write_record(
        "warm", record.model_copy(update={"aliases": {STABLE: Alias(version=version_of(old), at=now())}})
    )
    candidates = staged(store, old, new)
    trial = candidates.trial("warm")
    assert trial is not None
    assert trial.baseline == version_of(old)
    candidates.promote("warm", trial, 0.0, ME, "better", {})
    assert (served(store), store.record("warm").aliases[STABLE].version) == (new, version_of(new))
    candidates.rollback("warm", version_of(old)[:12], ME, "by hand")
    assert (served(store), store.path("warm").read_bytes()) == (old, old)


def test_one_candidate_at_a_time_and_only_of_what_is_served(
    store: ProfileStore, old: bytes, new: bytes, tmp_path: Path
) -> None:
    candidates = staged(store, old, new)
    third = made(tmp_path, 3)
    with pytest.raises(Conflict, match="is being tried"):
        candidates.stage("warm", third, version_of(old), 0.1, ME, "better", {})
    candidates.rollback("warm", None, ME, "by hand")
    store.path("warm").write_bytes(third)
    with pytest.raises(Conflict, match="was changed meanwhile: refine it again"):
        candidates.stage("warm", new, version_of(old), 0.1, ME, "better", {})
    assert served(store) == third


def test_what_changes_the_profile_by_hand_ends_a_trial(store: ProfileStore, old: bytes, new: bytes) -> None:
    candidates = staged(store, old, new)
    trial = candidates.trial("warm")
    store.path("warm").write_bytes(new)  # somebody publishes the candidate
    assert trial is not None
    assert candidates.trial("warm") is None
    with pytest.raises(Conflict, match="trial of profile 'warm' was changed"):
        candidates.promote("warm", trial, 0.1, ME, "better", {})


def test_shares_and_the_quota_are_kept(store: ProfileStore, old: bytes, new: bytes) -> None:
    taken = Alias(version=version_of(old), share=0.95, at=now())
    store.write_record("warm", store.record("warm").model_copy(update={"aliases": {"beta": taken}}))
    with pytest.raises(RequestError, match=r"add up to 1\.05"):
        staged(store, old, new)
    small = ProfileStore(store.directory, quota=len(old) + len(new))
    with pytest.raises(QuotaExceeded):
        Candidates(small).stage("warm", new, version_of(old), 0.01, ME, "better", {})
    assert (Candidates(store).trial("warm"), served(store)) == (None, old)


def test_a_shipped_profile_can_be_refined_and_restored(tmp_path: Path, old: bytes, new: bytes) -> None:
    shipped = tmp_path / "shipped.safetensors"
    shipped.write_bytes(old)
    store = ProfileDirectory(tmp_path / "empty", profile_versions=0).store({"warm": shipped})
    candidates = staged(store, old, new)
    trial = candidates.trial("warm")
    assert trial is not None
    candidates.promote("warm", trial, 0.1, ME, "better", {})
    assert served(store) == new
    candidates.rollback("warm", None, ME, "worse")
    assert (served(store), store.path("warm").read_bytes()) == (old, old)


def test_an_unknown_profile_has_no_trial(store: ProfileStore) -> None:
    with pytest.raises(UnknownProfile, match="fit or upload one first"):
        Candidates(store).trial("other")
    with pytest.raises(RequestError, match="no name of a profile"):
        Candidates(store).trial("../other")


def test_a_candidate_that_was_not_staged_is_noted(store: ProfileStore, old: bytes) -> None:
    Candidates(store).note("warm", ME, "it is no better", FIGURES)
    (entry,) = store.audit.read(10, "warm")
    assert (entry["action"], entry["from_version"], entry["to_version"]) == ("refine", version_of(old), version_of(old))
    assert (entry["reason"], entry["figures"]) == ("it is no better", FIGURES)


KILLED = """
import sys, time
from pathlib import Path
from server.profiles.audit import Author
from server.profiles.candidates import Candidates
from server.profiles.versions import ProfileStore
import hashlib
directory, new = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
candidates = Candidates(ProfileStore(directory))
print("ready", flush=True)
while True:
    served = candidates.served("warm")
    if served != hashlib.sha256(new).hexdigest():
        candidates.stage("warm", new, served, 0.1, Author("me"), "better", {})
        candidates.promote("warm", candidates.trial("warm"), 0.1, Author("me"), "better", {})
    candidates.rollback("warm", None, Author("me"), "worse")
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_one_whole_version(
    store: ProfileStore, old: bytes, new: bytes, tmp_path: Path
) -> None:
    """Whatever it was doing, one of both versions is served, whole, and a rollback restores the old one's bytes."""
    (tmp_path / "new").write_bytes(new)
    for point in range(20):
        script = [sys.executable, "-c", KILLED, str(store.directory), str(tmp_path / "new")]
        with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            try:
                process.wait(0.004 * (1 + point))
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
        store.clean()
        assert served(store) in (old, new)
        assert store.path("warm").read_bytes() in (old, new)
        Candidates(store).trial("warm")
        Candidates(store).rollback("warm", version_of(old), ME, "after a crash")
        assert (served(store), store.path("warm").read_bytes()) == (old, old)
        assert Candidates(store).trial("warm") is None
