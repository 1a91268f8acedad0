"""`refine`: a new version of a profile from base data and feedback, staged as a canary if it is better.

It runs in the process that calls it, which should not be a server's: it loads the model and computes for seconds to
minutes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from server.learning.behaviour.weighing import BehaviourReport, SignalSettings, weighed_votes
from server.learning.comparison import Compared, Comparison, HeldOut, TrustChange
from server.learning.feedback_source import FeedbackSource
from server.learning.held_out import is_held_out, pair_key
from server.learning.paired_bootstrap import Difference
from server.learning.promotion import Bounds, Gate, failed, gates_of
from server.learning.votes import Vote, VoteRules, votes_of
from server.profiles.audit import Author
from server.profiles.candidates import Candidates, ProfileDirectory
from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example, encode_example
from steering_vectors.data.corpus import prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.data.sources import load_pairs
from steering_vectors.errors import DataError, FitError, RequestError
from steering_vectors.evaluation.trust.suite import TrustSettings, prepare_verticals
from steering_vectors.fitting.calibration import DEFAULT_KL_BUDGET, SAMPLED_TOKENS
from steering_vectors.fitting.fit import FitSettings, fit
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel, load_model
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.metadata import DataRecord
from steering_vectors.profiles.profile import Profile
from steering_vectors.profiles.shipped import shipped_profiles
from steering_vectors.progress import Progress

VOTES_OVER_BASE = 3.0  # the weight of all votes, where all base rows together weigh 1
Outcome = Literal["rejected", "canary", "promoted"]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The model, as `load_model` takes it."""

    model: str
    dtype: str = "auto"
    device: str = "cpu"
    chat_template: str | None = None
    revision: str | None = None

    def load(self) -> LanguageModel:
        return load_model(
            self.model,
            dtype=self.dtype,
            device=self.device,
            chat_template=self.chat_template,
            revision=self.revision,
        )


@dataclass(frozen=True, slots=True)
class RefineSettings:
    """Options of `refine`. They can be pickled.

    - `name`, `directory`, `model`: the profile, where it is, and the model that it was fitted on.
    - `feedback`: where votes come from; `every_vote` takes those on other profiles' answers as well. `rules` says how
      much votes count. `signals` makes votes of signals as well, and weighs users by how reliable they are; None
      leaves signals out.
    - `data`, `columns`, `skip_bad_rows`: base data of pairs, as `load_pairs` takes it; None fits on votes alone.
    - `vote_weight`: how much a vote counts in the fit, compared with a base row; 0 lets all votes together count three
      times as much as all base rows, because two answers of one model differ less than base pairs do. Methods that
      cannot use weights need 1.
    - `heldout_fraction`: the share of prompts that is in no fit (see `is_held_out`). It may grow from one version to
      the next, and not fall.
    - `fit`: how to fit. Its name, description and KL budget are those of the version that is served, which also keeps
      endings if that did. `kl_budget` is another budget, in nats per token.
    - `strength`: at which both versions are compared. `bounds`: what the new one may cost. `trust`: the verticals of
      the trust suite, None for none; its strengths and random directions are not used.
    - `canary_share`: the share of the requests that the new version gets at first; 0 promotes it at once.
    - `author`: who asks for it, in the audit log.

    Raises FitError for values that cannot be used.
    """

    name: str
    model: ModelChoice
    feedback: FeedbackSource
    directory: ProfileDirectory = field(default_factory=ProfileDirectory)
    data: str | None = None
    columns: Mapping[str, str] | None = None
    skip_bad_rows: bool = False
    every_vote: bool = False
    rules: VoteRules = field(default_factory=VoteRules)
    signals: SignalSettings | None = None
    vote_weight: float = 0.0
    heldout_fraction: float = 0.4
    fit: FitSettings = field(default_factory=FitSettings)
    strength: float = 1.0
    bounds: Bounds = field(default_factory=Bounds)
    trust: TrustSettings | None = field(default_factory=lambda: TrustSettings(verticals=("privacy",), rows=64))
    canary_share: float = 0.1
    author: Author = field(default_factory=lambda: Author("trimtab refine"))
    kl_budget: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.heldout_fraction < 1:
            raise FitError(f"the held-out fraction must be between 0 and 1, not {self.heldout_fraction:g}")
        if not 0 <= self.canary_share < 1:
            raise FitError(f"canary_share must be at least 0 and below 1, not {self.canary_share:g}")
        if not 0 <= self.vote_weight < float("inf"):
            raise FitError(f"vote_weight must be a number that is not negative, not {self.vote_weight:g}")
        if not self.strength:
            raise FitError("versions are compared at a strength other than 0")


