"""The offline commands as part of the root command `trimtab`: their registration, errors and exit codes.

Messages and progress go to stderr, answers to stdout.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from steering_vectors.cli.bake import bake
from steering_vectors.cli.calibrate import calibrate
from steering_vectors.cli.deprecated import DistillCommand, EvaluateGroup, evaluate_suites
from steering_vectors.cli.distill import distill, distill_method
from steering_vectors.cli.evaluate import preferences, trust
from steering_vectors.cli.fit import fit
from steering_vectors.cli.methods import methods
from steering_vectors.cli.show import show
from steering_vectors.errors import TrimtabError

FAILED, INTERRUPTED = 2, 130
STOPPED = "interrupted: nothing was stored. Run the same command again; training resumes from its last checkpoint"

FITTING = "Profiles"
WEIGHTS = "Profiles as weights"

P = ParamSpec("P")


def register(app: typer.Typer) -> None:
    """Add the offline commands to a typer app."""
    app.command("fit", rich_help_panel=FITTING)(reporting_errors(fit))
    app.command("methods", rich_help_panel=FITTING)(reporting_errors(methods))
    app.command("calibrate", rich_help_panel=FITTING)(reporting_errors(calibrate))
    app.command("show", rich_help_panel=FITTING)(reporting_errors(show))
    evaluate = typer.Typer(cls=EvaluateGroup, no_args_is_help=True, help="Measure what profiles do, and what it costs.")
    evaluate.command("preferences")(reporting_errors(preferences))
    evaluate.command("trust")(reporting_errors(trust))
    evaluate.command(EvaluateGroup.OLD, hidden=True)(reporting_errors(evaluate_suites))
    app.add_typer(evaluate, name="evaluate", rich_help_panel=FITTING)
    app.command("distill", cls=DistillCommand, rich_help_panel=WEIGHTS)(reporting_errors(distill))
    app.command("distill-method", rich_help_panel=WEIGHTS)(reporting_errors(distill_method))
    app.command("bake", rich_help_panel=WEIGHTS)(reporting_errors(bake))


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Report a TrimtabError as one line on stderr with exit code 2, and Ctrl-C as one line with exit code 130."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TrimtabError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as stop:
            print(STOPPED, file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from stop

    return run
