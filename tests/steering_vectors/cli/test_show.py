"""`trimtab show`: by file or name, as text, JSON and an HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.profiles.files import load_profile, save_profile
from tests.steering_vectors.cli.conftest import Run
from tests.support.tiny_profiles import tiny_profile


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    for seed, name in enumerate(("warm", "kind")):
        fields = {"residual_norms": {1: 2.0, 2: 3.0}, "data": {"sha256": "5" * 64}}
        save_profile(tiny_profile(name=name, layers=(1, 2), seed=seed, description="kind words", **fields), directory)
    return directory


def test_a_file_or_a_name(run: Run, stored: Path) -> None:
    by_file, by_name = run("show", stored / "kind.safetensors"), run("show", "kind", "--profiles", stored)
    assert by_file.exit_code == by_name.exit_code == 0
    assert by_file.stdout == by_name.stdout
    profile = load_profile(stored / "kind.safetensors")
    for fact in (profile.version, profile.model.fingerprint, profile.data["sha256"], "kind words", "independent"):
        assert fact in by_file.stdout
    assert "median ‖h‖" in by_file.stdout


def test_the_quality_of_the_data(run: Run, tmp_path: Path) -> None:
    quality = {
        "layer": 1, "rows": 96, "agreement": 0.0321, "significance": 4.04, "reproducibility": 0.594,
        "separation": 0.54, "length": {
            "longer_tokens": 0.6, "longer_characters": 0.55, "correlation": -0.39, "explained": 0.021,
        },
    }  # fmt: skip
    save_profile(tiny_profile(name="judged", metrics={"data_quality": quality}), tmp_path)
    shown = run("show", "judged", "--profiles", tmp_path).stdout
    assert (
        "96 training rows at block 1: agreement 0.032 (4.0 standard deviations above random labels), "
        "reproducibility 0.594, separation 0.54\n"
    ) in shown
    assert (
        "length: preferred responses have more tokens in 60% of pairs and more characters in 55%; within a side, its "
        "correlation with the projection is -0.39, which explains 2% of the distance\n"
    ) in shown


def checked(plain: float, steered: float, faults: list[str], **check: object) -> dict[str, Any]:
    """The calibration of a profile that was checked on long texts at ±2, of which so many ended."""

    def point(strength: float, ended: float, **fields: object) -> dict[str, object]:
        bins = [(0, 48, 0.3, 12.0), (48, 256, 0.21, 34.56)]
        positions = [{"start": a, "end": b, "tokens": 9, "kl": kl, "perplexity": p} for a, b, kl, p in bins]
        figures = {"kl": 0.25, "perplexity": 20.0 + strength, "repeating": 0.125 if fields.get("faults") else 0.0}
        return {
            "strength": strength,
            "ended": ended,
            "shift_ratio": 0.1234,
            "positions": positions,
            **figures,
            **fields,
        }

    points = [point(-2.0, plain, faults=[]), point(0.0, plain), point(2.0, steered, faults=faults)]
    return {
        "long_texts": {"tokens": 256, "texts": 16, "short_range": 2.0, "tells_endings": True, "points": points} | check
    }


def test_long_texts_that_made_the_range_smaller(run: Run, tmp_path: Path) -> None:
    faults = ["perplexity", "endings", "repetition"]
    save_profile(tiny_profile(name="long", calibration=checked(0.5, 0.0625, faults), max_strength=1.5), tmp_path)
    shown = run("show", "long", "--profiles", tmp_path).stdout
    assert (
        "the safe range is ±1.5 and not ±2, which short texts allow, because of texts of up to 256 tokens (16 at each "
        "strength): at +2, perplexity is 22 (20 unsteered) and 6% end by themselves (50% unsteered) and 12% repeat or "
        "run into an endless word (0% unsteered)\n"
    ) in shown
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in shown.splitlines()]
    assert ["+2", "6%", "12%", "0.250", "22.00", "0.123"] in rows
    assert ["+2", "0.300, 12.0", "0.210, 34.6"] in rows
    assert "tokens 49 to 256" in shown
    assert "shift_ratio" not in shown
    assert "do not tell" not in shown


def test_long_texts_that_the_range_holds_for(run: Run, tmp_path: Path) -> None:
    calibration = checked(0.0625, 0.0, [], tells_endings=False)
    save_profile(tiny_profile(name="long", calibration=calibration, max_strength=2.0), tmp_path)
    shown = run("show", "long", "--profiles", tmp_path).stdout
    assert "the safe range holds for texts of up to 256 tokens (16 at each strength)\n" in shown
    assert (
        "the unsteered model ends only 6% of these texts by itself, so they do not tell whether steered texts end; a "
        "chat model's may with a larger --text-tokens\n"
    ) in shown
    save_profile(tiny_profile(name="base", calibration=checked(0.0, 0.0, [], tells_endings=False)), tmp_path)
    assert (
        "the unsteered model ends none of these texts by itself" in run("show", "base", "--profiles", tmp_path).stdout
    )


def test_json_is_an_object_or_a_list(run: Run, stored: Path) -> None:
    listed = json.loads(run("show", "warm", "kind", "--profiles", stored, "--json").stdout)
    assert [one["name"] for one in listed] == ["warm", "kind"]
    single = json.loads(run("show", "warm", "--profiles", stored, "--json").stdout)
    assert single == listed[0]
    assert (single["layers"], single["path"]) == ([1, 2], str(stored / "warm.safetensors"))


@pytest.mark.slow
def test_a_page(run: Run, stored: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "profiles.html"
    result = run("show", "warm", "kind", "--profiles", stored, "--html", page)
    assert (result.exit_code, result.stdout) == (0, f"page: {page}\n")
    assert page.read_text(encoding="utf-8").count("<svg") == 5
    blocked = run("show", "warm", "--profiles", stored, "--html", stored / "warm.safetensors" / "page.html")
    assert blocked.exit_code == 2
    assert "cannot be written" in blocked.stderr


def test_an_unknown_profile(run: Run, stored: Path) -> None:
    result = run("show", "cold", "--profiles", stored)
    expected = (
        f"error: profile 'cold' not found: neither that file nor {stored}/cold.safetensors exists "
        "(profiles there: kind, warm)\n"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", expected)