class VoteCounts(TypedDict):
    """Votes that were fitted on, votes that were held out, the prompts of these, and what made no vote, by reason.
    `sha256` is that of all votes."""

    fitted: int
    held_out: int
    held_out_prompts: int
    left_out: dict[str, int]
    sha256: str


class DifferenceRecord(TypedDict):
    """A mean over prompts, and its interval."""

    value: float
    low: float
    high: float
    prompts: int


class RefineReport(TypedDict):
    """What came of a refinement. `baseline` is the version that was served, `candidate` the new one if it was kept.
    `gain` is over ½, as in `Compared.votes`; `gain_nats`, and `base_gain` on held-out base rows, are in nats.
    `behaviour` is there if signals were used."""

    profile: str
    outcome: Outcome
    reason: str
    baseline: str
    candidate: str | None
    share: float
    votes: VoteCounts
    base_rows: int
    gain: DifferenceRecord
    gain_nats: DifferenceRecord
    base_gain: NotRequired[DifferenceRecord]
    behaviour: NotRequired[BehaviourReport]
    gates: list[Gate]
    trust: dict[str, TrustChange]
    notes: list[str]
    seconds: float


def refine(
    settings: RefineSettings, progress: Progress | None = None, *, lm: LanguageModel | None = None
) -> RefineReport:
    """Fit a new version of a profile to base data and votes, compare it with the version that is served, and stage it
    if it passes every gate; what came of it is in the audit log either way.

    Held-out prompts are in no fit, of base data and votes alike. The gain is by how much the new version wins held-out
    votes over the served one at the same strength (see `Compared`). Both are calibrated to the same KL. `gates_of` has
    all conditions.

    `lm` is the model, if it is loaded already. Raises FitError if there are too few votes or the fit fails, DataError
    for rows that cannot be used, ProfileMismatch for another model, Conflict if a candidate is being tried already or
    the profile was changed meanwhile, and what the profile store raises.
    """
    return _Refinement(settings, progress, lm).run()


@dataclass(frozen=True, slots=True)
class _Parts:
    """Votes and base rows, each parted into fitted and held-out ones."""

    votes: tuple[list[Vote], list[Vote]]
    base: tuple[list[tuple[Example, Example]], list[tuple[Example, Example]]]
    base_weights: tuple[list[float], list[float]]
    left_out: Counter[str]


