"""The files of a profile directory: versions that are kept, what is left behind, and processes that are killed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from server.engines.config import EngineConfig
from server.engines.errors import UnknownProfile
from server.engines.torch.engine import TorchEngine
from server.profiles.audit import Author
from server.profiles.registry import ProfileRegistry
from server.profiles.versions import ProfileStore, QuotaExceeded, Record, checked_name
from steering_vectors.errors import RequestError
from steering_vectors.models.loading import wrap_model
from steering_vectors.profiles.files import load_profile, save_profile
from tests.support.serving import random_profile
from tests.support.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
POINTS = 20


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    engine = TorchEngine(wrap_model(tiny_model("llama"), tiny_tokenizer(), name="tiny"), EngineConfig(slots=2))
    yield engine
    asyncio.run(engine.close())


@asynccontextmanager
async def started(
    directory: Path,
    engine: TorchEngine,
    *,
    interval: float = 60,
    shipped: dict[str, Path] | None = None,
    **options: Any,
) -> AsyncIterator[ProfileRegistry]:
    store = ProfileStore(directory, shipped, **options)
    registry = ProfileRegistry(directory, engine, interval=interval, shipped=shipped, store=store)
    await registry.start()
    try:
        yield registry
    finally:
        await registry.stop()


def saved(engine: TorchEngine, directory: Path, seed: int, name: str = "warm") -> str:
    """Write a profile there; returns its version."""
    path = save_profile(random_profile(engine.info.identity, name, seed=seed), directory)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def actions(directory: Path) -> list[tuple[str, str | None, str | None]]:
    """What the audit log says, the oldest first."""
    found = ProfileStore(directory).audit.read(1000)
    return [(one["action"], one.get("from_version"), one.get("to_version")) for one in reversed(found)]


def test_what_is_replaced_by_hand_is_kept_and_used_by_its_version(tmp_path: Path, engine: TorchEngine) -> None:
    first = saved(engine, tmp_path, 1)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            second = saved(engine, tmp_path / "elsewhere", 2)
            (tmp_path / "warm.safetensors").write_bytes(
                (tmp_path / "elsewhere/warm.safetensors").read_bytes()
            )  # in place
            await registry.refresh()
            assert registry.find("warm").version == registry.find("warm#latest").version == second
            reference = f"warm#{first[:8]}"
            async with registry.holding([reference]):
                assert registry.find(reference).version == first
            (tmp_path / "warm.safetensors").unlink()
            await registry.refresh()
            with pytest.raises(UnknownProfile):
                registry.find(reference)
            assert actions(tmp_path) == [("found", None, first), ("found", first, second), ("removed", second, None)]

    asyncio.run(scenario())


def test_a_kept_version_is_loaded_again_after_a_restart(tmp_path: Path, engine: TorchEngine) -> None:
    first = saved(engine, tmp_path, 1)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            saved(engine, tmp_path, 2)
            await registry.refresh()
        before = engine.stats().profiles
        async with started(tmp_path, engine) as registry:
            with pytest.raises(UnknownProfile, match="is not loaded"):
                registry.find(f"warm#{first}")
            async with registry.holding([f"warm#{first}"]):
                held = registry.find(f"warm#{first}")
                assert (held.version, engine.stats().profiles) == (first, before + 2)
        assert engine.stats().profiles == before

    asyncio.run(scenario())


def test_a_copy_that_was_changed_is_not_served(tmp_path: Path, engine: TorchEngine) -> None:
    first = saved(engine, tmp_path, 1)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            saved(engine, tmp_path, 2)
            await registry.refresh()
        copy = tmp_path / ".trimtab/profiles/warm" / f"{first}.safetensors"
        copy.write_bytes(copy.read_bytes()[:-4] + b"\0\0\0\0")
        async with started(tmp_path, engine) as registry, registry.holding([f"warm#{first}"]):
            with pytest.raises(UnknownProfile, match="is not there any more"):
                registry.find(f"warm#{first}")

    asyncio.run(scenario())


def test_the_newest_are_kept_and_those_in_use_or_with_an_alias(tmp_path: Path, engine: TorchEngine) -> None:
    async def scenario() -> None:
        versions = [saved(engine, tmp_path, 0)]
        async with started(tmp_path, engine, max_versions=2) as registry:
            registry.use(["gen-1"], [versions[0]])
            for seed in range(1, 6):
                versions.append(saved(engine, tmp_path, seed))
                await registry.refresh()
            kept = [version for version in versions if version in registry.record("warm").versions]
            assert kept == [versions[0], *versions[3:]]
            registry.release(["gen-1"])
            versions.append(saved(engine, tmp_path, 6))
            await registry.refresh()
            files = {path.stem for path in (tmp_path / ".trimtab/profiles/warm").glob("*.safetensors")}
            assert files == set(registry.record("warm").versions) == set(versions[4:])

    asyncio.run(scenario())


def test_without_versions_nothing_is_kept(tmp_path: Path, engine: TorchEngine) -> None:
    async def scenario() -> None:
        first = saved(engine, tmp_path, 1)
        async with started(tmp_path, engine, max_versions=0) as registry:
            loaded = engine.stats().profiles
            saved(engine, tmp_path, 2)
            await registry.refresh()
            assert engine.stats().profiles == loaded
            async with registry.holding([f"warm#{first}"]):
                with pytest.raises(UnknownProfile, match="is served in version"):
                    registry.find(f"warm#{first}")
        assert list((tmp_path / ".trimtab/profiles").glob("*/*.safetensors")) == []

    asyncio.run(scenario())


def test_a_shadowed_shipped_profile_is_used_by_its_version(tmp_path: Path, engine: TorchEngine) -> None:
    shipped = saved(engine, tmp_path / "shipped", 1)
    directory = tmp_path / "profiles"
    own = saved(engine, directory, 2)

    async def scenario() -> None:
        options = {"shipped": {"warm": tmp_path / "shipped/warm.safetensors"}}
        async with started(directory, engine, **options) as registry, registry.holding([f"warm#{shipped}"]):
            assert registry.find("warm").version == own
            assert registry.find(f"warm#{shipped}").version == shipped

    asyncio.run(scenario())


def test_a_directory_that_cannot_be_written_is_served(
    tmp_path: Path, engine: TorchEngine, caplog: pytest.LogCaptureFixture
) -> None:
    version = saved(engine, tmp_path, 1)
    (tmp_path / ".trimtab").write_text("in the way")  # even root cannot write below a file

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            assert registry.find("warm").version == version
            second = saved(engine, tmp_path, 2)
            await registry.refresh()
            assert registry.find("warm").version == second

    asyncio.run(scenario())
    assert sum("are not kept" in message for message in caplog.messages) == 1


def test_the_quota_counts_what_is_kept_and_names_what_to_delete(tmp_path: Path, engine: TorchEngine) -> None:
    versions = [saved(engine, tmp_path, 0)]

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            for seed in (1, 2):
                versions.append(saved(engine, tmp_path, seed))
                await registry.refresh()

    asyncio.run(scenario())
    size = (tmp_path / "warm.safetensors").stat().st_size
    for quota, fits in ((5 * size, True), (5 * size - 1, False)):  # one more copy, beside the file and three
        store = ProfileStore(tmp_path, quota=quota)
        record = store.record("warm")
        assert list(record.versions) == versions
        if fits:
            store.check_quota("warm", "f" * 64, size, record, ())
            continue
        with pytest.raises(QuotaExceeded) as failure:
            store.check_quota("warm", "f" * 64, size, record, ())
        assert f"would hold {5 * size} bytes, of at most {quota}" in failure.value.message
        assert f"/profiles/warm/versions/{versions[0][:8]} ({size} bytes)" in failure.value.message
        assert versions[2][:8] not in failure.value.message  # the current one


def test_a_record_that_is_lost_or_broken_is_made_from_the_files(tmp_path: Path, engine: TorchEngine) -> None:
    versions = {saved(engine, tmp_path, 0)}

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            versions.add(saved(engine, tmp_path, 1))
            await registry.refresh()

    asyncio.run(scenario())
    store, path = ProfileStore(tmp_path), tmp_path / ".trimtab/profiles/warm/record.json"
    assert store.record("cold") == Record()
    for content in (b"", b"[]", b'{"versions": 3}', b'{"aliases": {"stable": {"version": "../x"}}}', b"\xff"):
        path.write_bytes(content)
        assert set(store.record("warm").versions) == versions
    path.unlink()
    assert set(store.record("warm").versions) == versions


@pytest.mark.parametrize(
    "name", ["..", ".", "", ".hidden", "../x", "a/b", "a\0", "A", "ü", "a\n", "a" * 65, "a#b", " a"]
)
def test_no_name_leaves_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError):
        checked_name(name)
    with pytest.raises(RequestError):
        ProfileStore(tmp_path).path(name)


def test_what_was_left_behind_is_removed_but_not_what_is_written_now(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    with store.changing():
        pass
    running = store.receive()
    left = tmp_path / ".trimtab/uploads/left"
    left.write_bytes(b"half")
    old, young = tmp_path / ".warm.0123.tmp", tmp_path / ".cold.0123.tmp"  # of `trimtab fit`, which may still write one
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    ProfileStore(tmp_path).clean()
    assert [path.exists() for path in (running.path, left, old, young)] == [True, False, False, True]
    running.discard()
    assert not running.path.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_is_killed_in_an_upload_leaves_the_old_version_or_the_new_one(
    tmp_path: Path, engine: TorchEngine
) -> None:
    new = saved(engine, tmp_path / "new", 2)
    old = saved(engine, tmp_path / "old", 1)
    file = tmp_path / "new/warm.safetensors"
    shutil.copytree(tmp_path / "old", tmp_path / "trial")
    words = [sys.executable, "-m", "tests.support.killed_upload", str(tmp_path / "trial"), str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        lines = int(process.stdout.readline())
        points = sorted(random.Random(6).sample(range(1, lines + 1), POINTS))
        for point in points:
            shutil.copytree(tmp_path / "old", tmp_path / f"trial-{point}")
        signals, _ = process.communicate(" ".join(map(str, points)))
    assert list(map(int, signals.split())) == [signal.SIGKILL] * POINTS

    async def served(directory: Path) -> str:
        async with started(directory, engine) as registry:
            assert registry.rejected == []
            assert [entry.name for entry in registry.entries] == ["warm"]
            version = registry.find("warm").version
            assert registry.record("warm").current == version
            async with registry.holding([f"warm#{old}"]):
                assert registry.find(f"warm#{old}").version == old
            return version

    seen = []
    for point in points:
        directory = tmp_path / f"trial-{point}"
        before = load_profile(directory / "warm.safetensors").version
        seen.append(asyncio.run(served(directory)))
        assert seen[-1] == before
        left = [path for path in directory.rglob("*") if path.suffix == ".tmp" or path.parent.name == "uploads"]
        assert left == []
        if seen[-1] == new:
            assert ("upload", old, new) in actions(directory)
    assert set(seen) == {old, new}
    print(f"\n{POINTS} points of {lines} lines: {seen.count(old)} old, {seen.count(new)} new")


def test_a_record_says_who_published_last() -> None:
    record = Record().publish("a" * 64, 10, Author("team", "1.2.3.4")).publish("b" * 64, 20, Author(None, "1.2.3.4"))
    again = record.publish("a" * 64, 10, Author())
    assert [one.by for one in record.versions.values()] == ["team", "1.2.3.4"]
    assert (list(again.versions), again.current, again.versions["a" * 64].by) == (["b" * 64, "a" * 64], "a" * 64, None)
