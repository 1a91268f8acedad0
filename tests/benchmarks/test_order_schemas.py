"""What benchmarks/speed/structured.py judges texts by: a text that obeys passes, and each fault is seen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from benchmarks.common.order_schemas import long_order, order
from benchmarks.speed.structured import fault, judge

GOOD: dict[str, Any] = {
    "id": "00AF-12CD",
    "customer": {
        "name": "é",
        "tier": "gold",
        "address": {"street": "Mill Lane 7", "postcode": "01234"},
    },
    "items": [{"dish": "soup", "count": 20, "note": None}],
    "tags": [],
    "paid": False,
    "total": 2.5,
}


def test_an_order_is_one() -> None:
    assert fault(json.dumps(GOOD)) is None
    assert fault(json.dumps({**GOOD, "remark": "x" * 20})) is None


@pytest.mark.parametrize(
    "change",
    [
        {"id": "00af-12CD"},
        {"customer": {**GOOD["customer"], "tier": "silver"}},
        {"customer": {**GOOD["customer"], "address": {"street": "Mill Lane 07", "postcode": "01234"}}},
        {"items": []},
        {"items": GOOD["items"] * 4},
        {"items": [{"dish": "soup", "count": 21, "note": None}]},
        {"tags": ["cold"] * 4},
        {"paid": "false"},
        {"total": -1},
        {"remark": "x" * 21},
        {"more": 1},
    ],
)
def test_a_fault_is_seen(change: dict[str, Any]) -> None:
    assert fault(json.dumps({**GOOD, **change})) is not None


def test_a_text_that_breaks_off_is_a_fault() -> None:
    assert fault(json.dumps(GOOD)[:-1]) is not None


@pytest.mark.parametrize(
    ("endings", "holds"),
    [(["stop"] * 99 + ["length"], True), (["stop"] * 98 + ["length"] * 2, False), (["stop", "error"], False)],
)
def test_what_holds(endings: list[str], holds: bool) -> None:
    text, usage = json.dumps(GOOD), {"completion_tokens": 9}
    assert judge([{"text": text, "finish_reason": one, "usage": usage} for one in endings])["holds"] is holds


def test_schemas_are_schemas() -> None:
    for schema in (order(), long_order(0), long_order(15)):
        Draft202012Validator.check_schema(schema)
