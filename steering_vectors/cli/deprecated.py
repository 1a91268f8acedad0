"""Old spellings of commands, which work for one more version: each prints a notice on stderr and does the same.

- `trimtab evaluate NAME… [--suite S]` is now `trimtab evaluate preferences` and `trimtab evaluate trust`.
- `trimtab distill NAME --bake` is now `trimtab bake NAME`.
- `trimtab distill --method M` is now `trimtab distill-method M`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.cli.evaluate import VERTICALS, measure, parse_verticals
from steering_vectors.errors import FitError

SUITES = {
    "preference": "trimtab evaluate preferences",
    "trust": "trimtab evaluate trust",
    "all": "trimtab evaluate preferences` and `trimtab evaluate trust",
}
OPTIONS_OF = {
    "preference": ("data", "rows", "randoms", "reward_samples", "columns", "skip_bad_rows", "skip_long_rows"),
    "trust": ("trust_data", "verticals", "toxicity", "trust_rows", "trust_randoms"),
}


def print_notice(old: str, new: str) -> None:
    print(f"notice: `{old}` is now `{new}`; the old form will be removed in the next version", file=sys.stderr)


class DistillCommand(TyperCommand):
    """`trimtab distill`, with its former flags --bake and --method."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if "--bake" in args:
            return self._moved("bake", "--bake", [one for one in args if one != "--bake"], parent, extra)
        for place, one in enumerate(args):
            flag, equals, method = one.partition("=")
            if flag == "--method" and (equals or place + 1 < len(args)):
                taken = [method] if equals else args[place + 1 : place + 2]
                rest = args[:place] + args[place + (1 if equals else 2) :]
                return self._moved("distill-method", "--method", [*taken, *rest], parent, extra)
        return super().make_context(info_name, args, parent, **extra)

    def _moved(self, name: str, flag: str, args: list[str], parent: Any, extra: dict[str, Any]) -> Any:
        print_notice(f"trimtab distill {flag}", f"trimtab {name}")
        command = parent.command.get_command(parent, name)
        return command.make_context(name, args, parent, **extra)


class EvaluateGroup(TyperGroup):
    """`trimtab evaluate`, which formerly took profiles in place of a subcommand."""

    OLD: ClassVar[str] = "_suites"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and "--help" not in args:
            args = [self.OLD, *args]
        return super().parse_args(ctx, args)


@dataclass(frozen=True, slots=True)
class OptionalData(flags.Data):
    data: str = ""


def evaluate_suites(
    context: typer.Context,
    profile: flags.ProfileNames,
    model: flags.Model,
    data: OptionalData,
    suite: str = "preference",
    trust_data: Path | None = None,
    verticals: str = VERTICALS,
    toxicity: str = "rtp",
    trust_rows: Annotated[int, typer.Option(min=8)] = 200,
    trust_randoms: Annotated[int, typer.Option(min=0)] = 5,
    profiles: flags.Profiles = Path("profiles"),
    report: flags.Report = None,
    strengths: flags.Strengths = "-1,-0.5,0,0.5,1",
    rows: Annotated[int, typer.Option(min=8)] = 256,
    randoms: Annotated[int, typer.Option(min=0)] = 10,
    reward_samples: Annotated[int, typer.Option(min=0)] = 64,
    seed: flags.Seed = 0,
    as_json: flags.AsJson = False,
) -> None:
    _check_suite(context, suite)
    print_notice(f"trimtab evaluate NAME{'' if suite == 'preference' else f' --suite {suite}'}", SUITES[suite])
    stored, wanted = flags.load_profiles(profile, profiles), flags.parse_strengths(strengths)
    held_out = trust = None
    if suite != "trust":
        settings = steering_vectors.EvaluationSettings(
            wanted, rows, randoms, reward_samples, seed=seed, skip_long_rows=data.skip_long_rows
        )
        held_out = data.load(), settings
    if suite != "preference":
        trust = steering_vectors.TrustSettings(
            trust_data, parse_verticals(verticals), wanted, trust_rows, trust_randoms, toxicity, seed
        )
    measure(model.load(), stored, report, as_json, held_out=held_out, trust_settings=trust)


def _check_suite(context: typer.Context, suite: str) -> None:
    """Raise FitError for an unknown suite, for missing data, and for options of a suite that is not run."""
    if suite not in SUITES:
        raise FitError(f"--suite {suite!r} is not one of preference, trust, all")
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    for other, options in OPTIONS_OF.items():
        if suite not in (other, "all") and (unused := sorted(given.intersection(options))):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise FitError(f"--suite {suite} does not read {names}: leave it out, or ask for --suite {other} or all")
    if suite != "trust" and "data" not in given:
        raise FitError(f"--suite {suite} reads preferences: name them by --data (--suite trust needs none)")
