"""How requests name versions, and how shares are drawn."""

from __future__ import annotations

import random

import pytest

from server.profiles.references import Alias, Draw, Reference, checked_alias, parse_reference
from steering_vectors.errors import RequestError

OLD, NEW, OTHER = ("a" * 64, "b" * 64, "c" * 64)


def canary(share: float, version: str = NEW) -> dict[str, Alias]:
    return {"canary": Alias(version=version, share=share)}


def chosen_for(share: float, users: int = 4000) -> set[int]:
    """The users of whom a plain name means the canary."""
    return {user for user in range(users) if Draw(f"user {user}").choose("warm", OLD, canary(share)) == NEW}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("warm", Reference("warm")),
        ("warm#fb09e9ae", Reference("warm", version="fb09e9ae")),
        ("warm#" + OLD, Reference("warm", version=OLD)),
        ("warm#stable", Reference("warm", alias="stable")),
        ("warm#deadbeef", Reference("warm", version="deadbeef")),
        ("warm#deadbeef-2", Reference("warm", alias="deadbeef-2")),
        ("warm#dead", Reference("warm", alias="dead")),
        ("warm#", None),
        ("#stable", None),
        ("warm#Stable", None),
        ("warm#0stable", None),
        ("warm#a#b", None),
    ],
)
def test_a_reference_is_a_name_a_version_or_an_alias(text: str, expected: Reference | None) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "alias", ["latest", "deadbeef", "", "a" * 33, "UP", "ü", "a b", "a\n", "../a", "1a", "a@1", "a+b"]
)
def test_an_alias_never_looks_like_something_else(alias: str) -> None:
    with pytest.raises(RequestError):
        checked_alias(alias)


def test_a_share_is_that_part_of_the_users_and_each_stays() -> None:
    tenth, fifth = chosen_for(0.1), chosen_for(0.2)
    assert abs(len(tenth) - 400) < 100  # five standard deviations are 95
    assert abs(len(fifth) - 800) < 130
    assert tenth < fifth  # a share that grows keeps those that it had
    assert chosen_for(0.1) == tenth
    assert (chosen_for(0.0, 100), chosen_for(1.0, 100)) == (set(), set(range(100)))


def test_a_request_without_a_user_draws_once_for_itself() -> None:
    draws = [Draw() for _ in range(2000)]
    first = [draw.choose("warm", OLD, canary(0.25)) for draw in draws]
    assert [draw.choose("warm", OLD, canary(0.25)) for draw in draws] == first
    assert 380 < first.count(NEW) < 620


def test_tenants_and_profiles_draw_apart() -> None:
    def of(name: str, tenant: str) -> list[str]:
        return [Draw(f"user {user}", tenant).choose(name, OLD, canary(0.5)) for user in range(200)]

    assert of("warm", "a") != of("warm", "b") != of("cold", "b")


def test_several_shares_add_up() -> None:
    aliases = {"a": Alias(version=NEW, share=0.25), "b": Alias(version=OTHER, share=0.5)}
    seen = [Draw(f"user {user}").choose("warm", OLD, aliases) for user in range(4000)]
    assert abs(seen.count(NEW) - 1000) < 140
    assert abs(seen.count(OTHER) - 2000) < 160
    whole = {"a": Alias(version=NEW, share=0.5), "b": Alias(version=OTHER, share=0.5)}
    assert OLD not in {Draw(f"user {user}").choose("warm", OLD, whole) for user in range(500)}


def test_what_a_generation_runs_with_is_preferred() -> None:
    users = random.Random(0).sample(range(10**6), 50)
    for version in (OLD, NEW):
        draws = [Draw(str(user), preferred={version, OTHER}) for user in users]
        assert {draw.choose("warm", OLD, canary(0.5)) for draw in draws} == {version}
