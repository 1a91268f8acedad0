"""The JSON objects in a profile's file: calibration, data, held-out metrics and summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

OptionValue = str | int | float | bool
MethodOptions = Mapping[str, OptionValue]


class CurvePointRecord(TypedDict):
    """Texts sampled at one strength. `kl` is KL(steered‖base) in nats per token."""

    strength: float
    kl: float
    perplexity: float


class PositionCost(TypedDict):
    """KL(steered‖base) in nats per token and unsteered perplexity of the tokens from `start` up to `end` of texts."""

    start: int
    end: int
    tokens: int
    kl: float
    perplexity: float


class LongTextPoint(TypedDict):
    """Texts of deployment length at one strength (see `measure_long_texts`).

    `kl` is in nats per token. `ended` is the share of texts that end by themselves, `repeating` of those that repeat or
    run into an endless word. `shift_ratio` is ‖shift‖/‖h‖ over the mean norm of the unsteered residual stream, at the
    block where it is largest. `faults` are what makes the strength unsafe.
    """

    strength: float
    kl: float
    perplexity: float
    ended: float
    repeating: float
    shift_ratio: float
    positions: list[PositionCost]
    faults: NotRequired[list[str]]


class LongTextCheck(TypedDict):
    """The check of the safe range on `texts` texts of up to `tokens` tokens at each strength. By short texts, the range
    was ±`short_range`. `tells_endings` is false if too few unsteered texts end by themselves."""

    tokens: int
    texts: int
    short_range: float
    tells_endings: bool
    points: list[LongTextPoint]


class Calibration(TypedDict, total=False):
    """How the unit was set. All KL values are in nats of KL(steered‖base).

    `kl_at_1` is the measured cost of strength 1 per token. `unreached` says that even the largest coefficient stayed
    below `kl_budget`. `texts` sampled texts after `prompts` distinct prompts hold `tokens` steered tokens. `curve`
    holds the points from which `max_strength` was read. `long_texts` is its check on long texts, if there was one.
    `notes` are sentences about rows that `trimtab calibrate` left out. The object is empty for a profile that was not
    calibrated.
    """

    kl_budget: float
    kl_at_1: float
    kl_per_character: float | None
    tokens: int
    prompts: int
    prompts_sha256: str
    unreached: bool
    texts: int
    seed: int
    perplexity_bound: float
    curve: list[CurvePointRecord]
    long_texts: LongTextCheck
    notes: list[str]


class StrengthMargin(TypedDict):
    """Mean of log P(chosen) − log P(rejected) at one strength, and the share of pairs that are ranked correctly."""

    strength: float
    margin: float
    accuracy: float


class PropensityReport(TypedDict):
    """Held-out margins at strengths −1, 0 and +1, in `unit`; `anti_steerable` is given for paired data."""

    unit: str
    rows: int
    strengths: list[StrengthMargin]
    anti_steerable: NotRequired[float]


class LayerScores(TypedDict):
    """The score of each window of blocks that the automatic choice tried, by the window's text (`5` or `5-7`).

    `sampled` are the scores of the best few from texts; format 1 profiles of older versions have none.
    """

    criterion: str
    scores: dict[str, float]
    sampled: NotRequired[dict[str, float]]


class LengthQuality(TypedDict):
    """How far length alone tells preferred from rejected responses.

    `longer_tokens` and `longer_characters` are the shares of pairs whose preferred response is the longer one; .5 says
    nothing. `correlation` is that of the projection with the logarithm of the tokens within a side. `explained` is the
    share of the distance between the sides that this relation gives for their lengths.
    """

    longer_tokens: float
    longer_characters: float
    correlation: float
    explained: float


class DataQuality(TypedDict):
    """Figures of the training rows at one block, of the difference of means (see `data_quality`).

    `rows` were read. `agreement` is the mean cosine between the differences of two pairs, and `significance` how many
    standard deviations it lies above that of random labels. `reproducibility` is the cosine to expect between the
    direction and one from as many other rows. `separation` is d′ of the two sides along a direction from other rows.
    """

    layer: int
    rows: int
    agreement: float
    significance: float
    reproducibility: float
    separation: float
    length: LengthQuality


class Metrics(TypedDict, total=False):
    """What `fit` measured, on held-out rows but for `data_quality`. `projection_accuracy` is by block; `notes` are
    sentences for the user."""

    data_quality: DataQuality
    projection_accuracy: dict[str, float]
    layer_choice: LayerScores
    propensity: PropensityReport
    notes: list[str]


class DataRecord(TypedDict, total=False):
    """The data of a fit: its file, its rows, and how many of them each step used.

    `effective_rows` is the number of training rows of equal weight whose mean would vary as much, if rows have weights.
    A refined profile has the version that it was `refined_from`, the number of its rows that are feedback, and the
    share of all prompts that is held out from every fit.
    """

    source: str
    kind: str
    rows: int
    sha256: str
    train_rows: int
    choice_rows: int
    heldout_rows: int
    bad_rows_skipped: int
    long_rows_skipped: int
    duplicates: int
    effective_rows: float
    refined_from: str
    feedback_rows: int
    heldout_prompts: float


class GateMetrics(TypedDict, total=False):
    """F1 of a gate on its training and its held-out prompts. `prompts` counts those with label true and false."""

    f1_train: float
    f1_heldout: float
    prompts: list[int]
    heldout: int
    source: str
    sha256: str


class ProfileSummary(TypedDict):
    """Everything a profile holds except its vectors. `residual_norms` and `direction_norms` are by block."""

    name: str
    version: str
    description: str
    method: str
    method_options: dict[str, OptionValue]
    operator: str
    apply_to: str
    layering: str
    layers: list[int]
    unit: float
    max_strength: float
    min_strength: NotRequired[float]  # the safe range is ±max_strength without it
    calibration: Calibration
    model: dict[str, Any]  # the fields of ModelIdentity
    chat_template_sha256: str | None
    data: DataRecord
    metrics: Metrics
    gate: NotRequired[dict[str, Any]]  # the fields of Gate but for its direction
    residual_norms: dict[str, float]
    direction_norms: dict[str, float]
    created_at: str
    trimtab_version: str


def range_text(safe_range: tuple[float, float]) -> str:
    """A range of strengths as people read it: ±1.7, or -0.4 to 1.3."""
    low, high = safe_range
    return f"±{high:g}" if low == -high else f"{low:g} to {high:g}"


def faults_beyond(check: LongTextCheck, safe_range: tuple[float, float]) -> list[LongTextPoint]:
    """The points with faults next beyond each end of a range, ascending."""
    low, high = safe_range
    faulty = [point for point in check["points"] if point.get("faults")]
    below = [point for point in faulty if point["strength"] < low][-1:]
    return [*below, *[point for point in faulty if point["strength"] > high][:1]]
