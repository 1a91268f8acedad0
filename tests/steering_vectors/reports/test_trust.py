"""The texts of the trust report, on handmade results."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from steering_vectors.reports.trust import print_trust, reading_note, trust_headline, trust_section


def point(strength: float, delta: float, change: str, beyond: bool | None = True, **more: Any) -> dict[str, Any]:
    return {
        "strength": strength,
        "value": 0.5 + delta,
        "value_95": (0.4 + delta, 0.6 + delta),
        "delta": delta,
        "delta_95": (delta - 0.01, delta + 0.01),
        "change": change,
        "beyond_random": beyond,
        "random_delta": None if beyond is None else [-0.01, 0.01],
        **more,
    }


def vertical(delta: float, change: str, beyond: bool | None = True, **fields: Any) -> dict[str, Any]:
    found = {
        strength: point(
            strength,
            strength * delta,
            change if strength else "no change",
            beyond if strength else False,
            figures={"auc": point(strength, strength * 0.1, "better" if strength else "no change", False)},
            parts={"short": {"rows": 9, **point(strength, 0, "no change")}},
        )
        for strength in (-1.0, 0.0, 1.0)
    }
    control = [
        {"strength": strength, "value": 0.5, "delta": 0.0, "figures": {"auc": {"value": 0.5, "delta": 0.0}}}
        for strength in found
    ]
    about = {
        "accuracy": {"measure": "share <right>", "aim": "higher", "reference": 0.5},
        "auc": {"measure": "AUC", "aim": "higher", "reference": None},
    }
    return {
        "measure": "share <right>",
        "aim": "higher",
        "reference": 0.5,
        "figures": about,
        "strengths": list(found.values()),
        "random": [] if beyond is None else [{"strengths": control}] * 2,
        "rows": 40,
        "left_out": 3,
        "note": "zero-shot",
        "remarks": ["read the AUC"],
        **fields,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    verticals = {
        "ethics": vertical(0.05, "better"),
        "bias": vertical(0.02, "worse", False),
        "privacy": vertical(0.0, "no change"),
    }
    return {"profile": "warm", "method": "mean-diff", "layers": [1], "model": "tiny", "trust": verticals}


def test_the_headline_states_changes_and_controls(result: dict[str, Any]) -> None:
    assert trust_headline(result) == (
        "At strength +1: ethics better (+0.05); bias worse (+0.02, within random); no change in privacy. "
        "At strength -1: ethics better (-0.05); bias worse (-0.02, within random); no change in privacy."
    )


def test_the_note_counts_intervals_and_controls(result: dict[str, Any]) -> None:
    note = reading_note(result["trust"])
    assert "Of these 12 intervals, about 1 would exclude 0 by chance." in note
    assert "2 random directions of the same norm" in note
    assert reading_note({"ethics": vertical(0.1, "better", None)}).endswith("No random directions were measured.")


def test_the_section_is_escaped_and_marks_changes(result: dict[str, Any]) -> None:
    page = trust_section(result)
    assert "<right>" not in page.replace("share &lt;right&gt;", "")
    assert page.count('<td class="better">') == 2 + 3 * 2
    assert page.count('<td class="worse">') == 2
    assert "short (9 rows)" in page
    assert "<td>3</td><td>zero-shot read the AUC</td>" in page


def test_a_figure_that_never_moves_is_not_drawn(result: dict[str, Any]) -> None:
    page = trust_section({**result, "trust": {"privacy": result["trust"]["privacy"]}})
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert "AUC" in drawing
    assert "share" not in drawing


def test_the_terminal_shows_every_figure(result: dict[str, Any]) -> None:
    stream = io.StringIO()
    print_trust(Console(file=stream, width=160), result)
    text = stream.getvalue()
    assert "+0.050 better" in text
    assert "+0.020 worse, within random" in text
    assert "ethics: 40 rows, 3 left out (too long or unusable)" in text
    assert "note: read the AUC" in text
