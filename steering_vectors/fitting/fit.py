"""Fitting: from a model and preference data to a calibrated profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TypedDict, Unpack, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steering_vectors.data.batches import DEFAULT_BATCH_TOKENS
from steering_vectors.data.chat import chat_template_sha256
from steering_vectors.data.corpus import Corpus, corpus_for, prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError
from steering_vectors.fitting.calibration import (
    DEFAULT_KL_BUDGET,
    SAMPLED_TOKENS,
    CalibrationSettings,
    calibrate_on,
)
from steering_vectors.fitting.endings import TOKENS as ENDING_TOKENS
from steering_vectors.fitting.endings import without_endings
from steering_vectors.fitting.gates import GatePrompts, fit_gate
from steering_vectors.fitting.layers import (
    AUTO,
    Evidence,
    LayerChoice,
    candidate_layers,
    choose_layers,
    margin_gradients,
    parse_layers,
)
from steering_vectors.measures.activations import SAMPLE_ROWS, LayerStatistics, Tokens, capture
from steering_vectors.measures.data_quality import data_quality
from steering_vectors.measures.long_texts import DEFAULT_TEXT_TOKENS, LONG_TEXTS
from steering_vectors.measures.propensity import REPORT_ROWS, projection_accuracies, propensity_report, token_log_odds
from steering_vectors.measures.steered_model import steerable
from steering_vectors.methods import Directions, Task, method_named
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.metadata import (
    DataQuality,
    DataRecord,
    LayerScores,
    Metrics,
    OptionValue,
    faults_beyond,
    range_text,
)
from steering_vectors.profiles.profile import Layering, Profile
from steering_vectors.progress import Progress
from steering_vectors.runtime.cpu.choose_packing import packed
from steering_vectors.runtime.cpu.spinning import spinning_unless_shared

NEGLIGIBLE = 1e-6  # of the residual norm; a shorter direction is rounding error
FEW_ROWS = 100
NEAR_CHANCE = 0.55  # projection accuracy
# From benchmarks/quality/bad_pairs.py (docs/results.md): data sets that failed lay below 1.7 standard deviations of
# random labels, and all above 3.3 worked. Length explained 22 % or more where the sides differ in it by design, and at
# most 4 % elsewhere but for one set.
MIN_SIGNIFICANCE = 3.0
BY_LENGTH = 0.15


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Options of `fit`.

    - `name`, `description`: the name that the profile is served under, and a sentence to store with it.
    - `method`, `options`: a method of `trimtab methods`, and its own options; missing options take their defaults.
    - `layers`: `auto`, `12`, `10-20` (both ends included), `3,5,7`, or a list of block indices.
    - `tokens`: read the mean over the `response` tokens, or the `last` one.
    - `layering`: `independent` injects each block's direction; `incremental` injects d_l less the direction at the
      profile's previous block.
    - `keep_endings`: remove from each direction, to first order, what makes texts end sooner or later (see
      `without_endings`). For independent layering only.
    - `heldout_fraction`: share of the rows, split by prompt, that is not trained on.
    - `kl_budget`: nats of KL(steered‖base) per token that strength 1 costs. `calibrate=False` leaves the unit at 1.
    - `text_tokens`: the length of the texts on which the safe range is checked; 0 leaves the check out. `text_count`:
      their number at each strength.
    - `gate`: prompts on which the profile should and should not steer (`load_gate_prompts`); None steers always.
    - `seed`: equal settings with equal seeds give bitwise equal tensors.
    - `batch_tokens`: tokens per forward pass. `skip_long_rows`: leave out rows longer than the model's context
      instead of raising DataError.

    Raises FitError for an unknown method or option, and for values that cannot be used.
    """

    name: str = "profile"
    description: str = ""
    method: str = "mean-diff"
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    layers: str | Sequence[int] = AUTO
    tokens: Tokens = "response"
    layering: Layering = "independent"
    keep_endings: bool = False
    heldout_fraction: float = 0.2
    kl_budget: float = DEFAULT_KL_BUDGET
    text_tokens: int = DEFAULT_TEXT_TOKENS
    text_count: int = LONG_TEXTS
    calibrate: bool = True
    gate: GatePrompts | None = None
    seed: int = 0
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    skip_long_rows: bool = False

    def __post_init__(self) -> None:
        method_named(self.method).complete(self.options)
        if self.tokens not in ("response", "last"):
            raise FitError(f"tokens is {self.tokens!r}, not one of response, last")
        if self.keep_endings and self.layering != "independent":
            raise FitError("keep_endings works with independent layering only: leave one of both out")
        _ = self.calibration  # raises for values that cannot be used

    @property
    def calibration(self) -> CalibrationSettings:
        return CalibrationSettings(
            kl_budget=self.kl_budget, text_tokens=self.text_tokens, text_count=self.text_count, seed=self.seed
        )


