"""What a user should know about a fit, in sentences.

Owns the thresholds and the wording of notes. Knows nothing of how anything was measured; reads what a profile records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering_vectors.profiles.profile import Profile

FEW_ROWS = 100
NEAR_CHANCE = 0.55  # of projection accuracy


def data_notes(data: Mapping[str, Any]) -> list[str]:
    """On the rows, from a profile's `data`."""
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


def effect_notes(profile: Profile, metrics: Mapping[str, Any]) -> list[str]:
    """On what the profile does, from its calibration and its held-out metrics."""
    cost, notes = profile.calibration, []
    if max(metrics["projection_accuracy"][str(layer)] for layer in profile.layers) < NEAR_CHANCE:
        notes.append("the direction hardly tells held-out responses apart; try more rows or another --method")
    low, *_, high = metrics["propensity"]["strengths"]
    if high["margin"] <= low["margin"]:
        notes.append("held-out responses of the preferred side get no likelier from strength -1 to +1")
    if cost.get("unreached"):
        notes.append(
            f"the KL budget of {cost['kl_budget']:g} was not reached: at strength 1 the shift is as long as the "
            f"residual stream, and KL is {cost['kl_at_1']:.3g}"
        )
    return notes