class _Refinement:
    def __init__(self, settings: RefineSettings, progress: Progress | None, lm: LanguageModel | None) -> None:
        self._settings, self._progress = settings, progress
        self._began = time.monotonic()
        left_out: Counter[str] = Counter()
        stored = settings.feedback.of_profile(settings.name, every=settings.every_vote)
        self._behaviour: BehaviourReport | None = None
        if settings.signals is None:
            self._votes = votes_of(stored, settings.rules, left_out)
        else:
            self._votes, self._behaviour = weighed_votes(
                stored, settings.rules, settings.signals, settings.heldout_fraction, left_out
            )
        self._base = self._load_base()
        store = settings.directory.store(shipped_profiles())
        self._candidates = Candidates(store)
        self._served = self._candidates.served(settings.name)
        self._candidates.check_free(settings.name, self._served)
        self._baseline = store.load(settings.name, self._served)
        self._check_fraction()
        self._lm = lm or settings.model.load()
        self._baseline.check_model(self._lm.identity)
        self._encoded: dict[Example, Encoded] = {}
        self._parts = self._split(left_out)

    def run(self) -> RefineReport:
        candidate = self._fitted()
        compared = self._compared(candidate)
        gates = gates_of(compared, candidate, self._baseline, self._settings.bounds, self._settings.strength)
        return self._published(candidate, compared, gates)

    def _load_base(self) -> Preferences | None:
        settings = self._settings
        if settings.data is None:
            return None
        pairs = load_pairs(settings.data, columns=settings.columns, skip_bad_rows=settings.skip_bad_rows)
        if not pairs.paired:
            raise DataError("refining needs base data of pairs, not rows with labels", path=pairs.source)
        return pairs

    def _check_fraction(self) -> None:
        """Raise FitError for a held-out fraction that would fit on what the served version has held out."""
        before = self._baseline.data.get("heldout_prompts", 0.0)
        if self._settings.heldout_fraction < before:
            raise FitError(
                f"the served version holds out {before:g} of all prompts: hold out as many, or more, so that what was "
                "held out once is in no fit"
            )

    def _split(self, left_out: Counter[str]) -> _Parts:
        """Part the rows by the hashes of their prompts. Raises FitError for too few votes."""
        settings, fraction = self._settings, self._settings.heldout_fraction
        votes: tuple[list[Vote], list[Vote]] = ([], [])
        for vote in self._votes:
            if self._fits(vote.chosen, vote.rejected, left_out):
                votes[is_held_out(vote.key, fraction)].append(vote)
        base: tuple[list[tuple[Example, Example]], list[tuple[Example, Example]]] = ([], [])
        weights: tuple[list[float], list[float]] = ([], [])
        for pair, weight in zip(*self._base_rows(), strict=True):
            held = is_held_out(pair_key(*pair), fraction)
            base[held].append(pair)
            weights[held].append(weight)
        prompts = len({vote.key for vote in votes[True]})
        if not votes[False] or prompts < settings.bounds.min_prompts:
            raise FitError(
                f"there are votes on {prompts} held-out prompts and on "
                f"{len({vote.key for vote in votes[False]})} others: {settings.bounds.min_prompts} held-out ones are "
                f"needed, so gather about {round(settings.bounds.min_prompts / fraction)} prompts with votes"
                f"{_listed(left_out)}"
            )
        return _Parts(votes, base, weights, left_out)

    def _base_rows(self) -> tuple[list[tuple[Example, Example]], list[float]]:
        if self._base is None:
            return [], []
        return self._base.pairs(), list(self._base.weights or [1.0] * self._base.rows)

    def _fits(self, chosen: Example, rejected: Example, left_out: Counter[str]) -> bool:
        """Whether the model can read both texts; else the reason is counted."""
        limit = context_limit(self._lm)
        try:
            for example in (chosen, rejected):
                if limit is not None and len(self._encode(example)[0]) > limit:
                    left_out["longer than the model's context"] += 1
                    return False
        except (DataError, RequestError) as error:
            left_out[f"the model cannot read it: {error.message}"] += 1
            return False
        return True

    def _encode(self, example: Example) -> Encoded:
        if example not in self._encoded:
            self._encoded[example] = encode_example(self._lm.tokenizer, example)
        return self._encoded[example]

    def _fitted(self) -> Profile:
        """The candidate: fitted to what is not held out, and calibrated to the budget of the served version."""
        baseline, settings = self._baseline, self._settings
        keeps_endings = settings.fit.layering == "independent" and bool(baseline.method_options.get("keep_endings"))
        fitting = replace(
            settings.fit,
            name=settings.name,
            description=baseline.description,
            kl_budget=settings.kl_budget or baseline.calibration.get("kl_budget", DEFAULT_KL_BUDGET),
            keep_endings=settings.fit.keep_endings or keeps_endings,
        )
        made = fit(self._lm, self._training_rows(), fitting, progress=self._progress)
        data: DataRecord = {
            **made.data,
            "refined_from": self._served,
            "feedback_rows": len(self._parts.votes[False]),
            "heldout_prompts": settings.heldout_fraction,
        }
        return replace(made, apply_to=baseline.apply_to, gate=baseline.gate, data=data)

    def _training_rows(self) -> Preferences:
        votes, base = self._parts.votes[False], self._parts.base[False]
        total, base_total = sum(vote.weight for vote in votes), sum(self._parts.base_weights[False])
        factor = self._settings.vote_weight or (VOTES_OVER_BASE * base_total / total if base else 1.0)
        pairs = [*base, *((vote.chosen, vote.rejected) for vote in votes)]
        weights = [*self._parts.base_weights[False], *(factor * vote.weight for vote in votes)]
        source = "feedback" if self._base is None else f"{Path(self._base.source).name} and feedback"
        return Preferences(
            kind="preference",
            positives=tuple(one for one, _ in pairs),
            negatives=tuple(other for _, other in pairs),
            source=source,
            sha256=_digest(pairs, weights),
            weights=() if len(set(weights)) == 1 else tuple(weights),
        )

    def _compared(self, candidate: Profile) -> Compared:
        settings, votes = self._settings, self._parts.votes[True]
        rows, base = self._parts.base[True], None
        if rows:
            base = HeldOut(
                tuple((self._encode(one), self._encode(other)) for one, other in rows),
                tuple(pair_key(*row) for row in rows),
                tuple(self._parts.base_weights[True]),
            )
        held_out = HeldOut(
            tuple((self._encode(vote.chosen), self._encode(vote.rejected)) for vote in votes),
            tuple(vote.key for vote in votes),
            tuple(vote.weight for vote in votes),
        )
        asked = Preferences("preference", tuple(vote.chosen for vote in votes), tuple(vote.rejected for vote in votes))
        seed = settings.fit.seed
        prompts = prompts_with_room(self._lm, asked, room=SAMPLED_TOKENS, seed=seed)
        verticals = [] if settings.trust is None else prepare_verticals(self._lm, settings.trust)
        with steerable(self._lm) as steered:
            comparison = Comparison(
                steered, held_out, base, prompts, verticals, settings.strength, seed,
                settings.bounds.confidence, self._progress,
            )  # fmt: skip
            return comparison.of(candidate, self._baseline)

    def _published(self, candidate: Profile, compared: Compared, gates: list[Gate]) -> RefineReport:
        """Stage or promote a candidate that passed all gates, and write into the audit log what came of it."""
        settings, name = self._settings, self._settings.name
        report = self._report(candidate, compared, gates)
        author, figures = settings.author, _figures(report)
        if failures := failed(gates):
            report["reason"] = "; ".join(failures)
            self._candidates.note(name, author, report["reason"], figures)
            return report
        share = settings.canary_share
        data = _bytes_of(candidate)
        version = self._candidates.stage(name, data, self._served, share, author, report["reason"], figures)
        if not share:
            trial = self._candidates.trial(name)
            assert trial is not None
            self._candidates.promote(name, trial, 0.0, author, report["reason"], {})
        report |= {"candidate": version, "outcome": "canary" if share else "promoted", "share": share}
        return report

    def _report(self, candidate: Profile, compared: Compared, gates: list[Gate]) -> RefineReport:
        votes, base = self._parts.votes, compared.base
        report: RefineReport = {
            "profile": self._settings.name,
            "outcome": "rejected",
            "reason": "every gate was passed",
            "baseline": self._served,
            "candidate": None,
            "share": 0.0,
            "votes": {
                "fitted": len(votes[False]),
                "held_out": len(votes[True]),
                "held_out_prompts": len({vote.key for vote in votes[True]}),
                "left_out": dict(self._parts.left_out),
                "sha256": _digest(*_listed_votes([*votes[False], *votes[True]])),
            },
            "base_rows": len(self._parts.base[False]),
            "gain": _record(compared.votes),
            "gain_nats": _record(compared.nats),
            "gates": gates,
            "trust": compared.trust,
            "notes": candidate.metrics.get("notes", []),
            "seconds": time.monotonic() - self._began,
        }
        if self._behaviour is not None:
            report["behaviour"] = self._behaviour
        return report if base is None else {**report, "base_gain": _record(base)}


