"""The propensity that a fit reports equals one measurement at each strength."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.corpus import Sides
from steering_vectors.measures import propensity as module
from steering_vectors.measures.propensity import STRENGTHS, propensity, propensity_report
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_profiles import tiny_profile
from tests.support.tiny_tokenizers import tiny_tokenizer


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
@pytest.mark.parametrize(("paired", "rejected"), [(True, 9), (False, 5)])
def test_the_report_equals_a_measurement_at_each_strength(
    architecture: str, paired: bool, rejected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_ROWS", 4)
    lm = wrap_model(tiny_model(architecture), tiny_tokenizer())
    profile = tiny_profile(lm.identity, layers=(1,), unit=3.0)
    draw = torch.Generator().manual_seed(0)

    def side(count: int, first: int) -> tuple[Encoded, ...]:
        rows = [
            [7, 8, 9, row, first, *torch.randint(2, 300, (1 + row % 3,), generator=draw).tolist()]
            for row in range(count)
        ]
        return tuple((ids, 4) for ids in rows)

    sides = Sides(side(9, 40), side(rejected, 50), paired)
    with steerable(lm) as steered:
        report = propensity_report(steered, profile, sides)
        for found, strength in zip(report["strengths"], STRENGTHS, strict=True):
            steered.write(profile, strength)
            wanted = propensity(steered, sides, steer=True)
            assert found["strength"] == strength
            assert found["margin"] == pytest.approx(wanted.margin, abs=1e-4)
            assert found["accuracy"] == pytest.approx(wanted.accuracy)
    assert len({point["margin"] for point in report["strengths"]}) == 3
    assert report["rows"] == (9 if paired else 14)
    assert ("anti_steerable" in report) == paired
