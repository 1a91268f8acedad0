"""Notes: sentences that warn the user about a fit."""

from __future__ import annotations

from steering_vectors.profiles.metadata import DataRecord, Metrics
from steering_vectors.profiles.profile import Profile

FEW_ROWS = 100
NEAR_CHANCE = 0.55  # projection accuracy


def data_notes(data: DataRecord) -> list[str]:
    """Notes on the rows of a fit."""
    notes = []
    if data["rows"] < FEW_ROWS:
        notes.append(f"only {data['rows']} rows: below {FEW_ROWS} the direction and the metrics are noisy")
    if data["duplicates"]:
        notes.append(f"{data['duplicates']} rows repeat an earlier one")
    if data["bad_rows_skipped"]:
        notes.append(f"{data['bad_rows_skipped']} bad rows were skipped")
    if data["long_rows_skipped"]:
        notes.append(f"{data['long_rows_skipped']} rows longer than the model's context were left out")
    return notes


def effect_notes(profile: Profile, metrics: Metrics) -> list[str]:
    """Notes on a profile's effect, from its calibration and its held-out metrics."""
    cost, notes = profile.calibration, []
    if max(metrics["projection_accuracy"][str(layer)] for layer in profile.layers) < NEAR_CHANCE:
        notes.append("the direction hardly separates held-out responses; try more rows or another --method")
    low, *_, high = metrics["propensity"]["strengths"]
    if high["margin"] <= low["margin"]:
        notes.append("preferred held-out responses do not become more likely from strength -1 to +1")
    if cost.get("unreached"):
        notes.append(
            f"the KL budget of {cost['kl_budget']:g} was not reached: at strength 1 the shift is as long as the "
            f"residual stream, and KL is {cost['kl_at_1']:.3g}"
        )
    return notes
