"""Write docs/settings.md, the table of the server's settings; with --check, fail if it is out of date.

python scripts/settings_docs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from server.cli import value_kind
from server.settings import PREFIX, Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEADING = "<!-- Written by scripts/settings_docs.py: run `make docs`, do not edit. -->\n\n# Settings"
INTRODUCTION = """\
Every setting of `trimtab serve` is a flag and an environment variable. A flag wins over the variable, and the variable
over the default. An empty variable is an absent one, except those of keys, which must not be empty. What is on
or off has two flags, such as `--prefix-reuse` and `--no-prefix-reuse`, and a variable that is `true` or `false`. What
cannot work is refused before anything is loaded, with exit code 2."""

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page differs.")] = False,
) -> None:
    page = render()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.name} is not what the settings are: run `make docs`")


def render() -> str:
    """The whole page, in Markdown."""
    lines = ["| group | flag | environment variable | default | values | meaning |", "|---|---|---|---|---|---|"]
    lines += [_row(name, field) for name, field in Settings.model_fields.items()]
    return "\n\n".join([HEADING, INTRODUCTION, "\n".join(lines)]) + "\n"


def _row(name: str, field: Any) -> str:
    panel = cast(dict[str, str], field.json_schema_extra)["panel"]
    default = "" if field.default is None else f"`{str(field.default).lower()}`"
    cells = [panel, f"`--{name.replace('_', '-')}`", f"`{PREFIX}{name.upper()}`", default, _values(field)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in [*cells, field.description])} |"


def _values(field: Any) -> str:
    kind = value_kind(field.annotation)
    if choices := get_args(kind):
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = {sign: getattr(one, name) for one in field.metadata for name, sign in BOUNDS.items() if hasattr(one, name)}
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
    return ", ".join([names[kind], *(f"{sign} {value}" for sign, value in bounds.items())])


if __name__ == "__main__":
    typer.run(main)
