"""Write docs/cli.md from the commands of `trimtab`; with --check, fail if the page is out of date.

python scripts/cli_docs.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEADING = "<!-- Written by scripts/cli_docs.py: run `make docs`, do not edit. -->\n\n# Command line"
WHERE = "`trimtab COMMAND --help` shows the same in the terminal. Errors go to stderr with exit code 2."
OPTIONS = "Options"


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page differs.")] = False,
) -> None:
    page = render()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.name} is not what the commands say: run `make docs`")


def render() -> str:
    """The whole page, in Markdown."""
    root = typer.main.get_command(app)
    context = root.context_class(root, info_name="trimtab")
    commands = [(words, command) for words, command in _commands(root, context, ("trimtab",)) if words != ("trimtab",)]
    parts = [HEADING, WHERE, _table([["command", "meaning"], *(_entry(*one) for one in commands)])]
    for words, command in commands:
        parts += _section(words, command)
    return "\n\n".join(parts) + "\n"


def _commands(command: Any, context: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a command and its subcommands, except hidden ones."""
    yield words, command
    if not hasattr(command, "list_commands"):
        return
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        if not below.hidden:
            yield from _commands(below, below.context_class(below, info_name=name, parent=context), (*words, name))


def _entry(words: tuple[str, ...], command: Any) -> list[str]:
    name = " ".join(words)
    return [f"[`{name}`](#{name.replace(' ', '-')})", _text(command.help).partition("\n\n")[0]]


def _section(words: tuple[str, ...], command: Any) -> Iterator[str]:
    yield f"## {' '.join(words)}"
    yield _text(command.help)
    if hasattr(command, "list_commands"):
        return
    parameters = [one for one in command.params if one.name != "help" and not one.hidden]
    yield f"```\n{' '.join(words)} {_usage(parameters)}\n```"
    if arguments := [one for one in parameters if one.param_type_name == "argument"]:
        yield _table([["argument", "meaning"], *([f"`{_metavar(one)}`", _text(one.help)] for one in arguments)])
    panels: dict[str, list[list[str]]] = {}
    for one in parameters:
        if one.param_type_name == "option":
            panels.setdefault(one.rich_help_panel or OPTIONS, []).append([_flags(one), _default(one), _text(one.help)])
    for panel, rows in sorted(panels.items(), key=lambda item: item[0] == OPTIONS):
        yield _table([[panel.lower(), "default", "meaning"], *rows])


def _usage(parameters: list[Any]) -> str:
    arguments = [_metavar(one) for one in parameters if one.param_type_name == "argument"]
    needed = [f"{one.opts[0]} {one.name.upper()}" for one in parameters if _is_required_option(one)]
    return " ".join([*arguments, *needed, "[OPTIONS]"])


def _is_required_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option" and parameter.required)


def _metavar(argument: Any) -> str:
    return f"{argument.name.upper()}{'...' if argument.nargs == -1 else ''}"


def _flags(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default in (None, "", []):
        return ""
    return f"`{option.default}`"


def _text(text: str | None) -> str:
    """Help text with one line per paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


if __name__ == "__main__":
    typer.run(main)
