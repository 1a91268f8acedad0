"""Calibrating a stored profile anew: with another budget or bound, on other prompts, or after it was made by hand.

Owns which prompts such a calibration may use. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import replace

from steering_vectors.data.corpus import Corpus, encode_corpus, prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.fitting.calibration import DEFAULT_KL_BUDGET, SAMPLED_TOKENS, calibrate
from steering_vectors.measures.curve import PERPLEXITY_BOUND
from steering_vectors.measures.propensity import REPORT_ROWS, propensity_report
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress


def recalibrate(
    lm: LanguageModel,
    profile: Profile,
    pairs: Preferences,
    *,
    kl_budget: float = DEFAULT_KL_BUDGET,
    perplexity_bound: float = PERPLEXITY_BOUND,
    seed: int = 0,
    skip_long_rows: bool = False,
    allow_model_mismatch: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """The profile with unit, safe range and held-out margins measured on these rows' prompts.

    Of the data that the profile was fitted to, only rows that it was not trained on are used. The profile must belong
    to the model (ProfileMismatch) unless `allow_model_mismatch`.
    """
    profile.check_model(lm.identity, allow_mismatch=allow_model_mismatch)
    limit = context_limit(lm)
    corpus = unseen(profile, encode_corpus(lm.tokenizer, pairs, limit=limit, skip_long_rows=skip_long_rows))
    prompts = prompts_with_room(lm, corpus.pairs, room=SAMPLED_TOKENS, seed=seed)
    fresh = calibrate(
        lm, profile, prompts, kl_budget=kl_budget, perplexity_bound=perplexity_bound, seed=seed, progress=progress
    )
    with steerable(lm) as steered:
        report = propensity_report(steered, fresh, corpus.sides().thinned(REPORT_ROWS))
    return replace(fresh, metrics={**fresh.metrics, "propensity": report})


def unseen(profile: Profile, corpus: Corpus) -> Corpus:
    """The rows that a profile was not trained on: all of other data, the held-out ones of its own."""
    return parted(profile, corpus)[1]


def parted(profile: Profile, corpus: Corpus) -> tuple[Corpus | None, Corpus]:
    """(the rows that a profile was trained on, the others); None of other data than its own."""
    options = profile.method_options
    if corpus.pairs.sha256 != profile.data.get("sha256") or "heldout_fraction" not in options:
        return None, corpus
    return corpus.split(options["heldout_fraction"], options["seed"], min_side=4)
