"""Test the tests with mutmut: a table of killed mutants by file, and the survivors that nobody has explained.

    python scripts/mutants.py [PATH ...] [--sample N --seed N] [--survivors | --resume] [--workers N]

Each folder has a work directory under mutants/, in which mutmut sees the files of that folder and their tests alone.
tests/mutants.toml holds the limits and the survivors that are accepted, each with a reason. Fails if a file is below
the limit, if a strict file has a survivor without a reason, or if the list names a mutant that is killed or gone.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from mutmut.configuration import reset_config
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name, orig_function_and_class_names_from_key

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "mutants"
LIST = ROOT / "tests/mutants.toml"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
FILES = [path.relative_to(ROOT).as_posix() for pattern in SETTINGS["only_mutate"] for path in ROOT.glob(pattern)]
# The tests of a folder are those of the same folder under tests/, except here.
TESTS = {
    "steering_vectors/steering": [
        "tests/steering_vectors/steering",
        *("-k", "llama or not (invariant_2_the or generate_equals or apply_to_all or strength_0 or disturb)"),
    ],
    "steering_vectors/fitting": [
        "tests/steering_vectors/fitting/test_layers.py",
        "tests/steering_vectors/fitting/test_calibration.py",
        *("-k", "not (again_meets or bfloat16 or fresh_samples or deterministic or last_search or recorded)"),
    ],
    "server/generation": ["tests/server/generation/test_steering_grammar.py"],
}
KILLED, ALIVE = ("killed", "timeout", "segfault", "suspicious"), ("survived", "no tests")
ENVIRONMENT = {  # of the tests
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HYPOTHESIS_PROFILE": "unshrunk",
}

# What is imported before mutmut begins is outside of the garbage collector's sight in each worker: six times faster.
START = "import torch; from transformers import AutoTokenizer, LlamaForCausalLM; import mutmut.__main__ as m; m.cli()"

Key = tuple[str, str, str, str]  # file, function, the changed lines before and after


@dataclass
class Verdicts:
    """What became of the mutants of one file that were tested, and of the listed survivors among all of them."""

    total: int
    status: dict[str, str]  # of each tested mutant
    alive: dict[str, Key] = field(default_factory=dict)
    stale: set[Key] = field(default_factory=set)

    @property
    def score(self) -> float:
        killed = sum(status in KILLED for status in self.status.values())
        return 100 * killed / len(self.status) if self.status else 100.0


def main(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Files or folders; all that are configured if none.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Mutants per file, drawn over its functions; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    survivors: Annotated[bool, typer.Option("--survivors", help="Test again only what survived last time.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the results of a run that was interrupted.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    chosen = [file for file in FILES if any(Path(file).is_relative_to(path) for path in paths or ["."])]
    if not chosen:
        sys.exit(f"no configured file lies in {', '.join(paths or [])}; [tool.mutmut] only_mutate names those that do")
    limits, reasons = read_list()
    results: dict[str, Verdicts] = {}
    for folder in dict.fromkeys(Path(file).parent.as_posix() for file in chosen):
        files = [file for file in chosen if Path(file).parent.as_posix() == folder]
        work = prepare(folder, forget=[] if survivors or resume else files)
        with chdir(work):
            reset_config()
            names = {file: select(file, sample, random.Random(f"{seed} {file}"), survivors, resume) for file in files}
            run(list(chain(*names.values())), workers)
            results |= {file: verdicts(file, reasons) for file in files}
    sys.exit(report(results, limits, reasons))


def read_list() -> tuple[dict[str, Any], dict[Key, str]]:
    """The limits, and the reason of each accepted survivor."""
    document = tomllib.loads(LIST.read_text(encoding="utf-8"))
    reasons: dict[Key, str] = {}
    for entry in document.pop("survivor", []):
        for before, after in entry["changes"]:
            if not entry["reason"].strip():
                sys.exit(f"{LIST.name}: {entry['file']} {entry['function']} has no reason")
            reasons[entry["file"], entry["function"], before, after] = entry["reason"]
    return document, reasons


def prepare(folder: str, forget: Iterable[str]) -> Path:
    """The folder's work directory: links to the checkout, and a pyproject.toml with the folder's files and tests.

    The results of the files in `forget` are dropped.
    """
    work = WORK / folder.replace("/", ".")
    work.mkdir(parents=True, exist_ok=True)
    for name in ("tests", *SETTINGS["source_paths"], *SETTINGS["also_copy"]):
        if not (work / name).exists():
            (work / name).symlink_to(ROOT / name)
    here = {
        **SETTINGS,
        "only_mutate": [file for file in FILES if Path(file).parent.as_posix() == folder],
        "pytest_add_cli_args_test_selection": TESTS.get(folder, [f"tests/{folder}"]),
    }
    section = "\n".join(["[tool.mutmut]", *(f"{key} = {json.dumps(value)}" for key, value in here.items())])
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = re.sub(r"^\[tool\.mutmut\].*\n(?:(?!\[).*\n)*", "", text, flags=re.MULTILINE)
    (work / "pyproject.toml").write_text(f"{text}\n{section}\n", encoding="utf-8")
    # mutmut copies new tests over the old ones, and does not measure again which functions a changed test calls
    shutil.rmtree(work / "mutants/tests", ignore_errors=True)
    (work / "mutants/mutmut-stats.json").unlink(missing_ok=True)
    for file in forget:
        for suffix in ("", ".meta", ".spans"):
            (work / "mutants" / f"{file}{suffix}").unlink(missing_ok=True)
    return work


def select(file: str, sample: int, draw: random.Random, survivors: bool, resume: bool) -> list[str]:
    """Names of the mutants to test."""
    names, known = generated(file), tested(file)
    if survivors:
        names = [name for name in names if known.get(name) in ALIVE]
    elif resume:
        names = [name for name in names if name not in known]
    if not sample or sample >= len(names):
        return names
    by_function = defaultdict(list)
    for name in names:
        by_function[function_of(name)].append(name)
    piles = [draw.sample(pile, len(pile)) for pile in by_function.values()]
    draw.shuffle(piles)
    rounds = (name for turn in zip_longest(*piles) for name in turn if name is not None)
    return [name for name, _ in zip(rounds, range(sample), strict=False)]


def generated(file: str) -> list[str]:
    """Names of all mutants of a file."""
    code = Path(file).read_text(encoding="utf-8")
    return [get_mutant_name(Path(file), name) for name in mutate_file_contents(file, code).mutant_names]


def tested(file: str) -> dict[str, str]:
    """What became of the mutants of a file so far."""
    results = Path("mutants") / f"{file}.meta"
    if not results.exists():
        return {}
    codes = json.loads(results.read_text(encoding="utf-8"))["exit_code_by_key"]
    return {name: status_by_exit_code[code] for name, code in codes.items() if code is not None}


def run(names: list[str], workers: int) -> None:
    if not names:
        return
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("PYTHONPATH", None)  # the checkout's own code must not come before the mutated one
    command = [sys.executable, "-c", START, "run", "--max-children", str(workers), *names]
    with Path("mutmut.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{Path('mutmut.log').read_text(encoding='utf-8')[-4000:]}\nmutmut failed in {Path.cwd()}")


def verdicts(file: str, reasons: dict[Key, str]) -> Verdicts:
    names, status = generated(file), tested(file)
    found = Verdicts(len(names), {name: status[name] for name in names if name in status})
    listed = {key for key in reasons if key[0] == file}
    functions = {key[1] for key in listed}
    seen: dict[Key, set[str]] = defaultdict(set)  # key -> statuses; equal lines of a function share one
    for name in names:
        if status.get(name) in ALIVE or function_of(name) in functions:
            key = (file, function_of(name), *changed_lines(file, name))
            seen[key].add(status.get(name, "untested"))
            if status.get(name) in ALIVE:
                found.alive[name] = key
    found.stale = {key for key in listed if seen[key].issubset(KILLED)}
    return found


def function_of(name: str) -> str:
    function, owner = orig_function_and_class_names_from_key(name)
    return f"{owner}.{function}" if owner else function


def changed_lines(file: str, name: str) -> tuple[str, str]:
    """The lines that a mutant changes, before and after, without their indentation."""
    diff = get_diff_for_mutant(name, path=file).splitlines()[2:]
    before, after = ([line[1:].strip() for line in diff if line.startswith(sign)] for sign in "-+")
    return "\n".join(before), "\n".join(after)


def report(results: dict[str, Verdicts], limits: dict[str, Any], reasons: dict[Key, str]) -> int:
    """Print the table and what is wrong; the exit status."""
    print(
        f"{'file':58} {'mutants':>7} {'tested':>6} {'killed':>6} {'timeout':>7} {'survived':>8} {'no tests':>8}  score"
    )
    for file, found in results.items():
        count = Counter("killed" if status in KILLED[2:] else status for status in found.status.values())
        numbers = f"{found.total:7} {len(found.status):6} {count['killed']:6} {count['timeout']:7}"
        print(f"{file:58} {numbers} {count['survived']:8} {count['no tests']:8} {found.score:5.1f}%")
    faults = list(chain.from_iterable(faults_of(file, found, limits, reasons) for file, found in results.items()))
    print("\n".join(["", *faults]) if faults else "every survivor of a strict file has a reason")
    return 1 if faults else 0


def faults_of(file: str, found: Verdicts, limits: dict[str, Any], reasons: dict[Key, str]) -> Iterator[str]:
    if found.score < limits["minimum"]:
        yield f"# {file} is at {found.score:.1f} %, below {limits['minimum']} %\n"
    unexplained = Counter(key for key in found.alive.values() if key not in reasons)
    note = "" if file in limits["strict"] else "# not a strict file: this does not fail by itself\n"
    for key in unexplained:
        yield note + as_entry(key)
    for _, function, before, after in found.stale:
        yield f"# {file} {function}: listed, but killed or gone: {before!r} -> {after!r}\n"


def as_entry(key: Key) -> str:
    """A survivor as it is written in the list, but for the reason."""
    plain = (not re.search(r"['\n]", text) for text in key)
    quoted = (
        f"'{text}'" if simple else json.dumps(text, ensure_ascii=False) for text, simple in zip(key, plain, strict=True)
    )
    file, function, before, after = quoted
    return f'[[survivor]]\nfile = {file}\nfunction = {function}\nchanges = [[{before}, {after}]]\nreason = ""\n'


if __name__ == "__main__":
    typer.run(main)
