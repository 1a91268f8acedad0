"""`python -m benchmarks` lists every benchmark, and its README has a row for each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.__main__ import benchmarks

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "benchmarks." + path.relative_to(ROOT / "benchmarks").with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "benchmarks").rglob("*.py")
    if re.search(r"^ +typer\.run\(main\)$", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def test_every_command_is_listed_with_its_first_line() -> None:
    lines = benchmarks()
    assert COMMANDS
    assert lines.keys() == COMMANDS
    for name, line in lines.items():
        assert len(line) > 20, name
        assert line.endswith("."), f"{name}: the first line of the docstring is not a whole sentence"


def test_the_listing_loads_no_heavy_package() -> None:
    code = (
        "import runpy, sys; runpy.run_module('benchmarks', run_name='__main__'); "
        "print({'torch', 'transformers', 'typer', 'httpx'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *listing, heavy = done.stdout.splitlines()
    assert heavy == "set()"
    assert {line.split()[0] for line in listing if line.startswith("  ")} == COMMANDS


def test_the_readme_has_a_row_for_each() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"-m (benchmarks\.[\w.]+)", readme))
    assert named == COMMANDS