class FitOptions(TypedDict, total=False):
    """The fields of `FitSettings` as keyword arguments."""

    name: str
    description: str
    method: str
    options: Mapping[str, OptionValue]
    layers: str | Sequence[int]
    tokens: Tokens
    layering: Layering
    keep_endings: bool
    heldout_fraction: float
    kl_budget: float
    text_tokens: int
    text_count: int
    calibrate: bool
    gate: GatePrompts | None
    seed: int
    batch_tokens: int
    skip_long_rows: bool


@overload
def fit(
    lm: LanguageModel, pairs: Preferences, settings: FitSettings | None = None, /, *, progress: Progress | None = None
) -> Profile: ...


@overload
def fit(
    lm: LanguageModel, pairs: Preferences, /, *, settings: FitSettings, progress: Progress | None = None
) -> Profile: ...


@overload
def fit(
    model: LanguageModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Preferences,
    *,
    progress: Progress | None = None,
    **options: Unpack[FitOptions],
) -> Profile: ...


def fit(
    model: LanguageModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Preferences | None,
    pairs: Preferences | FitSettings | None = None,
    *,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
    **options: Unpack[FitOptions],
) -> Profile:
    """Fit a profile to preference data: directions, layers, unit, gate and held-out metrics.

        profile = fit(lm, pairs, FitSettings(name="warm", method="pca"))
        profile = fit(model, tokenizer, pairs, name="warm", method="pca")

    Both forms are equivalent. `lm` comes from `load_model`. The second form takes a transformers model with its
    tokenizer (None for a LanguageModel), and the fields of `FitSettings` as keyword arguments.

    Rows are split by prompt: most are trained on. With `layers="auto"`, half of the held-out rows choose the layers
    (see `choose_layers`) and the other half calibrates the unit (see `calibrate_on`) and gives the metrics, so the
    reported figures come from rows that neither step has seen. With layers given, all held-out rows calibrate.

    The profile holds float32 directions of shape `[hidden_size]` per block. Its `metrics` hold `data_quality` of the
    training rows, `projection_accuracy` by block, `propensity` at strengths −1, 0 and +1, `layer_choice`, and `notes`
    for the user.

    Raises FitError if no profile can be fitted, DataError for rows that this model cannot use, ProfileError for an
    unusable name.
    """
    if isinstance(tokenizer, Preferences):
        tokenizer, pairs, settings = None, tokenizer, pairs if isinstance(pairs, FitSettings) else settings
    if not isinstance(pairs, Preferences):
        raise FitError("fit takes (lm, pairs, settings) or (model, tokenizer, pairs), with pairs from load_pairs")
    if settings is not None and options:
        raise FitError("fit takes settings or keyword arguments, not both")
    with spinning_unless_shared():
        return _Fit(_language_model(model, tokenizer), settings or FitSettings(**options), progress).run(pairs)


