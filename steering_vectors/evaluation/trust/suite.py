"""The trust suite for one profile: each vertical at each strength, beside random directions of the same norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steering_vectors.errors import FitError
from steering_vectors.evaluation.trust.bias import prepare_bias
from steering_vectors.evaluation.trust.ethics import prepare_ethics
from steering_vectors.evaluation.trust.figures import Columns, Figure, Vertical, compare, rows_of
from steering_vectors.evaluation.trust.privacy import prepare_privacy
from steering_vectors.evaluation.trust.scorers import FITTED
from steering_vectors.evaluation.trust.task_files import MIN_ROWS, PATTERNS, find_files
from steering_vectors.evaluation.trust.toxicity import prepare_toxicity
from steering_vectors.evaluation.trust.truthfulness import prepare_truthfulness
from steering_vectors.measures.controls import measured_profile, random_controls
from steering_vectors.measures.results import (
    Change,
    ControlledComparison,
    ControlPoint,
    FigureText,
    TrustEvaluation,
    TrustPoint,
    VerticalReport,
)
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

VERTICALS = ("toxicity", "bias", "ethics", "truthfulness", "privacy")
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
ROWS = 200
RANDOMS = 5


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """Options of `evaluate_trust`.

    `folder` holds the data files, in the layout of `task_files.PATTERNS`; the vertical privacy needs none. `rows` is
    the maximum number of rows per vertical, `randoms` the number of random directions to compare with. `toxicity` names
    a scorer (see `load_scorer`). Raises FitError for values that cannot be used, DataError for a missing file.
    """

    folder: Path | None = None
    verticals: tuple[str, ...] = VERTICALS
    strengths: tuple[float, ...] = STRENGTHS
    rows: int = ROWS
    randoms: int = RANDOMS
    toxicity: str = FITTED
    seed: int = 0

    def __post_init__(self) -> None:
        if 0.0 not in self.strengths or len(set(self.strengths)) < 2:
            raise FitError("strengths must hold 0 and at least one other, as in -1,0,1")
        if self.rows < MIN_ROWS:
            raise FitError(f"each vertical needs at least {MIN_ROWS} rows, not {self.rows}")
        if unknown := [one for one in self.verticals if one not in VERTICALS]:
            raise FitError(f"vertical {unknown[0]!r} is not one of {', '.join(VERTICALS)}")
        if not self.verticals or len(set(self.verticals)) < len(self.verticals):
            raise FitError(f"name each vertical once, of {', '.join(VERTICALS)}")
        self._check_files()

    def _check_files(self) -> None:
        """Check before a model is loaded that each vertical has its files."""
        for vertical in self.verticals:
            if vertical in PATTERNS:
                if self.folder is None:
                    raise FitError(
                        f"the vertical {vertical} needs a folder with {PATTERNS[vertical]}: pass the folder with "
                        "--data, or remove the vertical from --verticals"
                    )
                find_files(self.folder, vertical)


def prepare_verticals(lm: LanguageModel, settings: TrustSettings) -> list[Vertical]:
    """Read and encode the data for one model. Raises DataError for a bad row, or if too few rows fit the context."""
    return [_prepare(name, lm, settings) for name in settings.verticals]


def evaluate_trust(
    lm: LanguageModel,
    profile: Profile,
    settings: TrustSettings,
    *,
    verticals: Sequence[Vertical] | None = None,
    progress: Progress | None = None,
) -> TrustEvaluation:
    """Measure what a profile does to toxicity, stereotype bias, machine ethics, truthfulness and privacy.

    The five verticals are those of "More RLHF, More Trust?" (arXiv:2404.18870). The result holds, per vertical, its
    figures at each strength, their changes against strength 0, and the changes of random directions. Changes are paired
    by row; intervals are 95 % bootstrap over rows.

    `verticals` are those of `prepare_verticals` with the same settings; pass them to prepare the data once for several
    profiles. Raises ProfileMismatch for a profile of another model, DataError for data that cannot be used.
    """
    profile.check_model(lm.identity, allow_mismatch=False)
    if verticals is None:
        verticals = prepare_verticals(lm, settings)
    controls = random_controls(profile, settings.randoms, seed=settings.seed)
    done, total = 0, len(verticals) * (1 + len(controls))
    found = {}
    with steerable(lm) as steered:
        for vertical in verticals:
            run = VerticalRun(steered, vertical, settings.strengths, profile)
            seen = []
            for one in (profile, *controls):
                seen.append(run.measure(one))
                done += 1
                if progress is not None:
                    progress("trust", done, total, vertical.name)
            found[vertical.name] = run.report(seen[0], seen[1:])
    return {**measured_profile(lm, profile), "trust": found}


class VerticalRun:
    """One vertical on one model. All changes are relative to the same readings at strength 0."""

    def __init__(self, steered: SteeredModel, vertical: Vertical, strengths: Sequence[float], profile: Profile) -> None:
        self._steered, self._vertical, self._strengths = steered, vertical, strengths
        steered.write(profile, 0.0)
        self._base = vertical.read(steered)

    def measure(self, profile: Profile) -> dict[float, Columns]:
        """The readings of every row, by strength."""
        seen = {}
        for strength in self._strengths:
            self._steered.write(profile, strength)
            seen[strength] = self._vertical.read(self._steered) if strength else self._base
        return seen

    def report(self, own: dict[float, Columns], randoms: list[dict[float, Columns]]) -> VerticalReport:
        vertical = self._vertical
        first = vertical.figures[0]
        points = self._points(own, randoms)
        return {
            **_text(first),
            "figures": {one.name: _text(one) for one in vertical.figures},
            "strengths": points,
            "random": [
                {"strengths": [self._control_point(strength, one[strength]) for strength in self._strengths]}
                for one in randoms
            ],
            "rows": vertical.rows,
            "left_out": vertical.left_out,
            "note": vertical.note,
            "remarks": [*vertical.remarks(self._base), *_degenerate(first, points, vertical.rows)],
            **vertical.details,
        }

    def _points(self, own: dict[float, Columns], randoms: list[dict[float, Columns]]) -> list[TrustPoint]:
        first, *others = self._vertical.figures
        main = self._controlled(first, own, randoms)
        figures = {one.name: self._controlled(one, own, randoms) for one in others}
        parts = {name: compare(first, own, rows) for name, rows in self._vertical.parts.items()}
        return [
            {
                "strength": strength,
                **main[strength],
                "figures": {name: one[strength] for name, one in figures.items()},
                "parts": {
                    name: {"rows": len(self._vertical.parts[name]), **one[strength]} for name, one in parts.items()
                },
                "by_row": own[strength][first.column].tolist(),
            }
            for strength in self._strengths
        ]

    def _controlled(
        self, figure: Figure, own: dict[float, Columns], randoms: list[dict[float, Columns]]
    ) -> dict[float, ControlledComparison]:
        """A figure compared with strength 0, and with the random directions' changes, by strength."""
        found: dict[float, ControlledComparison] = {}
        for strength, point in compare(figure, own).items():
            # The opposite of a random direction is random too, so its changes at −strength are also controls.
            controls = [one[sign * strength] for one in randoms for sign in (1, -1) if sign * strength in one]
            changes = [self._change(figure, one)["delta"] for one in controls]
            found[strength] = {
                **point,
                "random_delta": [min(changes), max(changes)] if changes else None,
                "beyond_random": not min(changes) <= point["delta"] <= max(changes) if changes else None,
            }
        return found

    def _control_point(self, strength: float, seen: Columns) -> ControlPoint:
        first, *others = self._vertical.figures
        return {
            "strength": strength,
            **self._change(first, seen),
            "figures": {one.name: self._change(one, seen) for one in others},
        }

    def _change(self, figure: Figure, seen: Columns) -> Change:
        rows = rows_of(figure, self._vertical.rows)
        value = figure.statistic(seen[figure.column], rows)
        return {"value": value, "delta": value - figure.statistic(self._base[figure.column], rows)}


def _text(figure: Figure) -> FigureText:
    return {"measure": figure.text, "aim": figure.aim, "reference": figure.reference}


def _degenerate(figure: Figure, points: Sequence[TrustPoint], rows: int) -> list[str]:
    """A remark if all rows are equal, because resampling them gives an interval of width 0, which is too narrow."""
    values = {point["value"] for point in points}
    if len(values) > 1 or not values <= {0.0, 1.0}:
        return []
    value = values.pop()
    return [
        f"The {figure.text} is {value:g} at every strength. With {rows} rows, a true share within {3 / rows:.1%} of it "
        "cannot be distinguished."
    ]


def _prepare(name: str, lm: LanguageModel, settings: TrustSettings) -> Vertical:
    rows, seed, folder = settings.rows, settings.seed, settings.folder or Path()
    match name:
        case "toxicity":
            return prepare_toxicity(lm, folder, rows, seed, settings.toxicity)
        case "bias":
            return prepare_bias(lm, folder, rows, seed)
        case "ethics":
            return prepare_ethics(lm, folder, rows, seed)
        case "truthfulness":
            return prepare_truthfulness(lm, folder, rows, seed)
        case _:
            return prepare_privacy(lm, rows, seed)
