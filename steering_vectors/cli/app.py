"""The offline commands as part of the root command `trimtab`: their registration, errors and exit codes.

Messages and progress go to stderr, answers to stdout.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

import typer

from steering_vectors.cli.debate import debate
from steering_vectors.cli.deprecated import DistillCommand, EvaluateGroup, evaluate_suites
from steering_vectors.cli.describe import describe
from steering_vectors.cli.distill import bake, distill, distill_method
from steering_vectors.cli.evaluate import preferences, trust
from steering_vectors.cli.fit import calibrate, fit, show
from steering_vectors.cli.flags import declare, parameters_of
from steering_vectors.cli.methods import compare, methods
from steering_vectors.errors import TrimtabError

FAILED, INTERRUPTED = 2, 130
STOPPED = "interrupted: nothing was stored. Run the same command again; training resumes from its last checkpoint"
KEPT = "interrupted: what is done is in the folder. Run the same command again; it goes on from there"

FITTING = "Profiles"
WEIGHTS = "Profiles as weights"


def register(app: typer.Typer) -> None:
    """Add the offline commands to a typer app."""
    for command in (fit, calibrate, show):
        app.command(rich_help_panel=FITTING)(runnable(command))
    for maker in (describe, debate):
        app.command(rich_help_panel=FITTING)(runnable(maker, stopped=KEPT))
    listing = typer.Typer(help="List the methods of `trimtab fit`, or compare them on your data.")
    listing.callback(invoke_without_command=True)(methods)
    listing.command("compare")(runnable(compare))
    app.add_typer(listing, name="methods", rich_help_panel=FITTING)
    evaluate = typer.Typer(cls=EvaluateGroup, no_args_is_help=True, help="Measure what profiles do, and what it costs.")
    for suite in (preferences, trust):
        evaluate.command()(runnable(suite))
    evaluate.command(EvaluateGroup.OLD, hidden=True)(runnable(evaluate_suites))
    app.add_typer(evaluate, name="evaluate", rich_help_panel=FITTING)
    app.command("distill", cls=DistillCommand, rich_help_panel=WEIGHTS)(runnable(distill))
    for writer in (distill_method, bake):
        app.command(rich_help_panel=WEIGHTS)(runnable(writer))


def runnable(command: Callable[..., None], *, stopped: str = STOPPED) -> Callable[..., None]:
    """The command for typer, in which the fields of parameters that are dataclasses are flags of their own.

    A TrimtabError is one line on stderr and exit code 2, Ctrl-C the line `stopped` and exit code 130.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: one.annotation for name, one in parameters.items() if is_dataclass(one.annotation)}
    flags = {name: parameters_of(groups[name]) if name in groups else [one] for name, one in parameters.items()}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{flag.name: given.pop(flag.name) for flag in flags[name]})
        try:
            command(**given)
        except TrimtabError as error:
            names = [flag.name for group in flags.values() for flag in group]
            print(f"error: {with_flags(str(error), names)}", file=sys.stderr)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as stop:
            print(stopped, file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from stop

    declare(run, [flag for group in flags.values() for flag in group])
    return run


def with_flags(message: str, names: Iterable[str]) -> str:
    """A message of the library in which settings of these names are written as flags.

    They are those with an underscore, and `columns` before a renaming.
    """
    known = {name for name in names if "_" in name}
    written = re.sub(r"\w+", lambda word: f"--{word[0].replace('_', '-')}" if word[0] in known else word[0], message)
    return re.sub(r"\bcolumns (?='?\w+=)", "--columns ", written) if "columns" in names else written
