"""The share of the gain of explicit votes that signals alone give, with noise and spam.

    python -m benchmarks.learning.behaviour [--taste concise] [--pairs 200] [--noise 0.3] [--spam 0.2] [--seeds 3]

No server runs. Simulated people see two answers to each question of a demo set, of which one is truly better by the
taste. One crowd says which; another one only copies, regenerates, continues, abandons and reads, by known likelihoods.
Each person of either crowd takes the worse answer for the better one with the chance `--noise`. The signals also have a
share of spam, on other questions' answers. A profile is fitted to the weighed votes of each crowd, and to votes without
a mistake. Its gain is that of the log-probability of better answers to questions that nobody has seen, less that of
worse ones, over the first version, as `trimtab refine` measures it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.learning.crowd import Crowd, Seen, shared_out
from server.feedback.items import Stored
from server.learning.behaviour.weighing import SignalSettings, weighed_votes
from server.learning.comparison import Comparison, HeldOut
from server.learning.held_out import pair_key
from server.learning.votes import Vote, VoteRules, votes_of
from steering_vectors import FitSettings, fit, load_model, load_pairs
from steering_vectors.data.chat import encode_example
from steering_vectors.data.corpus import prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.data.sources import DEMO_DIRECTORY
from steering_vectors.fitting.calibration import SAMPLED_TOKENS
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile

PEOPLE, SPAMMERS = 20, 5


def main(
    base: Annotated[str, typer.Option(help="The demo's manner that the first version was fitted on.")] = "warm",
    taste: Annotated[str, typer.Option(help="The manner that people like.")] = "concise",
    pairs: Annotated[int, typer.Option(help="Pairs of answers that each crowd sees.")] = 200,
    noise: Annotated[float, typer.Option(help="How often a person is mistaken.")] = 0.3,
    spam: Annotated[float, typer.Option(help="The share of spam in the signals.")] = 0.2,
    layers: Annotated[str, typer.Option(help="The blocks of all profiles, as in `trimtab fit`.")] = "4",
    seeds: Annotated[int, typer.Option(help="Crowds of either kind.")] = 3,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    lm = load_model("demo")
    first = fit(lm, load_pairs(f"demo:{base}"), FitSettings(name="first", layers=layers, text_tokens=0))
    bench = Bench(lm, first, rows_of(taste, "heldout"))
    shown = rows_of(taste, "train")[:pairs]
    exact = bench.gain(
        [vote for user, own in shared_out(shown, PEOPLE).items() for vote in votes(Crowd(0).votes(user, own))]
    )
    print(f"votes without a mistake: {exact:+.2f} nats", flush=True)
    found = []
    for seed in range(seeds):
        spread = rows_of(base, "train")[: round(pairs * spam / (1 - spam))]
        row = {"seed": seed, **gains(bench, shown, spread, seed, noise)}
        found.append(row)
        print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    shares = [row["signals"] / row["votes"] for row in found]
    print(f"share of the gain of as many votes: {np.mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
    if out is not None:
        out.write_text(json.dumps({"exact": exact, "runs": found}, indent=1))
    raise typer.Exit(0 if np.mean(shares) >= 0.8 else 1)


class Bench:
    """Measures what votes make of a profile."""

    def __init__(self, lm: LanguageModel, first: Profile, truth: Sequence[Seen]) -> None:
        self._lm, self._first = lm, first
        right = votes([one for pair in truth for one in Crowd(0).votes("truth", [pair])])
        encoded = [
            (encode_example(lm.tokenizer, one.chosen), encode_example(lm.tokenizer, one.rejected)) for one in right
        ]
        keys = tuple(pair_key(one.chosen, one.rejected) for one in right)
        self._truth = HeldOut(tuple(encoded), keys, (1.0,) * len(right))
        asked = Preferences("preference", tuple(one.chosen for one in right), tuple(one.rejected for one in right))
        self._prompts = prompts_with_room(lm, asked, room=SAMPLED_TOKENS, seed=0)

    def gain(self, given: Sequence[Vote]) -> float:
        """The gain of a profile that is fitted to votes, in nats."""
        weights = tuple(vote.weight for vote in given)
        rows = Preferences(
            "preference",
            tuple(vote.chosen for vote in given),
            tuple(vote.rejected for vote in given),
            weights=() if len(set(weights)) == 1 else weights,
        )
        made = fit(self._lm, rows, FitSettings(name="made", layers=self._first.layers, text_tokens=0))
        with steerable(self._lm) as steered:
            compared = Comparison(steered, self._truth, None, self._prompts, [], 1.0, 0).of(made, self._first)
        return compared.nats.value


def gains(bench: Bench, shown: Sequence[Seen], other: Sequence[Seen], seed: int, noise: float) -> dict[str, float]:
    """The gains of explicit votes as they are and of signals, and what spam weighs among these."""
    crowd, people = Crowd(seed, noise), shared_out(shown, PEOPLE)
    said = [one for user, own in people.items() for one in crowd.votes(user, own)]
    done = [one for user, own in people.items() for one in crowd.signals(user, own)]
    done += [one for user, own in shared_out(other, SPAMMERS, "spam").items() for one in crowd.spam(user, own)]
    weighed, report = weighed_votes(done, VoteRules(), SignalSettings(), 0.0, Counter())
    spam = sum(vote.weight for vote in weighed if str(vote.user).startswith("spam"))
    return {
        "votes": bench.gain(votes(said)),
        "signals": bench.gain(weighed),
        "signal_votes": float(report["signal_votes"]),
        "spam_share": spam / sum(vote.weight for vote in weighed),
    }


def votes(given: Sequence[Stored]) -> list[Vote]:
    return votes_of(given, VoteRules(), Counter())


def rows_of(manner: str, part: str) -> list[Seen]:
    """The pairs of a demo set."""
    lines = (DEMO_DIRECTORY / f"{manner}.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [Seen(row["prompt"], _text(row["chosen"]), _text(row["rejected"])) for row in rows]


def _text(side: Any) -> str:
    return side if isinstance(side, str) else str(side[0]["content"])


if __name__ == "__main__":
    typer.run(main)