def _bytes_of(profile: Profile) -> bytes:
    """The bytes of a profile's file."""
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        return save_profile(profile, folder).read_bytes()


def _figures(report: RefineReport) -> dict[str, Any]:
    """What the audit log keeps of a report."""
    return {
        "votes": {name: value for name, value in report["votes"].items() if name != "left_out"},
        "base_rows": report["base_rows"],
        "gain": report["gain"],
        "gain_nats": report["gain_nats"],
        "gates": report["gates"],
        **({"base_gain": report["base_gain"]} if "base_gain" in report else {}),
        **({"log_odds": report["behaviour"]["log_odds"]} if "behaviour" in report else {}),
    }


def _record(difference: Difference) -> DifferenceRecord:
    return {
        "value": difference.value,
        "low": difference.low,
        "high": difference.high,
        "prompts": difference.prompts,
    }


def _listed_votes(votes: Sequence[Vote]) -> tuple[list[tuple[Example, Example]], list[float]]:
    return [(vote.chosen, vote.rejected) for vote in votes], [vote.weight for vote in votes]


def _digest(pairs: Sequence[tuple[Example, Example]], weights: Sequence[float]) -> str:
    """A sha256 of pairs and their weights, whatever their order."""
    rows = [json.dumps([repr(one), repr(other), weight]) for (one, other), weight in zip(pairs, weights, strict=True)]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def _listed(left_out: Mapping[str, int]) -> str:
    if not left_out:
        return ""
    return " (left out: " + ", ".join(f"{count}: {reason}" for reason, count in left_out.items()) + ")"
