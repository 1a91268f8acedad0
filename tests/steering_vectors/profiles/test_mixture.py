"""Mixtures: sums, errors, the safe range and digests."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering_vectors.errors import SteeringError
from steering_vectors.profiles.gate import Gate
from steering_vectors.profiles.mixture import MAX_LAYER_SUBSETS, Mixture, Shifts, Term, unit_shifts
from steering_vectors.profiles.profile import LARGEST, Profile
from tests.support.tiny_profiles import NOWHERE, tiny_profile

CALIBRATION = {"kl_budget": 0.1, "kl_at_1": 0.1}
WARM = tiny_profile(name="warm", version="a" * 64, unit=0.5, calibration=CALIBRATION)
TERSE = tiny_profile(name="terse", layers=(1, 2), version="b" * 64, unit=2.0, seed=1)
STEPS = tiny_profile(name="steps", layers=(0, 1, 2), version="c" * 64, layering="incremental", seed=2)
BARE = tiny_profile(name="bare", layers=(0, 1), version="d" * 64, operator="ablate", seed=3)


def mix(*terms: tuple[Profile, float], **fields: Any) -> Mixture:
    return Mixture(tuple(Term(profile, strength) for profile, strength in terms), **fields)


def test_a_term_shifts_by_strength_times_unit_times_direction() -> None:
    shift = mix((WARM, -1.5)).shifts().by_layer()
    assert list(shift) == [0, 2]
    assert all(torch.equal(shift[layer], -0.75 * WARM.directions[layer]) for layer in shift)


def test_incremental_terms_are_differenced_before_the_unit_over_their_own_layers() -> None:
    shift = Mixture((Term(STEPS, 2.0, (2, 0)),)).shifts().by_layer()
    assert torch.equal(shift[0], 2.0 * STEPS.directions[0])
    assert torch.equal(shift[2], 2.0 * (STEPS.directions[2] - STEPS.directions[0]))


def test_terms_are_summed_in_float32_block_by_block() -> None:
    shifts = mix((WARM, 0.5), (TERSE, -0.25), (BARE, 1.0)).shifts().by_layer()
    assert list(shifts) == [0, 1, 2]
    assert all(shift.dtype == torch.float32 for shift in shifts.values())
    assert torch.equal(shifts[0], 0.25 * WARM.directions[0])
    assert torch.equal(shifts[2], 0.25 * WARM.directions[2] + -0.5 * TERSE.directions[2])


def test_the_bound_of_a_shift_is_its_largest_entry() -> None:
    one, two = mix((WARM, -1.5)).shifts(), mix((TERSE, 0.25)).shifts()
    assert one.bound == pytest.approx(float(one.rows.abs().max()), rel=1e-6)
    assert two.bound == pytest.approx(float(two.rows.abs().max()), rel=1e-6)
    assert mix((WARM, -1.5), (TERSE, 0.25)).shifts().bound == one.bound + two.bound


def test_a_coefficient_beyond_float32_has_no_bound() -> None:
    plain = tiny_profile()  # unit 1
    largest = float(plain.directions[0].abs().max().maximum(plain.directions[2].abs().max()))
    assert Term(plain, -LARGEST).shift().bound == largest * LARGEST
    assert Term(plain, 2 * LARGEST).shift().bound == math.inf


def test_unit_shifts_are_kept_for_some_subsets_of_layers() -> None:
    layers = (0, 1, 2, 3, 4)
    profile = tiny_profile(replace(NOWHERE, num_layers=5), layers=layers)
    first, *others = (subset for count in (1, 2, 3) for subset in combinations(layers, count))
    kept = unit_shifts(profile, first)
    assert unit_shifts(profile, (*first, *first)) is kept  # the same blocks, however they are listed
    for subset in others[: MAX_LAYER_SUBSETS - 1]:
        unit_shifts(profile, subset)
    assert unit_shifts(profile, first) is kept
    unit_shifts(profile, None)  # one too many: all are dropped
    assert unit_shifts(profile, first) is not kept


def test_the_layers_where_a_profile_is_zero_are_known() -> None:
    directions = {0: torch.zeros(32), 1: torch.ones(32), 2: torch.zeros(32)}
    profile = Profile("some", WARM.model, directions, "mean-diff")
    assert unit_shifts(profile, None).zero_layers == (0, 2)


def test_shifts_have_a_row_for_each_layer() -> None:
    with pytest.raises(ValueError, match="zip"):
        Shifts((0,), torch.zeros(2, 4)).by_layer()


def test_a_single_added_profile_is_its_unit_shifts_scaled() -> None:
    scaled = Mixture((Term(TERSE, -0.25, (2,)),)).scaled()
    assert scaled is not None
    unit, factor = scaled
    assert unit.layers == (2,)
    assert torch.equal(unit.rows[0], TERSE.directions[2])
    assert factor == -0.25 * TERSE.unit
    unscaled = (Mixture(), mix((BARE, 1.0)), mix((WARM, 0.0)), mix((WARM, 0.5), (TERSE, 0.5)))
    assert [each.scaled() for each in unscaled] == [None] * 4


def test_ablations_keep_to_the_layers_of_the_term() -> None:
    assert list(Mixture((Term(BARE, 1.0, (1,)),)).ablations()) == [1]


def test_ablations_are_unit_vectors_in_the_order_of_the_terms() -> None:
    other = tiny_profile(name="other", layers=(1,), operator="ablate", seed=4)
    pairs = mix((BARE, 0.25), (other, 1.0), (WARM, 0.5)).ablations()
    assert [beta for beta, _ in pairs[1]] == [0.25, 1.0]
    torch.testing.assert_close(pairs[1][1][1] * other.directions[1].norm(), other.directions[1])
    assert all(abs(float(unit.norm()) - 1) < 1e-6 for at_block in pairs.values() for _, unit in at_block)


def test_ablation_ignores_the_sign_and_length_of_its_direction() -> None:
    flipped = tiny_profile(name="bare", layers=(0, 1), operator="ablate", seed=3, unit=7.0)
    unit = mix((flipped, 1.0)).ablations()[0][0][1]
    assert torch.equal(unit, mix((BARE, 1.0)).ablations()[0][0][1])


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_strengths_that_are_not_finite(strength: float) -> None:
    with pytest.raises(SteeringError) as refusal:
        Term(WARM, strength)
    assert str(refusal.value) == "the strength of 'warm' must be a finite number"
    assert refusal.value.param == "strength"


@pytest.mark.parametrize(("strength", "shown"), [(-0.1, "-0.1"), (1.5, "1.5")])
def test_ablation_strengths(strength: float, shown: str) -> None:
    with pytest.raises(SteeringError) as refusal:
        Term(BARE, strength)
    assert str(refusal.value) == (
        f"profile 'bare' ablates its direction: its strength must be from 0 to 1, not {shown}"
    )
    assert refusal.value.param == "strength"


def test_a_zero_direction_cannot_be_ablated() -> None:
    profile = Profile("none", BARE.model, {1: torch.zeros(32)}, "mean-diff", operator="ablate")
    with pytest.raises(SteeringError) as refusal:
        Term(profile, 1.0)
    assert str(refusal.value) == "profile 'none' cannot be ablated: its direction at layer 1 is zero"


def test_layers_that_a_profile_lacks() -> None:
    with pytest.raises(SteeringError, match="profile 'warm' has no direction at layer 1; it has layers"):
        Term(WARM, 1.0, (1,))


def test_a_repeated_profile_is_refused() -> None:
    with pytest.raises(SteeringError) as refusal:
        mix((WARM, 0.5), (TERSE, 0.1), (WARM, -0.5))
    assert str(refusal.value) == "profile 'warm' occurs twice in one steering"
    assert refusal.value.param == "terms"
    with pytest.raises(SteeringError, match="profile 'warm' occurs twice"):
        mix((TERSE, 0.1), (WARM, 0.5), (WARM, -0.5))


def test_apply_to_is_checked() -> None:
    with pytest.raises(SteeringError) as refusal:
        mix((WARM, 0.5), apply_to="prompt")
    assert str(refusal.value) == "apply_to is 'prompt', not one of generated, all"
    assert refusal.value.param == "apply_to"


def test_a_gated_profile_cannot_steer_the_prompt() -> None:
    gated = tiny_profile(name="gated", gate=Gate(1, torch.ones(32), 0.5, "above"))
    with pytest.raises(SteeringError) as refusal:
        mix((WARM, 0.5), (gated, 0.5), apply_to="all")
    assert str(refusal.value) == (
        "profile 'gated' has a gate, which reads the prompt, so it cannot steer the prompt itself; "
        "leave apply_to out or set it to generated"
    )
    assert refusal.value.param == "apply_to"
    assert [term.profile for term in mix((WARM, 0.5), (gated, 0.5)).gated] == [gated]
    assert mix((WARM, 0.5), (gated, 0.0), apply_to="all").gated == []


REMEDY = "set allow_beyond_safe to true to go beyond it"


@pytest.mark.parametrize("strength", [2.5, -2.5])
def test_beyond_the_safe_range(strength: float) -> None:
    with pytest.raises(SteeringError) as refusal:
        mix((WARM, strength))
    assert str(refusal.value) == f"strength {strength} of profile 'warm' is beyond its safe range of ±2; {REMEDY}"
    assert (refusal.value.param, refusal.value.code) == ("strength", "strength_out_of_range")
    assert mix((WARM, strength), allow_beyond_safe=True).shifts().layers == WARM.layers


def test_a_sum_beyond_the_safe_range() -> None:
    with pytest.raises(SteeringError) as refusal:
        mix((WARM, 1.5), (TERSE, -1.0))
    assert str(refusal.value) == f"the strengths of this mix add up to 2.5, beyond the safe range of 2; {REMEDY}"
    assert (refusal.value.param, refusal.value.code) == ("terms", "strength_out_of_range")


def test_each_sign_has_its_own_end_of_the_safe_range() -> None:
    uneven = tiny_profile(name="uneven", max_strength=1.5, min_strength=-0.3)
    mix((uneven, 1.5))
    mix((uneven, -0.3))
    for strength in (1.6, -0.4):
        with pytest.raises(SteeringError) as refusal:
            mix((uneven, strength))
        assert str(refusal.value) == (
            f"strength {strength} of profile 'uneven' is beyond its safe range of -0.3 to 1.5; {REMEDY}"
        )
    mix((uneven, 0.5), (WARM, 1.0))
    with pytest.raises(SteeringError, match=r"add up to 0\.5, beyond the safe range of 0\.3"):
        mix((uneven, -0.2), (WARM, 0.3))


def test_the_limit_itself_is_within() -> None:
    mix((WARM, 2.0))
    narrow = [tiny_profile(name=name, max_strength=0.3) for name in ("a", "b")]
    mix((narrow[0], 0.1), (narrow[1], 0.2))  # 0.30000000000000004 in floats
    ones = [tiny_profile(name=name, max_strength=1.0) for name in ("a", "b")]
    mix((ones[0], 1.0), (ones[1], 1e-9))  # as much as rounding is allowed


@pytest.mark.parametrize("sign", [1, -1])
def test_just_above_the_limit_is_beyond(sign: int) -> None:
    with pytest.raises(SteeringError, match=r"strength -?2\.0001 of profile 'warm' is beyond its safe range of ±2"):
        mix((WARM, sign * 2.0001))
    with pytest.raises(SteeringError, match=r"add up to 2\.0001, beyond the safe range of 2"):
        mix((WARM, 1.0001), (TERSE, sign * 1.0))


def test_ablations_do_not_count_towards_the_sum() -> None:
    """Neither their strengths nor their safe range count."""
    mix((WARM, 2.0), (BARE, 1.0))
    narrow = tiny_profile(name="narrow", layers=(0, 1), operator="ablate", seed=3, max_strength=0.5)
    mix((WARM, 2.0), (narrow, 0.5))


def test_the_narrowest_active_profile_limits_a_mix() -> None:
    narrow = tiny_profile(name="narrow", max_strength=0.5)
    with pytest.raises(SteeringError, match=r"add up to 1, beyond the safe range of 0\.5"):
        mix((WARM, 0.6), (narrow, 0.4))
    mix((WARM, 0.6), (narrow, 0.0))


def test_neutral() -> None:
    for neutral in (Mixture(), mix((WARM, 0.0)), mix((WARM, 0.0), (BARE, 0))):
        assert neutral.is_neutral
        assert neutral.shifts().by_layer() == neutral.ablations() == {}
        assert neutral.shifts().rows.shape == (0, 0)
        assert neutral.digest() == ""
    assert not mix((WARM, 0.0), (TERSE, 1e-9)).is_neutral


def test_a_profile_alone_at_all_its_layers_is_used_as_it_was_calibrated() -> None:
    mixture = mix((WARM, 0.8))
    assert mixture.is_calibrated(mixture.terms[0])


def test_a_term_without_strength_is_idle_and_a_subset_acts_at_its_layers() -> None:
    mixture = Mixture((Term(WARM, 0.0), Term(TERSE, 0.5, (2,))), preserve_norm=True)
    assert [mixture.is_idle(term) for term in mixture.terms] == [True, False]
    assert mixture.terms[1].active_layers == mixture.shifts().layers == (2,)


@pytest.mark.parametrize(
    "uncalibrated",
    [
        mix((WARM, 0.5), (TERSE, 0.5)),
        mix((WARM, 0.5), apply_to="all"),
        mix((WARM, 0.5), preserve_norm=True),
        Mixture((Term(WARM, 0.5, (0,)),)),
        mix((tiny_profile(calibration={**CALIBRATION, "unreached": True}), 0.5)),
        mix((tiny_profile(), 0.5)),
    ],
)
def test_uses_outside_the_calibration(uncalibrated: Mixture) -> None:
    assert not uncalibrated.is_calibrated(uncalibrated.terms[0])


def test_an_idle_neighbour_and_all_layers_by_name_keep_the_calibration() -> None:
    for calibrated in (mix((WARM, 0.5), (TERSE, 0.0)), Mixture((Term(WARM, 0.5, (2, 0)),))):
        assert calibrated.is_calibrated(calibrated.terms[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (mix((WARM, 1)), mix((WARM, 1.0))),
        (mix((WARM, 0.5)), mix((WARM, 0.5), (TERSE, 0.0))),
        (mix((WARM, 0.5)), Mixture((Term(WARM, 0.5, (2, 0, 2)),))),
        (mix((WARM, 0.5)), mix((WARM, 0.5), allow_beyond_safe=True)),
    ],
)
def test_equal_digests(one: Mixture, other: Mixture) -> None:
    assert one.digest() == other.digest()


def test_unequal_digests() -> None:
    republished = tiny_profile(name="warm", version="e" * 64, unit=0.5)
    mixes = [
        Mixture(),
        mix((WARM, 0.5)),
        mix((WARM, -0.5)),
        mix((republished, 0.5)),
        mix((TERSE, 0.5)),
        mix((WARM, 0.5), preserve_norm=True),
        Mixture((Term(WARM, 0.5, (0,)),)),
        mix((WARM, 0.5), (TERSE, 0.5)),
    ]
    assert len({each.digest() for each in mixes}) == len(mixes)
    assert mix((WARM, 0.5), apply_to="all").digest() == mix((WARM, 0.5)).digest()  # it does not depend on positions


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_a_mix_is_linear_in_its_strengths(warm: float, terse: float) -> None:
    both, alone, other = mix((WARM, warm), (TERSE, terse)), mix((WARM, warm)), mix((TERSE, terse))
    for layer, shift in both.shifts().by_layer().items():
        parts = [part[layer] for part in (alone.shifts().by_layer(), other.shifts().by_layer()) if layer in part]
        torch.testing.assert_close(shift, torch.stack(parts).sum(0))
