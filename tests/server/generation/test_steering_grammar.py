"""The grammar of steering strings, model aliases, and the step from names to versions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.engines.errors import UnknownModel, UnknownProfile
from server.engines.protocol import PlanTerm, SteeringPlan
from server.generation.steering_grammar import of_alias, only_one, parse_steering, pinned
from steering_vectors.errors import SteeringError
from steering_vectors.profiles.profile import ModelIdentity, Profile
from tests.support.serving import random_profile

IDENTITY = ModelIdentity("m", "M", 8, 4, "f")
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
STRENGTHS = st.floats(allow_nan=False, allow_infinity=False)


PARAMS = {"warm@1e999": "strength", "warm@1+warm@2": "terms"}  # others are of the text as a whole


def terms_of(plan: SteeringPlan) -> list[tuple[str, float]]:
    return [(term.profile, term.strength) for term in plan.terms]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("warm", [("warm", 1.0)]),
        ("warm@0.8+concise@-0.3", [("warm", 0.8), ("concise", -0.3)]),
        ("warm@+.5", [("warm", 0.5)]),
        ("warm@2.", [("warm", 2.0)]),
        ("warm@1e-1+b", [("warm", 0.1), ("b", 1.0)]),
        ("warm@1e+1", [("warm", 10.0)]),
        ("a-b.c_d@0", [("a-b.c_d", 0.0)]),
        ("warm#0123abcd@2", [("warm#0123abcd", 2.0)]),
        ("e+0", [("e", 1.0), ("0", 1.0)]),
        ("be@1+a", [("be", 1.0), ("a", 1.0)]),
        ("e@1e+1+e1", [("e", 10.0), ("e1", 1.0)]),
    ],
)
def test_it_reads(text: str, terms: list[tuple[str, float]]) -> None:
    assert terms_of(parse_steering(text)) == terms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the steering is empty; write for example 'warm@0.8+concise@-0.3', or leave it out"),
        ("Warm", "steering 'Warm' cannot be read at 'Warm'; write for example 'warm@0.8+concise@-0.3'"),
        ("warm@", "steering 'warm@' cannot be read at 'warm@'; write for example 'warm@0.8+concise@-0.3'"),
        ("warm+", "steering 'warm+' cannot be read at ''; write for example 'warm@0.8+concise@-0.3'"),
        ("warm@1+ b", "steering 'warm@1+ b' cannot be read at ' b'; write for example 'warm@0.8+concise@-0.3'"),
        (
            "warm concise",
            "steering 'warm concise' cannot be read at 'warm concise'; write for example 'warm@0.8+concise@-0.3'",
        ),
        ("a@1@2", "steering 'a@1@2' cannot be read at 'a@1@2'; write for example 'warm@0.8+concise@-0.3'"),
        ("warm@nan", "steering 'warm@nan' cannot be read at 'warm@nan'; write for example 'warm@0.8+concise@-0.3'"),
        ("warm@1e999", "the strength of 'warm' must be a finite number"),
        ("warm@1+warm@2", "profile 'warm' occurs twice in one steering"),
        ("warm@٣", "steering 'warm@٣' cannot be read at 'warm@٣'; write for example 'warm@0.8+concise@-0.3'"),
    ],
)
def test_it_refuses(text: str, message: str) -> None:
    with pytest.raises(SteeringError) as failure:
        parse_steering(text)
    assert failure.value.message == message
    assert failure.value.param == PARAMS.get(text, "steering")


@given(st.dictionaries(NAMES, STRENGTHS, min_size=1, max_size=5))
def test_what_is_written_is_read_back(mix: dict[str, float]) -> None:
    text = "+".join(f"{name}@{strength!r}" for name, strength in mix.items())
    assert terms_of(parse_steering(text)) == list(mix.items())


def split_by_hand(text: str) -> list[str]:
    """The terms of a steering string: a `+` separates them unless it is the sign of a strength or of its exponent."""
    terms = [""]
    for letter in text:
        is_sign = "@" in terms[-1] and terms[-1][-1] in "@eE"
        if letter == "+" and not is_sign:
            terms.append("")
        else:
            terms[-1] += letter
    return terms


def is_version(text: str) -> bool:
    return 8 <= len(text) <= 64 and set(text) <= set("0123456789abcdef")


def is_alias(text: str) -> bool:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return 1 <= len(text) <= 32 and text[0] in letters and set(text) <= set(f"{letters}0123456789_-")


def read_by_hand(text: str) -> list[tuple[str, float]] | None:
    """What the grammar says of a text, without a regular expression; None where it refuses."""
    found = []
    for term in split_by_hand(text):
        reference, at, strength = term.partition("@")
        name, sharp, version = reference.partition("#")
        if (
            not 1 <= len(name) <= 64
            or name[0] in "._-"
            or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        ):
            return None
        if sharp and not (is_version(version) or is_alias(version)):
            return None
        if not set(strength) <= set("0123456789+-.eE"):  # float() reads more than the grammar does
            return None
        try:
            found.append((reference, float(strength) if at else 1.0))
        except ValueError:
            return None
    names = [reference.partition("#")[0] for reference, _ in found]
    finite = all(math.isfinite(strength) for _, strength in found)
    return found if finite and len(set(names)) == len(names) else None


TERMS = st.one_of(
    st.text(alphabet="ab01@+-.e#_ \n", max_size=8),
    st.tuples(
        st.sampled_from(
            ["a", "b", "e", "be", "0", "1e", "a.b", "c#0123abcd", "c#0123abc", "c#a", "c#abcdef01-1", "-a", "A"]
        ),
        st.sampled_from(["", "@"]),
        st.sampled_from(
            ["", "1", "+1", "-.5", "2.", "1e1", "1e+1", "1e", ".", "e1", "1e999", "+-1", " 1", "1_0", "nan"]
        ),
    ).map("".join),
)


@given(st.lists(TERMS, min_size=1, max_size=4), st.sampled_from(["+", "+", "", "@", " ", "-"]))
@example(["e", "0"], "+")
@example(["warm", "concise"], " ")
def test_any_text_is_read_as_by_hand_or_refused(terms: Sequence[str], separator: str) -> None:
    text = separator.join(terms)
    expected = read_by_hand(text)
    if expected is None:
        with pytest.raises(SteeringError):
            parse_steering(text)
    else:
        assert terms_of(parse_steering(text)) == expected


@pytest.mark.parametrize(
    ("model", "served", "steering"),
    [
        ("demo", "demo", None),
        ("demo:warm@0.8", "demo", "warm@0.8"),
        ("org/m:8b", "org/m:8b", None),
        ("org/m:8b:warm", "org/m:8b", "warm"),
    ],
)
def test_the_rest_of_a_models_name_steers(model: str, served: str, steering: str | None) -> None:
    assert of_alias(model, served) == (None if steering is None else parse_steering(steering))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("warm#stable@1.5", [("warm#stable", 1.5)]),
        ("warm#stable+cold#canary@-1e-1", [("warm#stable", 1.0), ("cold#canary", -0.1)]),
        ("warm#deadbeef-2", [("warm#deadbeef-2", 1.0)]),
        ("warm#abcdefabcdefabcdefabcdefabcdefabcdef@2", [("warm#abcdefabcdefabcdefabcdefabcdefabcdef", 2.0)]),
        ("warm#e@1e1", [("warm#e", 10.0)]),
    ],
)
def test_a_version_or_an_alias_is_a_part_of_the_name(text: str, terms: list[tuple[str, float]]) -> None:
    assert terms_of(parse_steering(text)) == terms
    assert of_alias(f"org/m:8b:{text}", "org/m:8b") == parse_steering(text)


def test_an_alias_without_a_steering_is_refused() -> None:
    with pytest.raises(SteeringError, match="the steering is empty"):
        of_alias("demo:", "demo")


@pytest.mark.parametrize("model", ["", "other", "demo2", "Demo", "demo@1"])
def test_other_models_are_unknown(model: str) -> None:
    with pytest.raises(UnknownModel) as failure:
        of_alias(model, "demo")
    assert failure.value.message == (
        f"model {model!r} is not served; this server has 'demo' and, steered, 'demo:PROFILE@STRENGTH'"
    )
    assert failure.value.param == "model"


def test_only_one_source_may_steer() -> None:
    plan = parse_steering("warm")
    assert only_one({"the alias": None, "the field": plan}, None) is plan
    assert only_one({"the alias": None, "the field": None}, None) == SteeringPlan()
    for header, second in ((None, "the field"), ("warm", "the header x-trimtab-steering")):
        with pytest.raises(SteeringError) as failure:
            only_one({"the alias": plan, "the field": None if header else plan}, header)
        assert failure.value.message == f"both the alias and {second} steer: use only one of them"
        assert failure.value.param == "steering"


def test_every_source_says_where_it_applies() -> None:
    wanted = (PlanTerm("warm", "", 0.5),)
    for apply_to in ("generated", "all"):
        plan = SteeringPlan(wanted, apply_to)
        assert parse_steering("warm@0.5", apply_to) == only_one({}, "warm@0.5", apply_to) == plan
        assert of_alias("demo:warm@0.5", "demo", apply_to) == plan
    assert only_one({}, "warm@0.5") == SteeringPlan(wanted, "generated")


def find(reference: str) -> Profile:
    name = reference.partition("#")[0]
    if name not in {"warm", "concise"}:
        raise UnknownProfile(f"no {name}")
    return random_profile(IDENTITY, name, version=name * 8, max_strength=1.5)


def test_names_become_versions() -> None:
    wanted = SteeringPlan((PlanTerm("warm#0123abcd", "", 0.5, (3,)), PlanTerm("concise", "", -0.25)), apply_to="all")
    plan = pinned(wanted, find)
    assert [(term.profile, term.strength, term.layers) for term in plan.terms] == [
        ("warm", 0.5, (3,)),
        ("concise", -0.25, None),
    ]
    assert plan.apply_to == "all"
    assert plan.versions == ("warm" * 8, "concise" * 8)


def test_one_profile_in_two_versions_is_refused() -> None:
    with pytest.raises(SteeringError, match="profile 'warm' occurs twice"):
        pinned(parse_steering("warm+warm#01234567"), find)


def test_strength_zero_needs_its_profile_too() -> None:
    assert pinned(parse_steering("warm@0"), find).strengths(0) == (0.0,)
    with pytest.raises(UnknownProfile):
        pinned(parse_steering("cold@0"), find)
