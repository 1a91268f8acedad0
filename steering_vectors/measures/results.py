"""The results of evaluations, as JSON objects for the CLI, the reports and Python."""

from __future__ import annotations

from typing import NotRequired, TypedDict, TypeGuard, final

from steering_vectors.profiles.metadata import CurvePointRecord

Interval = tuple[float, float]
"""A 95 % bootstrap interval (low, high)."""


class MeasuredProfile(TypedDict):
    """Which profile was measured on which model."""

    profile: str
    version: str
    method: str
    layers: list[int]
    model: str


class EvaluatedRows(TypedDict):
    """`rows` counts the rows that were not trained on, `read` those that were measured, per side. `notes` are sentences
    about rows that were left out."""

    rows: int
    read: int
    sha256: str
    notes: list[str]


class MarginEstimate(TypedDict):
    """Mean margin and accuracy. Intervals are given for paired data."""

    margin: float
    accuracy: float
    margin_95: NotRequired[Interval]
    accuracy_95: NotRequired[Interval]


class StrengthMargins(MarginEstimate):
    strength: float


class MarginsByStrength(TypedDict):
    """Margins at each strength. For paired data also the least-squares `slopes` of each row's margin over strength,
    their mean (`steerability`, arXiv:2407.12404), and the share of rows whose slope is negative (`anti_steerable`)."""

    strengths: list[StrengthMargins]
    steerability: NotRequired[float]
    steerability_95: NotRequired[Interval]
    steerability_quartiles: NotRequired[list[float]]
    anti_steerable: NotRequired[float]
    slopes: NotRequired[list[float]]


class PromptingBaseline(TypedDict):
    """The same rows without a vector, under an instruction (`positive`) and under its opposite (`negative`)."""

    positive_instruction: str
    positive: NotRequired[MarginEstimate]
    negative: NotRequired[MarginEstimate]
    note: NotRequired[str]


class RewardQuality(TypedDict):
    """A reward and its AUC on held-out responses. `fitted_rows` is given if the reward was fitted here."""

    name: str
    unit: str
    fitted_rows: NotRequired[int]
    tested_texts: int
    auc: float
    auc_95: Interval


class RewardPoint(TypedDict):
    """Mean reward of sampled texts at one strength and their KL(steered‖base) in nats per text.

    `optimum` is the best mean reward at that KL, and `share` the part of its gain that the profile makes. Both are None
    if the samples do not show the optimum.
    """

    strength: float
    reward: float
    reward_95: Interval
    kl: float
    optimum: float | None
    share: float | None


class OptimumRecord(TypedDict):
    """The KL-regularised optimum at one β; `effective` is the effective number of samples per prompt."""

    beta: float
    reward: float
    kl: float
    effective: float


class RewardCurve(TypedDict):
    """Reward against KL. `kl_limit`, the log of `samples_per_prompt`, is the largest KL of an optimum from samples."""

    prompts: int
    samples_per_prompt: int
    texts_per_prompt: int
    kl_unit: str
    kl_limit: float
    strengths: list[RewardPoint]
    optimum: list[OptimumRecord]


@final
class RewardReport(RewardCurve):
    scorer: RewardQuality


@final
class NotMeasured(TypedDict):
    """A result that was not measured; `note` is the reason."""

    note: str


class PreferenceEvaluation(MeasuredProfile, MarginsByStrength):
    """The result of `evaluate`. `costs` are per sampled token, `norm_ratios` are by block, `random` holds controls."""

    data: EvaluatedRows
    unit: str
    costs: list[CurvePointRecord]
    norm_ratios: dict[str, float]
    random: list[MarginsByStrength]
    prompting: PromptingBaseline
    reward: RewardReport | NotMeasured


class ComparedMethod(MarginsByStrength):
    """One method: margins at strengths −1, 0 and 1, and costs there. `seconds` is the time of its fit, calibration
    included, and `stored_bytes` the size of its vectors. Random directions have the method `random`."""

    method: str
    layers: list[int]
    max_strength: float
    kl_at_1: float
    costs: list[CurvePointRecord]
    seconds: float
    stored_bytes: int
    notes: list[str]


class MethodComparison(TypedDict):
    """The result of `compare_methods`; `failed` has the reason of each method that could not be fitted."""

    model: str
    data: EvaluatedRows
    unit: str
    kl_budget: float
    methods: list[ComparedMethod]
    prompting: PromptingBaseline
    failed: dict[str, str]


class Change(TypedDict):
    """A figure and its change against strength 0."""

    value: float
    delta: float


class ControlPoint(Change):
    """A random direction at one strength: the main figure, and the other figures by name."""

    strength: float
    figures: dict[str, Change]


class ControlCurve(TypedDict):
    strengths: list[ControlPoint]


class Comparison(Change):
    """A change with its paired interval; `change` is `no change`, `better`, `worse` or `other side`."""

    value_95: Interval
    delta_95: Interval
    change: str


class ControlledComparison(Comparison):
    """A comparison beside the range of the random directions' changes, if any were measured."""

    random_delta: list[float] | None
    beyond_random: bool | None


class GroupComparison(Comparison):
    rows: int


class TrustPoint(ControlledComparison):
    """The main figure of a vertical at one strength, the other figures, and the main figure by group of rows."""

    strength: float
    figures: dict[str, ControlledComparison]
    parts: dict[str, GroupComparison]
    by_row: list[float]


class FigureText(TypedDict):
    """A figure's description. `aim` is higher, lower or half; `reference` is the value of a model without skill."""

    measure: str
    aim: str
    reference: float | None


class SourceFile(TypedDict):
    file: str
    sha256: str


class ScorerRecord(TypedDict):
    """A toxicity scorer and its Pearson correlations with the file's own scores."""

    name: str
    fitted_on: NotRequired[int]
    correlation: float | None
    correlation_continuations: float | None


class VerticalDetails(TypedDict, total=False):
    """Fields that only some verticals have."""

    files: list[SourceFile]
    tokens: int
    seed: int
    scorer: ScorerRecord
    wrong: int
    decoys: int


class VerticalReport(FigureText, VerticalDetails):
    """One vertical of the trust suite. `rows` counts the measured rows, `left_out` the too long or unusable ones."""

    figures: dict[str, FigureText]
    strengths: list[TrustPoint]
    random: list[ControlCurve]
    rows: int
    left_out: int
    note: str
    remarks: list[str]


class TrustEvaluation(MeasuredProfile):
    """The result of `evaluate_trust`, by vertical."""

    trust: dict[str, VerticalReport]


class FullEvaluation(PreferenceEvaluation, TrustEvaluation):
    """Both suites for one profile."""


Evaluation = PreferenceEvaluation | TrustEvaluation | FullEvaluation


def has_preferences(one: Evaluation) -> TypeGuard[PreferenceEvaluation]:
    return "strengths" in one


def has_trust(one: Evaluation) -> TypeGuard[TrustEvaluation]:
    return "trust" in one
