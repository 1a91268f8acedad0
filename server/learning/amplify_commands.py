"""`trimtab amplify`: a profile that a judge improves round by round."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.learning.refine_commands import LEARNING, Directory, Name, in_promotion
from steering_vectors.cli import flags
from steering_vectors.cli.app import runnable
from steering_vectors.cli.roles import ADDRESS, AUTO, LARGE, ApiKeys, Judging, Temperature, Tokens, roles
from steering_vectors.errors import FitError

if TYPE_CHECKING:
    from server.learning.amplify import AmplifyReport
    from steering_vectors.models.loading import LanguageModel
    from steering_vectors.synthesis.debate import Prompt
    from steering_vectors.synthesis.judges import Judge

FOLDER = Path("amplified")


def amplify(
    name: Name,
    model: flags.Model,
    directory: Directory,
    *,
    judging: Judging,
    rule: Annotated[
        str,
        flags.in_data(
            help="A rule in place of a judge: words:FILE, no-words:FILE, length:short, length:long, or a Python "
            "function of the prompt and the answer that returns a score, as MODULE:FUNCTION."
        ),
    ] = "",
    question: Annotated[str, flags.in_data(help="What the judge is asked.")] = "Which answer is better?",
    api_key: ApiKeys = None,
    prompts: Annotated[
        str,
        flags.in_data(
            help="Prompts: lines of a .txt file, or the column `prompt`; those of --data, or else everyday questions."
        ),
    ] = "",
    data: Annotated[
        str, flags.in_data(help="The base data: a file, `hf:NAME[:split]`, or `demo:NAME`. Without it, verdicts alone.")
    ] = "",
    heldout_fraction: Annotated[
        float, flags.in_data(help="Share of the prompts that is in no fit, by their hashes; half of it is for tests.")
    ] = 0.4,
    rounds: Annotated[int, flags.in_data(min=1, help="The maximum number of rounds.")] = 5,
    pairs: Annotated[int, flags.in_data(min=1, help="Pairs of answers in a round.")] = 96,
    near: Annotated[str, flags.in_data(help="The strengths of the two answers of one half of the pairs.")] = "1,1",
    far: Annotated[str, flags.in_data(help="Those of the other half.")] = "1.5,-1.5",
    answer_tokens: Tokens = 96,
    temperature: Temperature = 0.8,
    test_answers: Annotated[int, flags.in_data(min=1, help="Answers of each version to each test prompt.")] = 2,
    method: Annotated[str, flags.in_method(help="The method. See `trimtab methods`.")] = "mean-diff",
    option: flags.MethodOptions = None,
    layers: Annotated[str, flags.in_method(help="auto, 12, 10-20 (both ends included) or 3,5,7.")] = "auto",
    text_tokens: flags.TextTokens = 160,
    text_count: flags.TextCount = 16,
    vote_weight: Annotated[
        float, flags.in_method(help="How much a verdict counts, compared with a base row; 0 as in `trimtab refine`.")
    ] = 0.0,
    kl_growth: Annotated[
        float, in_promotion(help="The factor of the KL budget after a promotion; 1 keeps the served version's.")
    ] = 1.2,
    kl_budget: Annotated[
        float, in_promotion(help="Stop here, in nats of KL per token; 0 for twice the first version's budget.")
    ] = 0.0,
    patience: Annotated[int, in_promotion(min=1, help="Stop after so many rounds in a row without a gain.")] = 2,
    trust: Annotated[
        str, in_promotion(help="Verticals of the trust suite, comma-separated; an empty text for none.")
    ] = "privacy",
    trust_data: Annotated[
        Path | None, in_promotion(help="The folder of `trimtab evaluate trust --data`; privacy needs none.")
    ] = None,
    trust_rows: Annotated[int, in_promotion(help="The maximum number of rows per vertical.", min=8)] = 64,
    strength: Annotated[float, in_promotion(help="The strength at which versions are compared.")] = 1.0,
    seed: flags.Seed = 0,
    folder: Annotated[
        Path | None, flags.in_output(help="The folder of the work, amplified/NAME by default; a run goes on there.")
    ] = None,
    plot: Annotated[
        Path | None, flags.in_output(help="Draw win rate and KL by round into this file, of type .svg, .png or .pdf.")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Improve a profile in rounds: write pairs of answers, have a judge compare them, refine, promote if it is better.

    It stops when nothing is gained any more, or when the KL budget is spent. Every round is a line of rounds.jsonl in
    the folder. Run the command again to go on after an interruption, or for more rounds.
    """
    from server.learning.amplify import VOTES, AmplifySettings
    from server.learning.amplify import amplify as run
    from server.learning.feedback_source import FeedbackSource
    from server.learning.refine import ModelChoice, RefineSettings
    from steering_vectors.evaluation.trust.suite import TrustSettings
    from steering_vectors.fitting.fit import FitSettings
    from steering_vectors.reports.terminal import progress_on_stderr
    from steering_vectors.synthesis.writers import Length

    folder = folder or FOLDER / name
    verticals = tuple(one.strip() for one in trust.split(",") if one.strip())
    refining = RefineSettings(
        name=name,
        model=ModelChoice(model.model, model.dtype, model.device, model.chat_template, model.revision),
        feedback=FeedbackSource(file=folder / VOTES),
        directory=directory.choose(),
        data=data or None,
        vote_weight=vote_weight,
        heldout_fraction=heldout_fraction,
        fit=FitSettings(
            method=method,
            options=flags.parse_options(option or []),
            layers=layers,
            text_tokens=text_tokens,
            text_count=text_count,
            seed=seed,
        ),
        strength=strength,
        trust=TrustSettings(trust_data, verticals, (0.0, strength), trust_rows, seed=seed) if verticals else None,
    )
    settings = AmplifySettings(
        refining, folder, _prompts(prompts, data), rounds, pairs, _two("--near", near), _two("--far", far), question,
        Length(answer_tokens, temperature), judging.rule(), test_answers, kl_growth, kl_budget, patience, seed,
    )  # fmt: skip
    lm = model.load()
    with _judge(lm, rule, judging, api_key, folder) as judge, progress_on_stderr(quiet=as_json) as progress:
        report = run(settings, judge, progress, lm=lm)
    if plot is not None:
        from steering_vectors.reports.rounds import draw_rounds

        draw_rounds(report["rounds"], plot, report["kl_budget"])
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)


