"""Write the table of metrics in docs/observability.md; with --check, fail if it is out of date.

python scripts/metrics_docs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from server.observability.metrics import METRICS, PREFIX

PAGE = Path(__file__).resolve().parents[1] / "docs" / "observability.md"
BEGIN = "<!-- Written by scripts/metrics_docs.py: run `make docs`, do not edit. -->\n\n"
END = "\n\n<!-- The end of what scripts/metrics_docs.py writes. -->"


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page differs.")] = False,
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    wanted = f"{head}{BEGIN}{table()}{END}{tail}"
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif page != wanted:
        sys.exit(f"{PAGE.name} is not what the metrics are: run `make docs`")


def table() -> str:
    """One row for each metric, in Markdown."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for name, one in METRICS.items():
        shown = f"{PREFIX}{name}_total" if one.kind == "counter" else f"{PREFIX}{name}"
        labels = ", ".join(f"`{label}`" for label in one.labels)
        lines.append(f"| `{shown}` | {one.kind} | {labels} | {one.meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
