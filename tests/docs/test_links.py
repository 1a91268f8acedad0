"""The pages lead somewhere: every relative link and anchor, and every command, flag, module and file that they name."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer.main
import yaml

from server.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
FOLDERS = (
    ".ci",
    ".github",
    "benchmarks",
    "deploy",
    "docker",
    "docs",
    "examples",
    "scripts",
    "server",
    "steering_vectors",
    "tests",
)
SHELL = ("", "bash", "sh", "console")

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
FILE = re.compile(r"\w[\w./-]*/[\w.-]+\.[a-z]+|[\w.-]+\.(?:py|cpp|hpp)")


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(prose(page)):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return frozenset(found)


def named(page: Path) -> Iterator[str]:
    """What a page sets as code: spans, and the lines of blocks that are typed in a shell."""
    text = page.read_text(encoding="utf-8")
    for language, block in FENCE.findall(text):
        if language in SHELL:
            yield from (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    yield from (code.strip() for _, code in CODE.findall(prose(page)))


def by_page(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=[page.relative_to(ROOT).as_posix() for page in pages])


@by_page(PAGES)
def test_links_and_anchors_exist(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


@by_page(PAGES)
def test_commands_exist(page: Path) -> None:
    for text in named(page):
        words = text.removeprefix(".venv/bin/").split()
        match words:
            case ["make", target, *_]:
                assert target in make_targets(), text
            case ["trimtab", *rest]:
                check_trimtab(rest, text)
            case ["python" | "torchrun", *rest] if "-m" in rest:
                module, *rest = rest[rest.index("-m") + 1 :]
                if module == "server.cli":
                    check_trimtab(rest, text)
                else:
                    unknown = set(FLAG.findall(" ".join(rest))) - module_flags(module)
                    assert not unknown, f"{text}: {module} has no {unknown}"
            case [flag, *_] if flag.startswith("--"):
                assert set(FLAG.findall(flag)) <= every_flag(), text


@by_page(PAGES)
def test_files_exist(page: Path) -> None:
    missing = set()
    for text in named(page):
        for word in text.split():
            inside = word.split("/")[0] in FOLDERS and "/" in word
            if (inside or (word == text and FILE.fullmatch(word))) and not exists(word.split("::")[0]):
                missing.add(word)
    assert not missing


@by_page([page for page in PAGES if page.name != "CHANGELOG.md"])
def test_extras_exist(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"trimtab\[(\w+)\]", page.read_text(encoding="utf-8")):
        assert extra in extras


def test_help_lists_every_make_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)) == set(phony[1].split())


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["ci"]["steps"] if "run" in step] == [".ci/run"]
    commands = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert {"test", "test-clients", "docs"} <= set(commands) <= make_targets()


def test_this_would_find_a_wrong_one() -> None:
    assert "serve" in make_targets()
    check_trimtab(["fit", "NAME", "--model", "M", "[-o", "KEY=VALUE]…"], "")
    for wrong in (["no-such-command"], ["fit", "--no-such-flag"]):
        with pytest.raises(AssertionError):
            check_trimtab(wrong, "")
    assert not exists("server/no_such_file.py")
    assert not module_flags("benchmarks.speed.http") >= {"--no-such-flag"}
    assert {"two-real-models-sentiment", "memory-of-a-fit"} <= anchors(ROOT / "docs" / "results.md")


def exists(name: str) -> bool:
    """Whether this is a file: from the root, from one of the packages, or by its last component alone."""
    homes = (ROOT, ROOT / "server", ROOT / "steering_vectors")
    if any(any(home.glob(name.strip("/"))) for home in homes):
        return True
    return "/" not in name and any(any((ROOT / folder).rglob(name)) for folder in FOLDERS)


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def flags_of(command: click.Command) -> set[str]:
    return {"--help"}.union(*([*one.opts, *one.secondary_opts] for one in command.params))


def subcommands(command: click.Command) -> dict[str, click.Command]:
    return getattr(command, "commands", {})  # typer's groups are not click's own


def check_trimtab(words: list[str], text: str) -> None:
    """What follows `trimtab` in a page: commands that exist, and flags that they have."""
    command = typer.main.get_command(app)
    while (commands := subcommands(command)) and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        assert words[0] in commands, f"{text}: there is no command {words[0]}"
        command, words = commands[words[0]], words[1:]
    unknown = set(FLAG.findall(" ".join(words))) - flags_of(command)
    assert not unknown, f"{text}: {command.name} has no {unknown}"


@cache
def module_flags(module: str) -> frozenset[str]:
    """The options of a module's `main`, read from its source: modules of benchmarks can be slow to import."""
    path = ROOT / Path(*module.split("."))
    tree = ast.parse((path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    found = {"--help"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            for one in (*node.args.args, *node.args.kwonlyargs):
                name = one.arg.strip("_").replace("_", "-")
                is_switch = one.annotation is not None and "bool" in ast.unparse(one.annotation)
                found |= {f"--{name}", f"--no-{name}"} if is_switch else {f"--{name}"}
            literals = {
                one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)
            }
            found |= {flag for text in literals for flag in text.split("/") if FLAG.fullmatch(flag)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and FLAG.fullmatch(node.value):
            found.add(node.value)  # argparse
    return frozenset(found)


@cache
def every_flag() -> frozenset[str]:
    """The flags of all commands and of all benchmarks."""

    def commands(command: click.Command) -> Iterator[click.Command]:
        yield command
        for child in (one for one in subcommands(command).values() if not one.hidden):
            yield from commands(child)

    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("*.py")]
    found = set().union(*map(flags_of, commands(typer.main.get_command(app))), *map(module_flags, modules))
    return frozenset(found)
