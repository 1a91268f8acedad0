"""List the benchmarks: `python -m benchmarks` prints the first line of each one's docstring."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, str]:
    """The first line of each benchmark's docstring, by module name. A benchmark is a module that ends in `typer.run`.

    Files are parsed and not imported, because some need packages of other environments.
    """
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.endswith("\n    typer.run(main)\n"):
            name = ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
            found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main() -> None:
    lines = benchmarks()
    width = max(map(len, lines))
    print("Run one with `python -m NAME`; `--help` lists its options. Figures: benchmarks/README.md\n")
    for name, line in lines.items():
        print(f"  {name:{width}}  {line}")


if __name__ == "__main__":
    main()
