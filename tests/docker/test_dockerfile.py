"""The image is made of pinned parts, and its last stage builds nothing."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable

from packaging.requirements import Requirement

from tests.docker.files import DOCKER, DOCKERFILE, ROOT, normalised, pins

BUILD, RUNTIME = re.split(r"^FROM .+(?=\nLABEL)", DOCKERFILE, flags=re.MULTILINE)
CODE_OF_BUILD = "\n".join(line for line in BUILD.splitlines() if not line.startswith("#"))
OF_TORCH = ("torch", "triton", "nvidia-", "cuda-")


def installed_by(requirements: Iterable[str]) -> set[str]:
    """The distributions that these requirements lead to, without those that torch alone asks for."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        one = waiting.pop()
        name = normalised(one.name)
        if name in found or name.startswith(OF_TORCH) or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        asked = [Requirement(text) for text in importlib.metadata.requires(one.name) or []]
        waiting += [
            inner
            for inner in asked
            if not inner.marker or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *one.extras))
        ]
    return found


def test_bases_have_a_full_version_and_room_for_a_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", bases[0])
    assert bases == [bases[0]] * 2
    assert f"# --build-context {bases[0]}=docker-image://python@sha256:" in DOCKERFILE


def test_all_but_torch_is_installed_by_hash() -> None:
    installs = re.findall(r"pip install .+", CODE_OF_BUILD)
    assert len(installs) == 4
    for install in installs:
        by_hash = "--no-deps --require-hashes -r " in install
        built_here = "--no-deps --no-index --no-build-isolation ." in install
        assert by_hash or built_here or '"torch==$version"' in install


def test_every_requirement_has_hashes() -> None:
    text = (DOCKER / "requirements.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^[^#\s].*(?:\n .*)*", text, re.MULTILINE)
    assert len(entries) == len(pins(DOCKER / "requirements.txt"))
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)


def test_requirements_are_those_of_the_tested_set() -> None:
    tested = pins(ROOT / "constraints.txt")
    assert {name: tested.get(name) for name in pins(DOCKER / "requirements.txt")} == pins(DOCKER / "requirements.txt")
    assert "torch" in tested


def test_requirements_hold_all_that_the_server_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = installed_by([*project["dependencies"], *extras["schema"], *extras["postgres"]])
    assert needed <= pins(DOCKER / "requirements.txt").keys()
    assert not any(name.startswith(OF_TORCH) for name in pins(DOCKER / "requirements.txt"))


def test_what_torch_and_the_build_need_is_pinned_as_well() -> None:
    asked = [Requirement(text) for text in importlib.metadata.requires("torch") or []]
    needed = {normalised(one.name) for one in asked if not one.marker or one.marker.evaluate({"extra": ""})}
    pinned = pins(DOCKER / "requirements.txt")
    assert {name for name in needed if not name.startswith(OF_TORCH)} <= pinned.keys()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert all(pinned[one.name] in one.specifier for one in map(Requirement, build))


def test_the_last_stage_installs_nothing_and_is_no_root() -> None:
    assert not re.search(r"apt-get|pip install|g\+\+|gcc", RUNTIME)
    assert re.search(r"^USER 10001:10001$", RUNTIME, re.MULTILINE)
    assert RUNTIME.rstrip().endswith('CMD ["trimtab", "serve"]')


def test_the_converted_model_is_found_in_a_layer_that_keeps_whole_seconds() -> None:
    """Otherwise it would be converted again, which a read-only root does not allow."""
    steps = re.findall(r"touch --date=@\d+ \{\}|load_model\('smollm2'\)", CODE_OF_BUILD)
    assert len(steps) == 2
    assert steps[1] == "load_model('smollm2')"


def test_models_may_come_from_the_hub() -> None:
    assert "HF_HUB_OFFLINE" not in "".join(line for line in RUNTIME.splitlines() if not line.startswith("#"))
