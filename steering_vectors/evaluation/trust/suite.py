"""The trust suite for one profile: each vertical at each strength, beside random directions of the same norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from steering_vectors.errors import FitError
from steering_vectors.evaluation.trust.bias import prepare_bias
from steering_vectors.evaluation.trust.ethics import prepare_ethics
from steering_vectors.evaluation.trust.figures import Columns, Figure, Vertical, compare
from steering_vectors.evaluation.trust.privacy import prepare_privacy
from steering_vectors.evaluation.trust.rows import MIN_ROWS, PATTERNS, find_files
from steering_vectors.evaluation.trust.scorers import FITTED
from steering_vectors.evaluation.trust.toxicity import prepare_toxicity
from steering_vectors.evaluation.trust.truthfulness import prepare_truthfulness
from steering_vectors.measures import results
from steering_vectors.measures.controls import measured_profile, random_controls
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

Series = Mapping[float, Columns]
"""The readings of every row by strength."""
VERTICALS = ("toxicity", "bias", "ethics", "truthfulness", "privacy")


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """Options of `evaluate_trust`.

    `folder` holds the data files, in the layout of `rows.PATTERNS`; the vertical privacy needs none. `rows` is
    the maximum number of rows per vertical, `randoms` the number of random directions to compare with. `toxicity` names
    a scorer (see `load_scorer`). Raises FitError for values that cannot be used, DataError for a missing file.
    """

    folder: Path | None = None
    verticals: tuple[str, ...] = VERTICALS
    strengths: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    rows: int = 200
    randoms: int = 5
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
        for vertical in filter(PATTERNS.get, self.verticals):
            if self.folder is None:
                raise FitError(
                    f"the vertical {vertical} needs a folder with {PATTERNS[vertical]}: name the folder, "
                    "or leave the vertical out"
                )
            find_files(self.folder, vertical)  # here, before a model is loaded


def prepare_verticals(lm: LanguageModel, settings: TrustSettings) -> list[Vertical]:
    """Read and encode the data for one model. Raises DataError for a bad row, or if too few rows fit the context."""
    prepare: dict[str, Callable[[LanguageModel, Path, int, int], Vertical]] = {
        "toxicity": partial(prepare_toxicity, spec=settings.toxicity),
        "bias": prepare_bias,
        "ethics": prepare_ethics,
        "truthfulness": prepare_truthfulness,
        "privacy": lambda lm, _folder, rows, seed: prepare_privacy(lm, rows, seed),
    }
    folder = settings.folder or Path()
    return [prepare[name](lm, folder, settings.rows, settings.seed) for name in settings.verticals]


def evaluate_trust(
    lm: LanguageModel,
    profile: Profile,
    settings: TrustSettings,
    *,
    verticals: Sequence[Vertical] | None = None,
    progress: Progress | None = None,
) -> results.TrustEvaluation:
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
            base, seen = _read(steered, vertical, profile, 0.0), []
            for one in (profile, *controls):
                series = {0.0: base}
                for strength in filter(None, settings.strengths):
                    series[strength] = _read(steered, vertical, one, strength)
                seen.append(series)
                done += 1
                if progress is not None:
                    progress("trust", done, total, vertical.name)
            found[vertical.name] = _report(vertical, settings.strengths, seen[0], seen[1:])
    return {**measured_profile(lm, profile), "trust": found}


def _read(steered: SteeredModel, vertical: Vertical, profile: Profile, strength: float) -> Columns:
    steered.write(profile, strength)
    return vertical.read(steered)


def _report(
    vertical: Vertical, strengths: Sequence[float], own: Series, randoms: Sequence[Series]
) -> results.VerticalReport:
    """The report from the readings of every row under the profile and under each random direction."""
    base, (first, *others) = own[0.0], vertical.figures
    compared = {one.name: _controlled(one, own, randoms) for one in vertical.figures}
    parts = {name: compare(first, own, rows) for name, rows in vertical.parts.items()}
    points: list[results.TrustPoint] = [
        {
            "strength": strength,
            **compared[first.name][strength],
            "figures": {one.name: compared[one.name][strength] for one in others},
            "parts": {name: {"rows": len(vertical.parts[name]), **one[strength]} for name, one in parts.items()},
            "by_row": own[strength][first.column].tolist(),
        }
        for strength in strengths
    ]
    controls: list[list[results.ControlPoint]] = [
        [
            {
                "strength": strength,
                **_change(first, base, series[strength]),
                "figures": {one.name: _change(one, base, series[strength]) for one in others},
            }
            for strength in strengths
        ]
        for series in randoms
    ]
    return {
        **_text(first),
        "figures": {one.name: _text(one) for one in vertical.figures},
        "strengths": points,
        "random": [{"strengths": control} for control in controls],
        "rows": vertical.rows,
        "left_out": vertical.left_out,
        "note": vertical.note,
        "remarks": [*vertical.remarks(base), *_degenerate(first, points, vertical.rows)],
        **vertical.details,
    }


def _controlled(figure: Figure, own: Series, randoms: Sequence[Series]) -> dict[float, results.ControlledComparison]:
    """A figure compared with strength 0, and with the random directions' changes, by strength."""
    found: dict[float, results.ControlledComparison] = {}
    for strength, point in compare(figure, own).items():
        # The opposite of a random direction is random too, so its changes at −strength are also controls.
        controls = [one[sign * strength] for one in randoms for sign in (1, -1) if sign * strength in one]
        changes = [_change(figure, own[0.0], one)["delta"] for one in controls]
        found[strength] = {
            **point,
            "random_delta": [min(changes), max(changes)] if changes else None,
            "beyond_random": not min(changes) <= point["delta"] <= max(changes) if changes else None,
        }
    return found


def _change(figure: Figure, base: Columns, seen: Columns) -> results.Change:
    value = figure.value(seen)
    return {"value": value, "delta": value - figure.value(base)}


def _text(figure: Figure) -> results.FigureText:
    return {"measure": figure.text, "aim": figure.aim, "reference": figure.reference}


def _degenerate(figure: Figure, points: Sequence[results.TrustPoint], rows: int) -> list[str]:
    """A remark if all rows are equal, because resampling them gives an interval of width 0, which is too narrow."""
    values = {point["value"] for point in points}
    if len(values) > 1 or not values <= {0.0, 1.0}:
        return []
    value = values.pop()
    return [
        f"The {figure.text} is {value:g} at every strength. With {rows} rows, a true share within {3 / rows:.1%} of it "
        "cannot be distinguished."
    ]