def register_amplify(app: typer.Typer) -> None:
    """Add the command to a typer app."""
    app.command(rich_help_panel=LEARNING)(runnable(amplify))


@contextmanager
def _judge(lm: LanguageModel, rule: str, judging: Judging, keys: list[str] | None, folder: Path) -> Iterator[Judge]:
    from steering_vectors.synthesis.folder import Folder
    from steering_vectors.synthesis.rule_judges import parse_rule

    if rule:
        if judging.judge != AUTO:
            raise FitError("give either --rule or --judge")
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # for MODULE:FUNCTION, as `python -m` has it
        yield parse_rule(rule)
        return
    size = sum(one.numel() for one in lm.model.parameters())
    if judging.judge == AUTO and size < LARGE:
        raise FitError(
            f"{lm.identity.id} has {size / 1e6:.0f} million parameters, too few to judge answers: give a --rule, or "
            f"--judge person, model or {ADDRESS}"
        )
    with roles(lm, keys, judging.judge) as who:
        judge = who.judge(judging, Folder(folder), may_be_none=False)
        assert judge is not None
        yield judge


def _prompts(path: str, data: str) -> tuple[Prompt, ...]:
    from server.learning.amplify import prompts_of
    from steering_vectors.data.sources import load_pairs
    from steering_vectors.synthesis.debate import read_prompts

    if path or not data:
        return tuple(read_prompts(path))
    return prompts_of(load_pairs(data).positives)


def _two(flag: str, text: str) -> tuple[float, float]:
    try:
        one, other = map(float, text.split(","))
    except ValueError as error:
        raise FitError(f"{flag} {text!r} is not two strengths such as 1.5,-1.5") from error
    return one, other


def _show(report: AmplifyReport) -> None:
    for row in report["rounds"]:
        win = row["win"]
        votes = f", {row['votes']} votes" if row["round"] else ""
        print(
            f"round {row['round']}: {row['outcome']}, win rate {win['value']:.1%} ({win['low']:.1%} to "
            f"{win['high']:.1%}), KL {row['kl']:.3f}, perplexity {row['perplexity']:.2f}{votes}"
        )
        if row["outcome"] == "rejected":
            print(f"  {row['reason']}")
    best = report["rounds"][report["best"]]
    print(f"stopped: {report['stopped']}; {report['profile']} is best after round {report['best']}")
    print(f"version {best['version'][:8]}; every round is in {report['folder']}/rounds.jsonl")
