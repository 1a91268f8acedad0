"""Every message of the protocol survives pickle, and JSON by pydantic."""

from __future__ import annotations

import json
import pickle
from dataclasses import is_dataclass
from inspect import getmembers
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from server.engines import errors, protocol
from steering_vectors import errors as offline
from steering_vectors.errors import TrimtabError

NUMBERS = st.floats(allow_nan=False)  # NaN is not equal to itself; it has a test of its own
NAMES = st.sampled_from(["warm", "concise", "honest", "careful"])
POINTS = st.lists(st.tuples(st.integers(1, 4096), st.floats(-9, 9)), max_size=4, unique_by=lambda point: point[0])
OWN: dict[Any, Any] = {  # what not every value is valid for
    protocol.SamplingParameters: st.builds(
        protocol.SamplingParameters,
        temperature=st.floats(0, 100),
        top_p=st.floats(0.01, 1),
        top_k=st.integers(0, 99),
        logit_bias=st.dictionaries(st.integers(0, 99), NUMBERS, max_size=3),
        seed=st.none() | st.integers(),
        max_tokens=st.none() | st.integers(9, 99),
        min_tokens=st.integers(0, 9),
        stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
        stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    ),
    protocol.StrengthSchedule: st.builds(
        lambda start, points, kind: protocol.StrengthSchedule(((0, start), *sorted(points)), kind),
        st.floats(-9, 9),
        POINTS,
        st.sampled_from(["step", "linear"]),
    ),
    protocol.Constraint: st.builds(
        protocol.Constraint, st.sampled_from(["json", "regex", "choice", "lark"]), st.text(max_size=20)
    ),
}
OWN[protocol.PlanTerm] = st.builds(
    protocol.PlanTerm,
    NAMES,
    st.text(max_size=8),
    st.floats(-9, 9),
    st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.none() | OWN[protocol.StrengthSchedule],
)
OWN[protocol.SteeringPlan] = st.builds(
    protocol.SteeringPlan,
    st.lists(OWN[protocol.PlanTerm], max_size=3, unique_by=lambda term: term.profile).map(tuple),
    st.sampled_from(["generated", "all"]),
    st.booleans(),
    st.booleans(),
)


def values(form: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, arguments = get_origin(form), get_args(form)
    if form in OWN:
        return OWN[form]  # type: ignore[no-any-return]
    if is_dataclass(form):
        return st.builds(form, **{name: values(one) for name, one in get_type_hints(form).items()})
    if origin in (Union, UnionType):
        return st.one_of(*map(values, arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin is not None:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    plain = {str: st.text(), int: st.integers(), float: NUMBERS, bool: st.booleans(), NoneType: st.none()}
    return plain[form]


MESSAGES = {
    name: one
    for name, one in getmembers(protocol)
    if is_dataclass(one) and one.__module__ == protocol.__name__ and one is not protocol.EngineInfo
}


def as_json(form: TypeAdapter[Any], message: Any) -> str:
    return json.dumps(form.dump_python(message, mode="json"))  # pydantic's own text has null for an infinite number


@pytest.mark.slow
@pytest.mark.parametrize("kind", MESSAGES.values(), ids=MESSAGES)
def test_a_message_survives(kind: type[Any]) -> None:
    form = TypeAdapter(kind)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(values(kind))
    def check(message: Any) -> None:
        for found in (pickle.loads(pickle.dumps(message)), form.validate_json(as_json(form, message))):
            assert found == message
            assert repr(found) == repr(message)  # 1 and 1.0 are equal, and not the same

    check()


ERRORS = [
    one
    for module in (offline, errors)
    for _, one in getmembers(module)
    if isinstance(one, type) and issubclass(one, TrimtabError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickle(kind: type[TrimtabError]) -> None:
    error = kind("what is wrong", **({} if kind is offline.DataError else {"param": "terms", "code": "special"}))
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert (found.message, found.param, found.code, str(found)) == (error.message, error.param, error.code, str(error))


# Schedules.


@given(OWN[protocol.StrengthSchedule])
@settings(deadline=None, derandomize=True)
def test_a_schedule_changes_where_it_says_and_nowhere_else(schedule: protocol.StrengthSchedule) -> None:
    last = min(schedule.points[-1][0], 300)
    changes, token = [], schedule.next_change(0)
    while token is not None and token <= last:
        changes.append(token)
        token = schedule.next_change(token)
    strengths = [schedule.at(token) for token in range(last + 1)]
    differ = [place + 1 for place, (one, other) in enumerate(pairwise(strengths)) if one != other]
    assert set(differ) <= set(changes)  # a straight line may stand still where its steps vanish in rounding
    if schedule.interpolation == "step":
        assert differ == changes
    points = [strength for _, strength in schedule.points]
    assert all(min(points) <= strength <= max(points) for strength in strengths)


def test_a_schedule_is_its_points_however_long_it_is() -> None:
    line = protocol.StrengthSchedule(((0, 0.0), (4096, 1.0)), "linear")
    plan = protocol.SteeringPlan((protocol.PlanTerm("warm", "v", schedule=line),))
    assert len(pickle.dumps(plan)) < 400
    assert len({plan, protocol.SteeringPlan((protocol.PlanTerm("warm", "v", schedule=line),))}) == 1
