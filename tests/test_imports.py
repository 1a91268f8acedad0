"""The import law: imports run one way, without circles, also not through imports inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("steering_vectors", "server")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Each module may import those before it, never those after.
OFFLINE_ORDER = (
    "errors",
    "gate",
    "profile",
    "mixture",
    "hooks",
    "bank",
    "models",
    "activations",
    "methods",
    "calibration",
    "fitting",
    "cli",
)
# What may be imported inside a function: heavy packages that are optional or slow to load.
HEAVY = {"sklearn", "datasets", "pyarrow", "peft", "trl", "matplotlib", "torch", "transformers", "uvicorn", "scipy"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> list[tuple[str, ast.AST]]:
    """Modules of ours that a file imports anywhere, except for type checking only."""
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
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole if whole in MODULES else node.module, node))
    return found


GRAPH = {name: {target for target, _ in imported(path) if target in MODULES} - {name} for name, path in MODULES.items()}


def test_imports_have_no_circles() -> None:
    assert list(TopologicalSorter(GRAPH).static_order())


def test_offline_knows_nothing_of_the_server() -> None:
    for name, targets in GRAPH.items():
        if name.startswith("steering_vectors"):
            assert not [target for target in targets if target.startswith("server")], name


def rank(name: str) -> int | None:
    parts = name.split(".")
    return OFFLINE_ORDER.index(parts[1]) if len(parts) > 1 and parts[1] in OFFLINE_ORDER else None


def test_offline_imports_run_one_way() -> None:
    for name, targets in GRAPH.items():
        if not name.startswith("steering_vectors") or rank(name) is None:
            continue
        for target in targets:
            if rank(target) is not None:
                assert rank(target) <= rank(name), f"{name} imports {target}"  # type: ignore[operator]


def test_server_imports_run_one_way() -> None:
    """steering_vectors ← server.engine ← server.profiles ← routes ← app."""
    order = ("server.engine", "server.profiles", "server.routes", "server.app", "server.cli")

    def place(name: str) -> int | None:
        return next((i for i, prefix in enumerate(order) if name == prefix or name.startswith(prefix + ".")), None)

    for name, targets in GRAPH.items():
        mine = place(name)
        for target in targets:
            theirs = place(target)
            if mine is not None and theirs is not None:
                assert theirs <= mine, f"{name} imports {target}"


@pytest.mark.parametrize("package", ["fastapi", "starlette", "pydantic", "sqlalchemy", "prometheus_client"])
def test_engine_knows_no_web_framework(package: str) -> None:
    for name, path in MODULES.items():
        if name.startswith("server.engine"):
            assert not [target for target, _ in imported(path) if target.split(".")[0] == package], name


def test_scheduler_has_no_torch() -> None:
    assert not [target for target, _ in imported(MODULES["server.engine.scheduler"]) if target.startswith("torch")]


def test_only_hooks_registers_hooks() -> None:
    for name, path in MODULES.items():
        if name != "steering_vectors.hooks":
            assert "register_forward" not in path.read_text(), name


def test_server_starts_without_heavy_packages() -> None:
    """Neither the app nor what it loads to serve needs the packages of fitting, plotting and tuning."""
    code = (
        "import sys, server.app; "
        "print(sorted({'sklearn', 'datasets', 'peft', 'matplotlib'} & {m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("| module |") :]
    assert [path.name for path in FILES if path.name != "__init__.py" and f"{path.name}`" not in table] == []
