"""Few texts in calibrations: these tests do not measure how good a profile is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.few_texts import few_texts


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_texts(monkeypatch, short=True)
        yield
