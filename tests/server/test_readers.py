"""Readers of foreign bytes and texts, with a few hundred inputs each; `make fuzz` has as many as one likes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from steering_vectors.profiles.files import read_profile
from tests.support.reader_properties import PROPERTIES, a_file, check_in_time, packed


@pytest.mark.parametrize("name", PROPERTIES)
def test_whatever_is_read_is_understood_or_refused(name: str) -> None:
    source, check = PROPERTIES[name]

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(source)
    def holds(found: Any) -> None:
        check_in_time(check, found)

    holds()


def test_the_file_that_is_changed_is_a_profile() -> None:
    assert read_profile(packed(*a_file()), "warm").layers == (0, 2)
