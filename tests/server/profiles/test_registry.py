"""The profile registry on a real directory and a real engine."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.errors import UnknownProfile
from server.engines.torch.engine import TorchEngine
from server.profiles import registry as profiles
from server.profiles.registry import ProfileRegistry, Signature, scan
from steering_vectors.models.loading import wrap_model
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.profile import ModelIdentity
from tests.support.serving import random_profile
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    engine = TorchEngine(wrap_model(tiny_model("llama"), tiny_tokenizer(), name="tiny"), EngineConfig(slots=2))
    yield engine
    asyncio.run(engine.close())


@pytest.fixture
def identity(engine: TorchEngine) -> ModelIdentity:
    return engine.info.identity


@asynccontextmanager
async def started(
    directory: Path, engine: TorchEngine, interval: float = 60, shipped: Mapping[str, Path] | None = None
) -> AsyncIterator[ProfileRegistry]:
    registry = ProfileRegistry(directory, engine, interval=interval, shipped=shipped)
    await registry.start()
    try:
        yield registry
    finally:
        await registry.stop()


def test_a_missing_directory_is_made_and_empty(tmp_path: Path, engine: TorchEngine) -> None:
    async def scenario() -> None:
        async with started(tmp_path / "new" / "profiles", engine) as registry:
            assert registry.entries == []
            with pytest.raises(UnknownProfile) as failure:
                registry.find("warm")
            expected = "profile 'warm' is not served; no profile is served: put one into the profile directory"
            assert failure.value.message == expected

    asyncio.run(scenario())
    assert (tmp_path / "new" / "profiles").is_dir()


def test_everything_is_loaded_at_the_start(tmp_path: Path, engine: TorchEngine, identity: ModelIdentity) -> None:
    for name in ("warm", "concise"):
        save_profile(random_profile(identity, name), tmp_path)
    (tmp_path / ".hidden.safetensors").write_bytes(b"no")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "folder.safetensors").mkdir()

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            assert [(entry.name, entry.status) for entry in registry.entries] == [
                ("concise", "served"),
                ("warm", "served"),
            ]

    asyncio.run(scenario())


def test_a_version_is_found_by_its_hash(tmp_path: Path, engine: TorchEngine, identity: ModelIdentity) -> None:
    save_profile(random_profile(identity, "warm"), tmp_path)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            profile = registry.find("warm")
            assert registry.find(f"warm#{profile.version[:8]}") is profile
            assert registry.find(f"warm#{profile.version}") is profile
            with pytest.raises(UnknownProfile) as failure:
                registry.find("warm#00000000")
            assert failure.value.message == (
                f"profile 'warm' is served in version {profile.version[:8]}, not in 00000000"
            )
            for reference in ("warm#", "warm#xyz", "", "#01234567", "cold"):
                with pytest.raises(UnknownProfile):
                    registry.find(reference)

    asyncio.run(scenario())


def test_replacing_swaps_and_a_held_profile_stays(tmp_path: Path, engine: TorchEngine, identity: ModelIdentity) -> None:
    path = save_profile(random_profile(identity, "warm", seed=1), tmp_path)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            old = registry.find("warm")
            version, directions = old.version, {layer: one.clone() for layer, one in old.directions.items()}
            other = save_profile(random_profile(identity, "warm", seed=2), tmp_path / "elsewhere").read_bytes()
            assert len(other) == path.stat().st_size
            path.write_bytes(other)  # in place: what is held must not be a view of the file
            await registry.refresh()
            new = registry.find("warm")
            assert new.version != version
            assert not new.directions[1].equal(directions[1])
            assert old.version == version
            assert all(torch.equal(old.directions[layer], one) for layer, one in directions.items())

    asyncio.run(scenario())


def test_the_same_bytes_again_change_nothing(tmp_path: Path, engine: TorchEngine, identity: ModelIdentity) -> None:
    path = save_profile(random_profile(identity, "warm"), tmp_path)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            profile = registry.find("warm")
            path.write_bytes(path.read_bytes())
            await registry.refresh()
            assert registry.find("warm") is profile

    asyncio.run(scenario())


def test_a_bad_file_leaves_the_old_version_live(tmp_path: Path, engine: TorchEngine, identity: ModelIdentity) -> None:
    path = save_profile(random_profile(identity, "warm"), tmp_path)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            profile = registry.find("warm")
            path.write_bytes(path.read_bytes()[:-1])
            await registry.refresh()
            entry = registry.entry("warm")
            assert (entry.status, entry.profile) == ("rejected", profile)
            assert entry.error is not None
            assert "not a complete safetensors file" in entry.error
            assert registry.find("warm") is profile
            save_profile(random_profile(identity, "warm", seed=5), tmp_path)
            await registry.refresh()
            assert registry.entry("warm").status == "served"

    asyncio.run(scenario())


def test_a_deleted_file_unloads(tmp_path: Path, engine: TorchEngine, identity: ModelIdentity) -> None:
    path = save_profile(random_profile(identity, "warm"), tmp_path)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            path.unlink()
            await registry.refresh()
            assert registry.entries == []
            save_profile(random_profile(identity, "warm"), tmp_path)
            await registry.refresh()
            assert registry.find("warm").name == "warm"

    asyncio.run(scenario())


def test_the_watcher_sees_what_is_dropped_in_changed_and_deleted(
    tmp_path: Path, engine: TorchEngine, identity: ModelIdentity
) -> None:
    async def seen(registry: ProfileRegistry, names: list[str]) -> None:
        while [entry.name for entry in registry.entries] != names:
            await asyncio.sleep(0.005)

    async def scenario() -> None:
        async with started(tmp_path, engine, interval=0.02) as registry, asyncio.timeout(10):
            path = save_profile(random_profile(identity, "warm"), tmp_path)
            await seen(registry, ["warm"])
            path.unlink()
            await seen(registry, [])

    asyncio.run(scenario())


def test_a_file_that_grows_is_read_once_two_looks_agree(
    tmp_path: Path,
    engine: TorchEngine,
    identity: ModelIdentity,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = save_profile(random_profile(identity, "warm"), tmp_path / "elsewhere").read_bytes()
    size = len(whole) // 5 + 1
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    directory, waiting = tmp_path / "profiles", list(pieces)

    def look(where: Path) -> dict[str, Signature]:
        """A look at the directory, after which somebody writes on."""
        found = scan(where)
        if waiting:
            with (where / "warm.safetensors").open("ab") as file:
                file.write(waiting.pop(0))
        return found

    async def scenario() -> None:
        monkeypatch.setattr(profiles, "scan", look)
        async with started(directory, engine, interval=0.01) as registry, asyncio.timeout(20):
            while not registry.entries:
                await asyncio.sleep(0.005)
            assert (registry.entry("warm").status, waiting) == ("served", [])

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert not [one for one in caplog.messages if "rejected" in one]


def test_the_watcher_outlives_its_directory(
    tmp_path: Path, engine: TorchEngine, identity: ModelIdentity, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "profiles"
    save_profile(random_profile(identity, "warm"), directory)

    async def scenario() -> None:
        async with started(directory, engine, interval=0.01) as registry, asyncio.timeout(10):
            directory.rename(tmp_path / "away")
            while not any("cannot be read" in one for one in caplog.messages):
                await asyncio.sleep(0.005)
            assert registry.find("warm").name == "warm"
            (tmp_path / "away").rename(directory)
            save_profile(random_profile(identity, "concise"), directory)
            while len(registry.served) < 2:
                await asyncio.sleep(0.005)

    asyncio.run(scenario())


def test_a_file_too_large_for_a_profile_is_not_read(tmp_path: Path, engine: TorchEngine) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**30)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            error = registry.entry("model").error
            assert error is not None
            assert error.endswith("has 1073741824 bytes, which is too large for a profile; is it a model?")

    asyncio.run(scenario())


def test_a_broken_link_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert scan(tmp_path) == {}


def test_a_shipped_profile_is_served_unless_the_directory_has_one_of_its_name(
    tmp_path: Path, engine: TorchEngine, identity: ModelIdentity
) -> None:
    shipped = save_profile(random_profile(identity, "warm", seed=1), tmp_path / "shipped")
    own = save_profile(random_profile(identity, "warm", seed=2), tmp_path / "own")
    directory = tmp_path / "profiles"

    async def scenario() -> None:
        async with started(directory, engine, shipped={"warm": shipped}) as registry:
            first = registry.find("warm").version
            (directory / "warm.safetensors").write_bytes(own.read_bytes())
            await registry.refresh()
            second = registry.find("warm").version
            (directory / "warm.safetensors").unlink()
            await registry.refresh()
            assert [first, second] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (shipped, own)]
            assert registry.find("warm").version == first
            assert [entry.name for entry in registry.entries] == ["warm"]

    asyncio.run(scenario())