def _language_model(model: LanguageModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
    if tokenizer is None:
        raise FitError("a transformers model has no tokenizer: pass the tokenizer as the second argument")
    return wrap_model(model, tokenizer)


@dataclass(frozen=True, slots=True)
class Parts:
    """The data, split by prompt. `choosing` is None if the layers are given. Prompts are token ids."""

    train: Corpus
    choosing: Corpus | None
    heldout: Corpus
    calibration_prompts: list[list[int]]
    choosing_prompts: list[list[int]]


class _Fit:
    """One fit: its model, its settings and its steps."""

    def __init__(self, lm: LanguageModel, settings: FitSettings, progress: Progress | None) -> None:
        self._lm, self._settings, self._progress = lm, settings, progress
        self._method = method_named(settings.method)
        self._options = self._method.complete(settings.options)
        self._layers = parse_layers(settings.layers, lm.num_layers)

    def run(self, pairs: Preferences) -> Profile:
        lm, settings = self._lm, self._settings
        blank = self._blank()
        pairs.check()
        if pairs.weighted and not self._method.weighs:
            raise FitError(
                f"{self._method.name} cannot use the weights of rows: choose mean-diff, pca or probe, or let all rows "
                "count alike"
            )
        gate = None
        if settings.gate is not None:
            gate = fit_gate(lm, settings.gate, seed=settings.seed, progress=self._progress)
        corpus = corpus_for(lm, pairs, skip_long_rows=settings.skip_long_rows)
        parts = self._split(corpus)
        statistics = self._capture(parts.train)
        profile = replace(
            blank,
            directions=self._directions(parts.train, statistics),
            residual_norms={layer: one.residual_norm for layer, one in statistics.items()},
            data=_data_record(corpus, parts),
        )
        if settings.keep_endings:
            prompts = prompts_with_room(lm, parts.train.pairs, room=ENDING_TOKENS, seed=settings.seed)
            profile = without_endings(lm, profile, prompts, seed=settings.seed)
        measured = parts.heldout.sides().thinned(REPORT_ROWS)
        accuracies = projection_accuracies(
            lm, statistics, profile.directions, measured, tokens=settings.tokens, batch_tokens=settings.batch_tokens
        )
        metrics: Metrics = {"projection_accuracy": accuracies}
        evidence = None if parts.choosing is None else self._evidence(profile, parts, parts.choosing)
        with packed(lm):
            start = None
            if evidence is not None:
                choice = self._choose_layers(profile, evidence)
                metrics["layer_choice"] = _layer_scores(choice)
                profile, start = _restricted(profile, choice.layers), choice.coefficient
            if settings.calibrate:
                profile = calibrate_on(
                    lm,
                    profile,
                    parts.calibration_prompts,
                    settings.calibration,
                    start=start,
                    progress=self._progress,
                )
            with steerable(lm) as steered:
                metrics["propensity"] = propensity_report(steered, profile, measured)
        if quality := data_quality(statistics, parts.train, profile.layers):
            metrics["data_quality"] = quality
        metrics["notes"] = [
            *_data_notes(profile.data, corpus, parts),
            *(_quality_notes(quality) if quality and self._method.reads_labels else ()),
            *self._sample_notes(parts.train),
            *_effect_notes(profile, metrics),
        ]
        return replace(profile, metrics=metrics, gate=gate)

    def _blank(self) -> Profile:
        """The profile without its directions, made first so that an invalid name or layering fails at once."""
        settings = self._settings
        return Profile(
            name=settings.name,
            model=self._lm.identity,
            directions={0: torch.zeros(self._lm.hidden_size)},
            method=self._method.name,
            layering=settings.layering,
            description=settings.description,
            method_options={
                "tokens": settings.tokens,
                "heldout_fraction": settings.heldout_fraction,
                "seed": settings.seed,
                **({"keep_endings": True} if settings.keep_endings else {}),
                **self._options,
            },
            chat_template_sha256=chat_template_sha256(self._lm.tokenizer),
        )

    def _split(self, corpus: Corpus) -> Parts:
        settings = self._settings
        train, heldout = corpus.split(settings.heldout_fraction, settings.seed, min_side=4)
        choosing = None
        if self._layers is None:
            heldout, choosing = heldout.split(0.5, settings.seed, min_side=1)

        def prompts_of(part: Corpus | None) -> list[list[int]]:
            if part is None:
                return []
            return prompts_with_room(self._lm, part.pairs, room=SAMPLED_TOKENS, seed=settings.seed)

        return Parts(
            train, choosing, heldout, prompts_of(heldout if settings.calibrate else None), prompts_of(choosing)
        )

    def _capture(self, train: Corpus) -> dict[int, LayerStatistics]:
        sides, candidates = train.sides(), self._method.layers or candidate_layers
        return capture(
            self._lm,
            sides.positives,
            sides.negatives,
            candidates(self._lm.num_layers) if self._layers is None else self._layers,
            paired=sides.paired,
            tokens=self._settings.tokens,
            keep_sample=self._method.needs_sample,
            seed=self._settings.seed,
            batch_tokens=self._settings.batch_tokens,
            progress=self._progress,
            weights=train.pairs.side_weights(),
        )

    def _directions(self, train: Corpus, statistics: Mapping[int, LayerStatistics]) -> Directions:
        """The method's usable directions. Raises FitError for an unusable one of a given layer, or if all are."""
        texts, sides = train.pairs, train.sides()
        task = Task(
            self._lm,
            statistics,
            texts.positives,
            texts.negatives,
            sides.positives,
            sides.negatives,
            sides.paired,
            self._settings.name,
            self._settings.tokens,
            self._settings.seed,
            self._options,
            self._progress,
        )
        found = self._method.find(task)
        faults = {layer: _fault(found[layer], statistics[layer]) for layer in found}
        for layer, fault in faults.items():
            if fault and (self._layers is not None or all(faults.values())):
                raise FitError(f"layer {layer}: the direction {fault}")
        return {layer: direction for layer, direction in found.items() if not faults[layer]}

    def _evidence(self, profile: Profile, parts: Parts, choosing: Corpus) -> Evidence:
        return Evidence(
            parts.choosing_prompts,
            margin_gradients(self._lm, choosing.sides(), profile.layers),
            token_log_odds(parts.train.sides(), self._lm.vocab_size, parts.train.pairs.side_weights()),
        )

    def _choose_layers(self, profile: Profile, evidence: Evidence) -> LayerChoice:
        settings = self._settings
        with steerable(self._lm) as steered:
            return choose_layers(
                steered, profile, evidence, kl_budget=settings.kl_budget, seed=settings.seed, progress=self._progress
            )

    def _sample_notes(self, train: Corpus) -> list[str]:
        if not self._method.needs_sample or max(map(len, train.pairs.sides())) <= SAMPLE_ROWS:
            return []
        return [f"{self._method.name} read a sample of at most {SAMPLE_ROWS} examples per side"]


def _fault(direction: torch.Tensor, statistics: LayerStatistics) -> str:
    if not bool(torch.isfinite(direction).all()):
        return "has a NaN or infinite entry; load the model with dtype float32"
    if float(direction.norm()) <= NEGLIGIBLE * statistics.residual_norm:
        return "is zero: preferred and rejected responses have equal means; check the labels, or use other layers"
    return ""


def _restricted(profile: Profile, layers: Sequence[int]) -> Profile:
    return replace(
        profile,
        directions={layer: profile.directions[layer] for layer in layers},
        residual_norms={layer: profile.residual_norms[layer] for layer in layers},
    )


def _layer_scores(choice: LayerChoice) -> LayerScores:
    """The scores by window, written as the `layers` that select it."""

    def named(scores: Mapping[tuple[int, ...], float]) -> dict[str, float]:
        return {
            str(window[0]) if len(window) == 1 else f"{window[0]}-{window[-1]}": score
            for window, score in scores.items()
        }

    return {
        "criterion": "first-order lexical shift and held-out margin at equal KL, best single layer 1; the best few by "
        "lexical shift and reading of the texts they write",
        "scores": named(choice.scores),
        "sampled": named(choice.sampled),
    }


def _data_record(corpus: Corpus, parts: Parts) -> DataRecord:
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
        **({"effective_rows": parts.train.pairs.effective_rows} if pairs.weighted else {}),
    }


