"""Profiles: valid fields, layers, and the check against a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering_vectors.errors import ProfileError, ProfileMismatch, SteeringError
from steering_vectors.profiles.metadata import range_text
from steering_vectors.profiles.profile import Profile
from tests.support.tiny import HIDDEN
from tests.support.tiny_profiles import NOWHERE, tiny_profile


@pytest.mark.parametrize("name", ["warm", "0", "a" * 64, "a.b_c-d", "9lives"])
def test_names(name: str) -> None:
    assert tiny_profile(name=name).name == name


@pytest.mark.parametrize("name", ["", "Warm", "a" * 65, "-a", ".a", "a b", "a/b", "ä", "a\n", "a@1", "a+b", "a#b"])
def test_invalid_names(name: str) -> None:
    with pytest.raises(ProfileError) as refusal:
        tiny_profile(name=name)
    assert str(refusal.value) == (
        f"{name!r} is not a profile name; use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operator": "mul"}, "profile 'warm': operator is 'mul', not one of add, ablate"),
        ({"apply_to": "some"}, "profile 'warm': apply_to is 'some', not one of generated, all"),
        ({"layering": "x"}, "profile 'warm': layering is 'x', not one of independent, incremental"),
        ({"unit": 0.0}, "profile 'warm': unit must be a positive finite number, not 0.0"),
        ({"unit": float("nan")}, "profile 'warm': unit must be a positive finite number, not nan"),
        ({"unit": True}, "profile 'warm': unit must be a positive finite number, not True"),
        ({"unit": "1"}, "profile 'warm': unit must be a positive finite number, not '1'"),
        ({"max_strength": -1}, "profile 'warm': max_strength must be a positive finite number, not -1"),
        ({"max_strength": float("inf")}, "profile 'warm': max_strength must be a positive finite number, not inf"),
        ({"min_strength": 0.0}, "profile 'warm': min_strength must be a negative finite number, not 0.0"),
        ({"min_strength": "-1"}, "profile 'warm': min_strength must be a negative finite number, not '-1'"),
        ({"min_strength": True}, "profile 'warm': min_strength must be a negative finite number, not True"),
        ({"min_strength": float("-inf")}, "profile 'warm': min_strength must be a negative finite number, not -inf"),
        ({"format_version": 2}, "profile 'warm' has format version 2; this trimtab reads 1"),
        ({"layers": []}, "profile 'warm' has no direction"),
        ({"layers": [3]}, "profile 'warm': layer 3 is out of range; the model has blocks 0 to 2"),
        ({"layers": [-1]}, "profile 'warm': layer -1 is out of range; the model has blocks 0 to 2"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError) as refusal:
        tiny_profile(**fields)
    assert str(refusal.value) == message


def test_the_safe_range_is_symmetric_unless_it_has_a_lower_end() -> None:
    even, uneven = tiny_profile(max_strength=1.7), tiny_profile(max_strength=1.7, min_strength=-0.4)
    assert (even.safe_range, uneven.safe_range) == ((-1.7, 1.7), (-0.4, 1.7))
    assert [one.safe_limit(strength) for one in (even, uneven) for strength in (-1, 1)] == [1.7, 1.7, 0.4, 1.7]
    assert [range_text(one.safe_range) for one in (even, uneven)] == ["±1.7", "-0.4 to 1.7"]


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.zeros(31), "profile 'warm': the direction at layer 1 has shape [31], the model's hidden size is 32"),
        (
            torch.zeros(1, 32),
            "profile 'warm': the direction at layer 1 has shape [1, 32], the model's hidden size is 32",
        ),
        (torch.zeros(32).half(), "profile 'warm': the direction at layer 1 is not float32"),
        (torch.full([32], torch.nan), "profile 'warm': the direction at layer 1 has a NaN or infinite entry"),
        (torch.full([32], -torch.inf), "profile 'warm': the direction at layer 1 has a NaN or infinite entry"),
    ],
)
def test_directions_that_are_refused(direction: torch.Tensor, message: str) -> None:
    with pytest.raises(ProfileError) as refusal:
        Profile(name="warm", model=NOWHERE, directions={1: direction}, method="mean-diff")
    assert str(refusal.value) == message


def test_layers_ascend() -> None:
    assert tiny_profile(layers=(2, 0)).layers == (0, 2)


def test_independent_layers_are_injected_as_they_are() -> None:
    profile = tiny_profile(layers=(0, 1, 2))
    assert all(torch.equal(profile.injected()[layer], profile.directions[layer]) for layer in range(3))
    assert list(profile.injected([2, 1])) == [1, 2]


@given(st.sets(st.integers(0, 7), min_size=1), st.randoms())
def test_incremental_layers_are_differenced_over_the_chosen_ones(layers: set[int], random: Any) -> None:
    identity = replace(NOWHERE, num_layers=8)
    profile = tiny_profile(identity, layers=range(8), layering="incremental")
    order = random.sample(sorted(layers), len(layers))
    steps, total = profile.injected([*order, order[0]]), torch.zeros(HIDDEN)
    assert list(steps) == sorted(layers)
    for layer, step in steps.items():
        total = total + step
        torch.testing.assert_close(total, profile.directions[layer])


def test_an_ablated_direction_is_never_differenced() -> None:
    profile = tiny_profile(layers=(0, 2), layering="incremental", operator="ablate")
    assert torch.equal(profile.injected()[2], profile.directions[2])


def test_layers_that_it_lacks() -> None:
    with pytest.raises(SteeringError) as refusal:
        tiny_profile(layers=(0, 2)).injected([0, 1])
    assert str(refusal.value) == "profile 'warm' has no direction at layer 1; it has layers [0, 2]"
    assert refusal.value.param == "layers"


def test_no_layers() -> None:
    with pytest.raises(SteeringError) as refusal:
        tiny_profile().injected([])
    assert str(refusal.value) == "profile 'warm': the list of layers is empty; leave it out to use all layers"


def test_the_fitted_model_is_accepted_under_any_id() -> None:
    tiny_profile().check_model(replace(NOWHERE, id="another name"))


def test_other_weights() -> None:
    other = replace(NOWHERE, id="other", fingerprint="0" * 64)
    with pytest.raises(ProfileMismatch) as refusal:
        tiny_profile().check_model(other)
    assert str(refusal.value) == (
        "profile 'warm' was fitted on 'tiny', whose weights differ from 'other''s. "
        "Fit it again on this model, or set allow_model_mismatch to use it anyway."
    )
    tiny_profile().check_model(other, allow_mismatch=True)


@pytest.mark.parametrize("other", [replace(NOWHERE, hidden_size=64), replace(NOWHERE, num_layers=4)])
def test_another_shape_never_fits(other: Any) -> None:
    with pytest.raises(ProfileMismatch, match=r"Fit it again on this model\.") as refusal:
        tiny_profile().check_model(other, allow_mismatch=True)
    assert f"(hidden size {other.hidden_size}, {other.num_layers} blocks)" in str(refusal.value)
