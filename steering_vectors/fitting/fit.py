"""From preference data and a model to a profile: the one call behind `trimtab fit`.

Owns the order of the work (encode, part, capture, find, choose layers, calibrate, measure) and what is recorded of it.
Knows nothing of files: data comes loaded, and the profile is stored by whoever asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering_vectors.data.batches import DEFAULT_BATCH_TOKENS
from steering_vectors.data.chat import chat_template_sha256
from steering_vectors.data.corpus import Corpus, encode_corpus, prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError
from steering_vectors.fitting import calibration
from steering_vectors.fitting.calibration import DEFAULT_KL_BUDGET, SAMPLED_TOKENS, check_budget
from steering_vectors.fitting.layers import AUTO, Evidence, LayerChoice, candidate_layers, choose_layers, parse_layers
from steering_vectors.fitting.notes import data_notes, effect_notes
from steering_vectors.measures.activations import SAMPLE_ROWS, LayerStatistics, Tokens, capture
from steering_vectors.measures.propensity import REPORT_ROWS, projection_accuracies, propensity_report, token_log_odds
from steering_vectors.measures.steered_model import steerable
from steering_vectors.methods import Directions, Method, Task, method_named
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Layering, Profile
from steering_vectors.progress import Progress

NEGLIGIBLE = 1e-6  # a direction this short against the residual stream is rounding error


@dataclass(frozen=True, slots=True)
class Settings:
    """What a fit was asked to do."""

    method: Method
    layers: tuple[int, ...] | None
    tokens: Tokens
    layering: Layering
    heldout_fraction: float
    kl_budget: float
    seed: int
    batch_tokens: int
    calibrate: bool
    progress: Progress | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """The data, parted by prompt. `choosing` is None where the layers are given."""

    train: Corpus
    choosing: Corpus | None
    heldout: Corpus
    prompts: tuple[tuple[int, ...], ...]  # to calibrate on
    choosing_prompts: tuple[tuple[int, ...], ...]


def fit(
    model: LanguageModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Preferences,
    *,
    name: str = "profile",
    method: str = "mean-diff",
    layers: str | Sequence[int] = AUTO,
    tokens: Tokens = "response",
    layering: Layering = "independent",
    heldout_fraction: float = 0.2,
    kl_budget: float = DEFAULT_KL_BUDGET,
    seed: int = 0,
    description: str = "",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    skip_long_rows: bool = False,
    calibrate: bool = True,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Fit a profile to preference data; equal arguments give bitwise equal tensors.

    The rows are parted by prompt: most are trained on; of the held-out ones half choose the layers (with
    `layers="auto"`, see `choose_layers`) and half calibrate the unit (see `calibrate`) and give the metrics, so what
    is reported was seen by neither. With layers given, all held-out rows calibrate. `tokens` says which of a
    response's tokens are looked at: the mean of all, or the last. `options` are the method's own. `tokenizer` may be
    None for a LanguageModel.

    `metrics` holds `projection_accuracy` per block, `propensity` at strengths −1, 0 and +1, `layer_choice` with the
    score of every window tried, and `notes`, sentences on what the user should know (few rows, duplicates, an
    unreached budget). Without `calibrate` the unit is 1 and `calibration` is empty.

    Raises FitError for what cannot be fitted, DataError for rows that are unusable with this model.
    """
    lm, found = _language_model(model, tokenizer), method_named(method)
    settings = Settings(
        found, parse_layers(layers, lm.num_layers), _known_tokens(tokens), layering, heldout_fraction,
        kl_budget, seed, batch_tokens, calibrate, progress, found.complete(options or {}),
    )  # fmt: skip
    check_budget(kl_budget)
    blank = _blank(lm, name, description, settings)
    pairs.check()
    limit = context_limit(lm)
    corpus = encode_corpus(lm.tokenizer, pairs, limit=limit, skip_long_rows=skip_long_rows)
    parts = _part(lm, corpus, settings)
    statistics = _capture(lm, parts.train, settings)
    profile = replace(
        blank,
        directions=_directions(lm, parts.train, statistics, settings, name),
        residual_norms={layer: one.residual_norm for layer, one in statistics.items()},
        data=_provenance(corpus, parts),
    )
    return _finish(lm, profile, parts, statistics, settings)