def _data_notes(data: DataRecord, corpus: Corpus, parts: Parts) -> list[str]:
    """Warnings about the rows of a fit."""
    notes = [*corpus.pairs.notes]
    if parts.train.pairs.shares_prompts(parts.heldout.pairs):
        notes.append(
            "too few different prompts: held-out rows have other completions than trained ones, not other prompts"
        )
    if data["rows"] < FEW_ROWS:
        notes.append(f"only {data['rows']} rows: below {FEW_ROWS} the direction and the metrics are noisy")
    if data["duplicates"]:
        notes.append(f"{data['duplicates']} rows repeat an earlier one")
    return [*notes, *corpus.notes]


def _quality_notes(quality: DataQuality) -> list[str]:
    """A warning about labels that agree no better than random ones, or else about a difference that is one of length,
    which cannot be read from such labels."""
    if quality["significance"] < MIN_SIGNIFICANCE:
        return [
            f"the rows agree little on what is preferred (mean cosine of their differences {quality['agreement']:.3f}, "
            f"{quality['significance']:.1f} standard deviations above random labels and not {MIN_SIGNIFICANCE:g}): the "
            "profile may not do what the data means; check the labels, or add rows"
        ]
    length = quality["length"]
    if length["explained"] < BY_LENGTH:
        return []
    longer = length["longer_tokens"]
    which, share = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
    return [
        f"length explains {length['explained']:.0%} of the difference between preferred and rejected responses (the "
        f"preferred one is {which} in {share:.0%} of pairs): the profile may change the length of replies too; if this "
        "is not meant, add pairs of equal length"
    ]


def _effect_notes(profile: Profile, metrics: Metrics) -> list[str]:
    """Warnings about a profile's effect, from its calibration and its held-out metrics."""
    cost, notes = profile.calibration, []
    if max(metrics["projection_accuracy"][str(layer)] for layer in profile.layers) < NEAR_CHANCE:
        notes.append("the direction hardly separates held-out responses; try more rows or another method")
    low, *_, high = metrics["propensity"]["strengths"]
    if high["margin"] <= low["margin"]:
        notes.append("preferred held-out responses do not become more likely from strength -1 to +1")
    if cost.get("unreached"):
        notes.append(
            f"the KL budget of {cost['kl_budget']:g} was not reached: at strength 1 the shift is as long as the "
            f"residual stream, and KL is {cost['kl_at_1']:.3g}"
        )
    safe = profile.safe_range
    if left_out := [f"{sign:g}" for sign in (-1.0, 1.0) if profile.safe_limit(sign) < 1]:
        note = f"the safe range of {range_text(safe)} leaves out strength {' and '.join(left_out)}"
        points = faults_beyond(cost["long_texts"], safe) if "long_texts" in cost else []
        if any("endings" in point["faults"] for point in points) and not profile.method_options.get("keep_endings"):
            note += "; texts may end as before with keep_endings, if the data is not about length"
        notes.append(note)
    return notes
