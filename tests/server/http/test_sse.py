"""Events are one line each, whatever they hold, and are read back whole, however their bytes are parted."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.remote import event_data
from server.http.sse import frame

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["\u2028", "a\x85b", "\r\n\n", "data: x", "😀"]
)
EVENTS = st.dictionaries(
    TEXTS, st.recursive(TEXTS | st.integers() | st.booleans() | st.none(), lambda inner: st.lists(inner, max_size=3))
)


def parted(content: bytes, cuts: list[int]) -> list[bytes]:
    """The bytes in parts that begin at these places."""
    places = sorted({0, *(cut % (len(content) + 1) for cut in cuts), len(content)})
    return [content[start:end] for start, end in pairwise(places)]


@given(events=st.lists(EVENTS, max_size=5), cuts=st.lists(st.integers(min_value=0), max_size=20))
def test_events_are_read_back_however_their_bytes_are_parted(events: list[dict[str, Any]], cuts: list[int]) -> None:
    content = b"".join(map(frame, events))
    assert [json.loads(data) for data in event_data(parted(content, cuts))] == events


@given(event=EVENTS)
def test_an_event_is_one_line_for_every_reader(event: dict[str, Any]) -> None:
    content = frame(event)
    assert content.endswith(b"\n\n")
    (line, empty) = content.decode().splitlines()  # as httpx does: also at U+0085, U+2028 and U+2029
    assert (line[:6], empty) == ("data: ", "")
    assert json.loads(line[6:]) == event


@pytest.mark.parametrize("number", [1e-7, 1e22, 0.1, -0.0, 12.5, 5e-324, 1.7976931348623157e308, 2**70])
def test_numbers_are_read_back_to_the_last_bit(number: float) -> None:
    assert repr(json.loads(frame({"a": number})[6:])) == repr({"a": number})