def _language_model(model: LanguageModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
    if tokenizer is None:
        raise FitError("a transformers model comes without its tokenizer: pass it as the second argument")
    return wrap_model(model, tokenizer)


def _known_tokens(tokens: Tokens) -> Tokens:
    if tokens not in ("response", "last"):
        raise FitError(f"tokens is {tokens!r}, not one of response, last")
    return tokens


def _blank(lm: LanguageModel, name: str, description: str, settings: Settings) -> Profile:
    """The profile before its directions, made first so that a bad name or layering fails at once."""
    return Profile(
        name=name,
        model=lm.identity,
        directions={0: torch.zeros(lm.hidden_size)},
        method=settings.method.name,
        layering=settings.layering,
        description=description,
        method_options={
            "tokens": settings.tokens,
            "heldout_fraction": settings.heldout_fraction,
            "seed": settings.seed,
            **settings.options,
        },
        chat_template_sha256=chat_template_sha256(lm.tokenizer),
    )


def _part(lm: LanguageModel, corpus: Corpus, settings: Settings) -> Parts:
    train, heldout = corpus.split(settings.heldout_fraction, settings.seed, min_side=4)
    choosing = None
    if settings.layers is None:
        heldout, choosing = heldout.split(0.5, settings.seed, min_side=1)

    def prompts_of(part: Corpus | None) -> tuple[tuple[int, ...], ...]:
        if part is None:
            return ()
        return tuple(map(tuple, prompts_with_room(lm, part.pairs, room=SAMPLED_TOKENS, seed=settings.seed)))

    return Parts(train, choosing, heldout, prompts_of(heldout if settings.calibrate else None), prompts_of(choosing))


def _capture(lm: LanguageModel, train: Corpus, settings: Settings) -> dict[int, LayerStatistics]:
    sides = train.sides()
    looked_at = settings.method.layers or candidate_layers
    layers = looked_at(lm.num_layers) if settings.layers is None else settings.layers
    return capture(
        lm,
        sides.positives,
        sides.negatives,
        layers,
        paired=sides.paired,
        tokens=settings.tokens,
        keep_sample=settings.method.needs_sample,
        seed=settings.seed,
        batch_tokens=settings.batch_tokens,
        progress=settings.progress,
    )


def _directions(
    lm: LanguageModel, train: Corpus, statistics: Mapping[int, LayerStatistics], settings: Settings, name: str
) -> Directions:
    """The method's directions that can be used. A useless one is an error where its layer was asked for."""
    texts, sides = train.pairs, train.sides()
    found = settings.method.find(
        Task(
            lm,
            statistics,
            texts.positives,
            texts.negatives,
            sides.positives,
            sides.negatives,
            sides.paired,
            name,
            settings.tokens,
            settings.seed,
            settings.options,
            settings.progress,
        )
    )
    faults = {layer: _fault(found[layer], statistics[layer]) for layer in found}
    for layer, fault in faults.items():
        if fault and (settings.layers is not None or all(faults.values())):
            raise FitError(f"layer {layer}: the direction {fault}")
    return {layer: direction for layer, direction in found.items() if not faults[layer]}


def _fault(direction: torch.Tensor, statistics: LayerStatistics) -> str:
    if not bool(torch.isfinite(direction).all()):
        return "has a NaN or infinite entry; load the model with --dtype float32"
    if float(direction.norm()) <= NEGLIGIBLE * statistics.residual_norm:
        return "is zero: preferred and rejected responses look the same there; check the labels, or use other layers"
    return ""


def _finish(
    lm: LanguageModel,
    profile: Profile,
    parts: Parts,
    statistics: Mapping[int, LayerStatistics],
    settings: Settings,
) -> Profile:
    """Choose the layers, calibrate, measure."""
    heldout, metrics = parts.heldout.sides(), dict[str, Any]()
    metrics["projection_accuracy"] = {
        str(layer): accuracy
        for layer, accuracy in projection_accuracies(
            lm,
            statistics,
            profile.directions,
            heldout.thinned(REPORT_ROWS),
            tokens=settings.tokens,
            batch_tokens=settings.batch_tokens,
        ).items()
    }
    if parts.choosing is not None:
        choice = _choose(lm, profile, parts.train, parts.choosing_prompts, settings)
        metrics["layer_choice"] = _choice_record(choice)
        profile = _restricted(profile, choice.layers)
    if settings.calibrate:
        profile = calibration.calibrate(
            lm, profile, parts.prompts, kl_budget=settings.kl_budget, seed=settings.seed, progress=settings.progress
        )
    with steerable(lm) as steered:
        metrics["propensity"] = propensity_report(steered, profile, heldout.thinned(REPORT_ROWS))
    notes = [*data_notes(profile.data), *_sample_notes(parts.train, settings), *effect_notes(profile, metrics)]
    return replace(profile, metrics=metrics | {"notes": notes})


def _choose(
    lm: LanguageModel,
    profile: Profile,
    train: Corpus,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
) -> LayerChoice:
    odds = token_log_odds(train.sides(), lm.vocab_size)
    evidence = Evidence(prompts, odds)
    with steerable(lm) as steered:
        return choose_layers(
            steered,
            profile,
            evidence,
            kl_budget=settings.kl_budget,
            seed=settings.seed,
            progress=settings.progress,
        )


def _restricted(profile: Profile, layers: Sequence[int]) -> Profile:
    return replace(
        profile,
        directions={layer: profile.directions[layer] for layer in layers},
        residual_norms={layer: profile.residual_norms[layer] for layer in layers},
    )


def _choice_record(choice: LayerChoice) -> dict[str, Any]:
    """The scores by window, written as the `layers` that would give it."""
    scores = {
        str(window[0]) if len(window) == 1 else f"{window[0]}-{window[-1]}": score
        for window, score in choice.scores.items()
    }
    return {
        "criterion": "lexical shift and reading of steered texts at equal KL, best single layer 1",
        "scores": scores,
    }


def _provenance(corpus: Corpus, parts: Parts) -> dict[str, Any]:
    pairs = corpus.pairs
    return {
        "source": PurePath(pairs.source).name,
        "kind": pairs.kind,
        "rows": pairs.rows,
        "sha256": pairs.sha256,
        "train_rows": parts.train.pairs.rows,
        "choice_rows": parts.choosing.pairs.rows if parts.choosing is not None else 0,
        "heldout_rows": parts.heldout.pairs.rows,
        "bad_rows_skipped": pairs.skipped,
        "long_rows_skipped": corpus.long_rows,
        "duplicates": pairs.duplicates,
    }


def _sample_notes(train: Corpus, settings: Settings) -> list[str]:
    if not settings.method.needs_sample or max(map(len, train.pairs.sides())) <= SAMPLE_ROWS:
        return []
    return [f"{settings.method.name} looked at a sample of at most {SAMPLE_ROWS} examples a side"]
