"""The profile registry on a real directory and a real engine."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.errors import UnknownProfile
from server.engines.torch.engine import TorchEngine
from server.profiles import registry as profiles
from server.profiles.registry import ProfileRegistry, Signature, scan
from steering_vectors.errors import ProfileError
from steering_vectors.models.loading import wrap_model
from steering_vectors.profiles.files import load_profile, save_profile
from steering_vectors.profiles.profile import ModelIdentity, Profile
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

    def look(where: Path, unreadable: dict[str, str]) -> dict[str, Signature]:
        """A look at the directory, after which somebody writes on."""
        found = scan(where, unreadable)
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
    assert scan(tmp_path, {}) == {}


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


def test_no_entry_keeps_another_from_being_served(
    tmp_path: Path, engine: TorchEngine, identity: ModelIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd names, what is no file, what cannot be opened, half a file, and a fault of the reader itself."""
    for name in ("warm", "broken"):
        save_profile(random_profile(identity, name), tmp_path)
    whole = (tmp_path / "warm.safetensors").read_bytes()
    names = [b"new\nline", b"\xff\xfe", "ü".encode(), b"UPPER", b"a" * 200, b"..", b"\x1b[31m"]
    for name in names:
        (tmp_path / os.fsdecode(name + b".safetensors")).write_bytes(whole)
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "long.safetensors").write_bytes((2**40).to_bytes(8, "little") + whole)

    def load(path: Path) -> Profile:
        if path.stem == "broken":
            raise KeyError("of the reader")
        return load_profile(path)

    monkeypatch.setattr(profiles, "load_profile", load)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            assert [one.name for one in registry.served] == ["warm"]
            errors = {one.name: one.error for one in registry.entries if one.error is not None}
            json.dumps(errors, ensure_ascii=False).encode()  # as /profiles answers
            named = {"new\\nline", "\\udcff\\udcfe", "\\xfc", "UPPER", "a" * 200, "\\x1b[31m"}
            read = {"fifo", "loop", "half", "empty", "long", "broken"}
            assert errors.keys() == named | read  # "..safetensors" is a dot-file
            assert registry.rejected == sorted(errors)
            assert errors["fifo"] == "it is not a regular file: put a profile there, or remove it"
            assert errors["loop"] == "it cannot be read (Too many levels of symbolic links)"
            assert errors["broken"] == "it cannot be read (KeyError)"
            assert "its header has 1099511627776 bytes, of at most 1048576" in str(errors["long"])
            assert registry.entry("fifo").profile is None

    asyncio.run(scenario())


def test_a_fifo_in_place_of_a_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "warm.safetensors")
    with pytest.raises(ProfileError, match="not a regular file"):
        load_profile(tmp_path / "warm.safetensors")


def test_a_file_that_cannot_be_looked_at_any_more_stays_served(
    tmp_path: Path, engine: TorchEngine, identity: ModelIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("warm", "concise"):
        save_profile(random_profile(identity, name), tmp_path)

    async def scenario() -> None:
        async with started(tmp_path, engine) as registry:
            monkeypatch.setattr(os, "scandir", FailingEntries)
            await registry.refresh()
            monkeypatch.undo()
            assert [(one.name, one.status) for one in registry.entries] == [("concise", "served"), ("warm", "rejected")]
            assert registry.find("warm").name == "warm"
            assert registry.entry("warm").error == "it cannot be read (Input/output error)"
            await registry.refresh()
            assert registry.rejected == []

    asyncio.run(scenario())


class FailingEntries:
    """`os.scandir` on a disk that cannot read one entry."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Iterator[Any]:
        for path in sorted(self._directory.iterdir()):
            yield SimpleNamespace(name=path.name, stat=self._fail if path.stem == "warm" else path.stat)

    def __exit__(self, *_: object) -> None: ...

    def _fail(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_directory_that_hangs_is_said_and_holds_up_nothing(
    tmp_path: Path, engine: TorchEngine, identity: ModelIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_profile(random_profile(identity, "warm"), tmp_path)
    monkeypatch.setattr(profiles, "READ_SECONDS", 0.2)
    go = threading.Event()

    def hang(where: Path, unreadable: dict[str, str]) -> dict[str, Signature]:
        go.wait(20)
        return scan(where, unreadable)

    async def scenario() -> None:
        async with started(tmp_path, engine, interval=0.01) as registry, asyncio.timeout(10):
            monkeypatch.setattr(profiles, "scan", hang)
            while registry.problem is None:
                await asyncio.sleep(0.01)
            assert registry.problem == "the profile directory cannot be read (it has not answered in 0.2 s)"
            assert registry.find("warm").name == "warm"
            go.set()
            while registry.problem is not None:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_an_empty_or_missing_directory_is_said(
    tmp_path: Path, engine: TorchEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with started(tmp_path / "typo", engine):
            pass

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert caplog.messages == [
        f"the profile directory {tmp_path / 'typo'} did not exist: an empty one was created",
        f"no profile is served: the profile directory {tmp_path / 'typo'} has none",
    ]
