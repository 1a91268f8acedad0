"""The laws of the house: what goes where, and which way imports run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("steering_vectors", "server")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# From the bottom to the top: each folder or file may import what stands before it, never what stands after it.
ORDER = (
    "steering_vectors.errors",
    "steering_vectors.progress",
    "steering_vectors.cache_directory",
    "steering_vectors.profiles",
    "steering_vectors.models",
    "steering_vectors.steering",
    "steering_vectors.runtime",
    "steering_vectors.data",
    "steering_vectors.measures",
    "steering_vectors.reports",
    "steering_vectors.tuning",
    "steering_vectors.methods",
    "steering_vectors.fitting",
    "steering_vectors.distillation",
    "steering_vectors.evaluation",
    "steering_vectors.synthesis",
    "steering_vectors",
    "steering_vectors.cli",
    "server.engines.errors",
    "server.engines.config",
    "server.engines.protocol",
    "server.engines.mailbox",
    "server.engines.pool",
    "server.engines.process",
    "server.engines.detokenizer",
    "server.engines.torch",
    "server.settings",
    "server.observability",
    "server.http",
    "server.access",
    "server.profiles",
    "server.generation",
    "server.feedback",
    "server.learning",
    "server.jobs",
    "server.state",
    "server.api",
    "server.app",
    "server.chat",
    "server.cli",
)
MAX_FILES = 12
MAX_FILES_OF = {"steering_vectors/methods": 15, "steering_vectors/evaluation/trust": 15}
REPEATED_NAMES = {"__init__", "requests", "responses", "routes"}
WEB = ("fastapi", "starlette", "pydantic", "sqlalchemy", "prometheus_client")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> list[str]:
    """Modules that a file imports anywhere, except for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append(whole if whole in MODULES else node.module)
    return found


GRAPH = {name: {target for target in imported(path) if target in MODULES} - {name} for name, path in MODULES.items()}


def rank(name: str) -> int:
    """The place of a module's folder in the order."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in ORDER:
            return ORDER.index(prefix)
    raise LookupError(name)


def test_imports_have_no_circles() -> None:
    assert list(TopologicalSorter(GRAPH).static_order())


def test_every_module_has_a_place_in_the_order() -> None:
    containers = {"server", "server.engines"}
    for name in MODULES.keys() - containers:
        assert rank(name) >= 0


def test_imports_run_down_only() -> None:
    upward = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        if name not in {"server", "server.engines"}
        for target in targets - {"server", "server.engines"}
        if rank(target) > rank(name)
    ]
    assert upward == []


@pytest.mark.parametrize("package", WEB)
def test_engines_know_no_web_framework(package: str) -> None:
    for name, path in MODULES.items():
        if name.startswith("server.engines"):
            assert not [target for target in imported(path) if target.split(".")[0] == package], name


def test_the_scheduler_has_no_torch() -> None:
    path = MODULES["server.engines.torch.scheduling.scheduler"]
    assert not [target for target in imported(path) if target.startswith("torch")]


def test_only_hooks_registers_hooks() -> None:
    for name, path in MODULES.items():
        if name != "steering_vectors.models.hooks":
            assert "register_forward" not in path.read_text(), name


def test_only_the_choice_of_a_runner_knows_the_kernels_of_a_cpu() -> None:
    cpu = "steering_vectors.runtime.cpu"
    importers = {name for name, targets in GRAPH.items() if any(target.startswith(cpu) for target in targets)}
    runtime = {name for name in importers if name.startswith("steering_vectors.runtime.")}
    assert {name for name in runtime if not name.startswith(cpu)} == {"steering_vectors.runtime.choose_runner"}


def test_folders_are_rooms_not_corridors() -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES_OF.get(folder, MAX_FILES)} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_base_name_stands_once_in_a_package(package: str) -> None:
    # a command's file is named after the command, which is named after what it does
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == package and path.parent.name != "cli"]
    counts = Counter(path.stem for path in files if path.stem not in REPEATED_NAMES)
    assert {name: count for name, count in counts.items() if count > 1} == {}


def test_every_folder_says_what_it_is() -> None:
    for path in FILES:
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_what_stands_before_an_engine_knows_no_torch() -> None:
    """An engine may run elsewhere: what talks to it, and how a request becomes messages for it, imports no torch."""
    names = [name for name in MODULES if name.startswith("server.generation.")]
    names += [f"server.engines.{name}" for name in ("errors", "config", "protocol", "mailbox", "process")]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
